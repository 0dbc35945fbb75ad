"""Which networks to measure, so that the fewest say the most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# What is known before the first measurement, as a share of one network's: keeps the
# first choices from being arbitrary while there are fewer networks than features.
PRIOR_INFORMATION = 1e-3


def choose_informative(
    matrix: Floats, *, count: int, taken: NDArray[np.intp] | None = None
) -> NDArray[np.intp]:
    """Rows that best determine a linear fit, one after the other.

    Each next row is the one whose prediction is the least certain given those before
    it, which is a greedy D-optimal design (V. Fedorov, "Theory of Optimal
    Experiments", 1972).

    Args:
        matrix: Candidates' features `(n, features)`, in units in which their
            measurements have equal errors.
        count: Rows to choose, at most n less those taken.
        taken: Rows that are measured anyway.

    Returns:
        Indices `(count,)` of different rows, none of them taken, in order of choice.

    Raises:
        ValueError: More rows are asked for than there are.
    """
    taken = np.empty(0, dtype=np.intp) if taken is None else taken
    if count > len(matrix) - len(taken):
        raise ValueError(
            f"count={count} of {len(matrix)} rows, {len(taken)} of them taken; give at "
            f"most {len(matrix) - len(taken)}"
        )
    scale = np.sqrt((matrix**2).mean(axis=0))
    rows = matrix / np.where(scale > 0, scale, 1.0)
    covariance = np.eye(rows.shape[1]) / PRIOR_INFORMATION
    free = np.ones(len(rows), dtype=bool)
    for index in taken:
        covariance = _learn(covariance, rows[index])
        free[index] = False
    chosen = np.empty(count, dtype=np.intp)
    for place in range(count):
        variance = np.einsum("ij,jk,ik->i", rows, covariance, rows)
        index = int(np.where(free, variance, -1.0).argmax())
        covariance = _learn(covariance, rows[index])
        free[index] = False
        chosen[place] = index
    return chosen


def _learn(covariance: Floats, row: Floats) -> Floats:
    """The covariance after measuring a row (Sherman and Morrison, 1950)."""
    gain = covariance @ row
    updated: Floats = covariance - np.outer(gain, gain) / (1 + row @ gain)
    return updated
