"""Watching a device for a moment: does its speed hold, does it slow itself down?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profilers.anchor import Anchor, Clock, MatrixAnchor

__all__ = ["Steadiness", "Throttling", "read_throttling", "watch"]

WATCH_S = 1.5

# From the firmware's `get_throttled`; its other bits tell of the past.
_PI_FLAGS = {
    0: "the supply voltage is too low",
    1: "the clock is capped",
    2: "the processor is slowed down",
    3: "the soft temperature limit is reached",
}
_PI_FILE = "devices/platform/soc/soc:firmware/get_throttled"
_X86_FILES = "devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count"


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttling:
    """What the device says of slowing itself down.

    Attributes:
        event_count: Times since its start, over all cores; None if it does not count.
        active: What slows it down right now, in words.
    """

    event_count: int | None
    active: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steadiness:
    """How a device's speed held while it was watched.

    Attributes:
        spread_ratio: Between the 10th and the 90th percentile of the anchor's times,
            as a share of their median.
        throttling: At the end.
        new_throttle_events: While it was watched.
    """

    spread_ratio: float
    throttling: Throttling
    new_throttle_events: int


def read_throttling(root: Path = Path("/sys")) -> Throttling:
    """Read the kernel's counters (x86) and the firmware's flags (Raspberry Pi)."""
    counts = [
        count
        for file in root.glob(_X86_FILES)
        if (count := _integer(file, base=10)) is not None
    ]
    flags = _integer(root / _PI_FILE, base=16) or 0
    return Throttling(
        event_count=sum(counts) if counts else None,
        active=tuple(text for bit, text in _PI_FLAGS.items() if flags >> bit & 1),
    )


def watch(
    *,
    duration_s: float = WATCH_S,
    anchor: Anchor | None = None,
    clock: Clock = time.perf_counter_ns,
    throttling: Callable[[], Throttling] = read_throttling,
) -> Steadiness:
    """Repeat the anchor for a while, which also warms the device up.

    Args:
        duration_s: How long.
        anchor: None takes a `MatrixAnchor` of single bursts on `clock`.
        clock: Time in ns.
        throttling: Reads the device's own account.
    """
    if anchor is None:
        anchor = MatrixAnchor(repeats=1, clock=clock)
    before = throttling()
    anchor.measure_ns()  # the first one still brings its matrices into the cache
    end_ns = clock() + round(duration_s * 1e9)
    times_ns = [anchor.measure_ns()]
    while clock() < end_ns:
        times_ns.append(anchor.measure_ns())
    low, middle, high = np.percentile(times_ns, (10, 50, 90))
    after = throttling()
    return Steadiness(
        spread_ratio=float((high - low) / middle),
        throttling=after,
        new_throttle_events=(after.event_count or 0) - (before.event_count or 0),
    )


def _integer(file: Path, *, base: int) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8").strip(), base)
    except (OSError, ValueError):
        return None
