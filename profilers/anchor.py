"""The anchor: a fixed piece of work that tells how fast the machine is right now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

__all__ = ["Anchor", "MatrixAnchor"]

Clock = Callable[[], int]

# A 256x256 product, about 0.25 ms on one core, would be the natural kernel. numpy's
# OpenBLAS splits products above 64**3 multiplications over all cores, though, and on a
# busy machine then waits for the slowest of them: 16 ms instead of 0.25 were seen. The
# number of its threads is a setting of the whole process, not ours to change. So the
# same amount of arithmetic is done in products well below that threshold.
MATRIX_SIZE = 48
PRODUCTS_PER_READING = 96


class Anchor(Protocol):
    """Fixed work, timed."""

    def measure_ns(self) -> int:
        """Do the work and return the time it took, at least 1."""


class MatrixAnchor:
    """Median time of a few short bursts of single-threaded matrix products.

    The matrices stay in the first-level cache: the reading follows the clock of the
    core and whoever shares its execution units, not the memory's.

    Args:
        repeats: Bursts of one reading.
        clock: Time in ns.
    """

    def __init__(
        self, *, repeats: int = 6, clock: Clock = time.perf_counter_ns
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats={repeats}; give at least 1")
        self._repeats = repeats
        self._clock = clock
        # Values in (0, 1): neither denormal numbers nor overflow change the speed.
        values = np.linspace(0.01, 0.99, MATRIX_SIZE**2, dtype=np.float32)
        self._left = values.reshape(MATRIX_SIZE, MATRIX_SIZE)
        self._right = np.ascontiguousarray(self._left.T)
        self._product = np.empty_like(self._left)

    def measure_ns(self) -> int:
        """See `Anchor.measure_ns`."""
        # A median, so that one interrupt among the bursts does not count.
        readings = [self._burst_ns() for _ in range(self._repeats)]
        return max(1, round(statistics.median(readings)))

    def _burst_ns(self) -> int:
        start_ns = self._clock()
        for _ in range(PRODUCTS_PER_READING):
            np.dot(self._left, self._right, out=self._product)
        return self._clock() - start_ns
