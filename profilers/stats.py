"""Statistics of latencies: the quiet-state estimator, percentiles, intervals.

Pure functions of numbers. A shared machine changes its speed by tens of percent, in
phases of seconds, without any counter showing it. `quiet_state` undoes that: next to
every visit of a model a fixed piece of work, the anchor, was timed, and whatever slows
the anchor slows the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "QuietStateFit",
    "mad",
    "median_interval",
    "percentile_floor",
    "percentile_ms",
    "quiet_state",
]

FloatArray = NDArray[np.float64]

# The quiet level of the anchors. Not their minimum: the fastest ever seen is an
# outlier, and a state that the machine is hardly ever in is no state to report.
QUIET_QUANTILE = 0.1

# Share of a model's visits that is cut off at either end before averaging.
TRIMMED_SHARE = 0.2

# A model cannot react against the anchor, nor far more than it; beyond, the fit has
# seen noise (a machine with a steady clock has an anchor that hardly varies).
BETA_LOW, BETA_HIGH = 0.0, 2.0

# Weight, in visits, of all models' scatter in one model's: a few visits that agree by
# luck must not look like certainty.
POOLED_VISITS = 4

# One-sided certainty of a percentile, as MLPerf LoadGen demands it.
PERCENTILE_DOUBT = 0.01

# The interval's certainty is 1 - 1/20 = 95 %.
INTERVAL_DOUBT_INVERSE = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuietStateFit:
    """log latency = effect of the model + beta * (log anchor - reference) + residual.

    Attributes:
        beta: How much of the anchor's slowdown the models share, 0 to 2.
        reference_log_anchor: The anchor's quiet level.
        effect_log: `(model_count,)`, log latency in the quiet state.
        standard_error_log: `(model_count,)`, of `effect_log`; about the relative
            error of the latency.
        residual_log: `(visit_count,)`, in the order of the visits given.
    """

    beta: float
    reference_log_anchor: float
    effect_log: FloatArray
    standard_error_log: FloatArray
    residual_log: FloatArray


def quiet_state(
    log_latency: FloatArray,
    log_anchor: FloatArray,
    model_index: NDArray[np.intp],
    *,
    model_count: int,
    beta: float | None = None,
    reference_log_anchor: float | None = None,
) -> QuietStateFit:
    """Estimate every model's latency in the machine's quiet state.

    Args:
        log_latency: `(visit_count,)`, natural logarithm of each visit's latency.
        log_anchor: `(visit_count,)`, of the anchor's time at that visit.
        model_index: `(visit_count,)`, which model was visited, below `model_count`.
        model_count: Number of models; each needs a visit.
        beta: Taken as given, as an earlier run on this machine found it; None fits it.
        reference_log_anchor: Likewise; None takes it from `log_anchor`. A short run
            needs it: it may never see the quiet state.

    Returns:
        The fit; it does not depend on the order of the visits.

    Raises:
        ValueError: The arrays do not match, hold non-finite values, or leave a model
            without a visit.
    """
    _check_visits(log_latency, log_anchor, model_index, model_count)
    counts = np.bincount(model_index, minlength=model_count)
    if reference_log_anchor is None:
        reference_log_anchor = float(np.quantile(log_anchor, QUIET_QUANTILE))
    if beta is None:
        beta = _fit_beta(log_latency, log_anchor, model_index, counts)
    quiet = log_latency - beta * (log_anchor - reference_log_anchor)

    effect = np.empty(model_count)
    variance = np.empty(model_count)
    # Sorted by model, then by value: a model's visits are a slice, in order.
    by_value = np.lexsort((quiet, model_index))
    ends = np.cumsum(counts)
    for model, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        effect[model], variance[model] = _trimmed(quiet[by_value[start:end]])
    freedom = counts - 1
    pooled = float(freedom @ variance) / max(1, int(freedom.sum()))
    moderated = (freedom * variance + POOLED_VISITS * pooled) / (
        freedom + POOLED_VISITS
    )
    return QuietStateFit(
        beta=beta,
        reference_log_anchor=reference_log_anchor,
        effect_log=effect,
        standard_error_log=np.sqrt(moderated / counts),
        residual_log=quiet - effect[model_index],
    )


def _check_visits(
    log_latency: FloatArray,
    log_anchor: FloatArray,
    model_index: NDArray[np.intp],
    model_count: int,
) -> None:
    if not log_latency.shape == log_anchor.shape == model_index.shape:
        raise ValueError(
            f"log_latency {log_latency.shape}, log_anchor {log_anchor.shape} and "
            f"model_index {model_index.shape} must have one entry per visit"
        )
    if log_latency.ndim != 1 or not log_latency.size:
        raise ValueError(f"visits have shape {log_latency.shape}; give (n,), n > 0")
    if not (np.isfinite(log_latency).all() and np.isfinite(log_anchor).all()):
        raise ValueError("a log latency or log anchor is not finite; drop that visit")
    present = np.unique(model_index)
    if not np.array_equal(present, np.arange(model_count)):
        raise ValueError(
            f"{model_count} models need visits and {present.size} indices have some; "
            "visit every model, and number them from 0"
        )


def _fit_beta(
    log_latency: FloatArray,
    log_anchor: FloatArray,
    model_index: NDArray[np.intp],
    counts: NDArray[np.intp],
) -> float:
    # The within estimator: subtracting each model's means removes its effect, so that
    # models of different size visited in different phases do not bend the slope.
    def centred(values: FloatArray) -> FloatArray:
        means = np.bincount(model_index, weights=values) / counts
        return np.asarray(values - means[model_index])

    anchor, latency = centred(log_anchor), centred(log_latency)
    spread = float(anchor @ anchor)
    # Rounding leaves a spread of about 1e-32 per visit when the anchor is constant.
    if spread <= 1e-24 * anchor.size:
        return 0.0
    slope = float(anchor @ latency) / spread
    return min(max(slope, BETA_LOW), BETA_HIGH)


def _trimmed(ordered: FloatArray) -> tuple[float, float]:
    """Trimmed mean, and the variance that one visit contributes to it.

    The variance is that of the winsorised values, widened for what was trimmed
    (Tukey and McLaughlin, 1963).
    """
    count = ordered.size
    cut = int(TRIMMED_SHARE * count)
    kept = ordered[cut : count - cut]
    if count == 1:
        return float(kept[0]), 0.0
    winsorised = np.clip(ordered, kept[0], kept[-1])
    widening = 1 - 2 * cut / count
    return float(kept.mean()), float(winsorised.var(ddof=1)) / widening**2


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


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Interval that holds the median of the population with 95 % certainty.

    Distribution-free: it runs between two of the sorted samples. With fewer than six
    no two are that certain; it then runs from the least to the greatest.

    Raises:
        ValueError: There are no samples.
    """
    if not len(samples):
        raise ValueError("no samples; give at least one")
    ordered = sorted(samples)
    count = len(ordered)
    # The number of samples below the median is binomial. Counted in whole numbers:
    # 2**count overflows a float from 1024 samples on.
    rank, ways, tail = 0, 1, 1
    while tail * 2 * INTERVAL_DOUBT_INVERSE <= 2**count:
        rank += 1
        ways = ways * (count - rank + 1) // rank
        tail += ways
    low = max(rank - 1, 0)
    return float(ordered[low]), float(ordered[count - 1 - low])


def mad(samples: Sequence[float]) -> float:
    """Median distance from the median, in the samples' unit; not scaled to sigma.

    Raises:
        ValueError: There are no samples.
    """
    if not len(samples):
        raise ValueError("no samples; give at least one")
    values = np.asarray(samples, dtype=np.float64)
    return float(np.median(np.abs(values - np.median(values))))


def _check_percentile(percentile: float) -> None:
    if not 0 < percentile < 100 or math.isnan(percentile):
        raise ValueError(f"percentile={percentile}; give one above 0 and below 100")
