"""At what pace a model runs while it is timed: back to back, or as an application.

A model that runs thirty times a second finds cold caches, and a processor that has
slowed its clock down meanwhile; one that runs for minutes meets the device's thermal
limit. Back to back, for seconds, neither is seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MAX_RATE_HZ", "MAX_SUSTAINED_S", "MIN_RATE_HZ", "Pace", "Pacer"]

MIN_RATE_HZ, MAX_RATE_HZ = 1e-3, 1e4
MAX_SUSTAINED_S = 4 * 3600.0

Clock = Callable[[], int]
Sleep = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When runs begin.

    Attributes:
        rate_hz: Runs per second, each begun on time with the process asleep between;
            None for one after the other.
        sustained_s: Load at that pace before the first timed run, in seconds.
    """

    rate_hz: float | None = None
    sustained_s: float = 0.0

    def __post_init__(self) -> None:
        rate = self.rate_hz
        if rate is not None and not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
            raise ValueError(f"rate_hz={rate}; give {MIN_RATE_HZ:g} to {MAX_RATE_HZ:g}")
        if not 0 <= self.sustained_s <= MAX_SUSTAINED_S:
            raise ValueError(
                f"sustained_s={self.sustained_s}; give 0 to {MAX_SUSTAINED_S:g}"
            )

    @property
    def period_s(self) -> float:
        """From the begin of one run to that of the next; 0 without a rate."""
        return 0.0 if self.rate_hz is None else 1 / self.rate_hz


class Pacer:
    """Waits until the next run is due.

    Args:
        pace: Gives the period.
        clock: Time in ns.
        sleep: Seconds to sleep, as an application that waits for its next frame does.
    """

    def __init__(
        self,
        pace: Pace,
        *,
        clock: Clock = time.perf_counter_ns,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._period_ns = math.ceil(pace.period_s * 1e9)
        self._clock = clock
        self._sleep = sleep
        self._due_ns = clock()

    def wait(self) -> None:
        """Return when a run is due; at once where there is no rate.

        After a run that took longer than the period the next one begins at once;
        frames that were missed are not made up for.
        """
        if not self._period_ns:
            return
        now_ns = self._clock()
        if now_ns < self._due_ns:
            self._sleep((self._due_ns - now_ns) / 1e9)
            now_ns = self._clock()
        # By the application's clock: what one sleep was too long, the next is shorter.
        next_ns = self._due_ns + self._period_ns
        self._due_ns = next_ns if now_ns < next_ns else now_ns + self._period_ns
