"""Statistics of latencies: percentiles and intervals. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = [
    "percentile_floor",
    "percentile_ms",
    "percentile_upper_ms",
]

# One-sided certainty of a percentile, as MLPerf LoadGen demands it.
PERCENTILE_DOUBT = 0.01

# One-sided doubt of an upper bound.
UPPER_DOUBT = 0.05


def percentile_floor(percentile: float) -> int:
    """Samples without which a percentile must not be reported.

    The smallest number of which, with 99 % certainty, at least two lie above the
    percentile. A median, and anything below, needs one.

    Args:
        percentile: Above 0 and below 100.
    """
    _check_percentile(percentile)
    if percentile <= 50:
        return 1
    below = percentile / 100
    count = 2
    # Chance that at most one of `count` samples lies above.
    while below**count + count * (1 - below) * below ** (count - 1) > PERCENTILE_DOUBT:
        count += 1
    return count


def percentile_ms(samples_ns: Sequence[int], percentile: float) -> float | None:
    """Percentile of samples in ms; None below its `percentile_floor`.

    Args:
        samples_ns: Latencies in ns.
        percentile: Above 0 and below 100.
    """
    if len(samples_ns) < percentile_floor(percentile):
        return None
    return float(np.percentile(np.asarray(samples_ns), percentile)) / 1e6


def percentile_upper_ms(samples_ns: Sequence[int], percentile: float) -> float | None:
    """What the population's percentile is below with 95 % certainty, in ms.

    Distribution-free: it is one of the sorted samples, the first that more than 95 %
    of such draws have the percentile below (H. A. David and H. N. Nagaraja, "Order
    statistics", 2003, section 7.1). It takes the samples to be independent.

    Args:
        samples_ns: Latencies in ns.
        percentile: Above 0 and below 100.

    Returns:
        None below the `percentile_floor`, or where even the greatest sample is not
        that certain.
    """
    count = len(samples_ns)
    if count < percentile_floor(percentile):
        return None
    share = percentile / 100
    number = np.arange(count + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(number[1:]))])
    log_chance = (
        log_factorial[-1]
        - log_factorial
        - log_factorial[::-1]
        + number * math.log(share)
        + (count - number) * math.log1p(-share)
    )
    # Of fewer than `rank` samples below the percentile, the one at `rank` is above.
    certain = np.flatnonzero(np.cumsum(np.exp(log_chance)) >= 1 - UPPER_DOUBT)
    rank = int(certain[0]) + 1
    if rank > count:
        return None
    return float(np.sort(np.asarray(samples_ns))[rank - 1]) / 1e6


def _check_percentile(percentile: float) -> None:
    if not 0 < percentile < 100 or math.isnan(percentile):
        raise ValueError(f"percentile={percentile}; give one above 0 and below 100")
