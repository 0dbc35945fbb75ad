"""The quiet-state estimator: latencies on a machine that changes its speed by itself.

A shared machine changes its speed by tens of percent, in phases of seconds to minutes,
without any counter showing it. Two things tell of it. Next to every visit of a model a
fixed piece of work, the anchor, was timed, and whatever slows the anchor slows the
model. And what the anchor does not see, the memory above all, slows all models visited
at about the same time alike: the drift of that window of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_DRIFT_LOG", "TRIMMED_SHARE", "QuietStateFit", "quiet_state"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.intp]

# The quiet level of the anchors. Not their minimum: the fastest ever seen is an
# outlier, and a state that the machine is hardly ever in is no state to report.
QUIET_QUANTILE = 0.1

# Share of a model's visits that is cut off at either end before averaging.
TRIMMED_SHARE = 0.2

# A model cannot react against the anchor, nor far more than it; beyond, the fit has
# seen noise (a machine with a steady clock has an anchor that hardly varies).
BETA_LOW, BETA_HIGH = 0.0, 2.0

# Between windows beta is drawn towards 1, all work slowed alike: they are few, and each
# has a drift of its own. The strength is that of the prior's standard deviation of 0.3
# against a drift of 0.03, times the windows in a row that know no more than one.
BETA_PRIOR = 1.0
BETA_PRIOR_STRENGTH = 5 * (0.03 / 0.3) ** 2

# Weight, in visits, of all models' scatter in one model's: a few visits that agree by
# luck must not look like certainty.
POOLED_VISITS = 4

# A window that drifted further does not count, as long as a model has so many visits
# in others.
MAX_DRIFT_LOG = 0.05
MIN_COUNTED = 2

# Models and windows take turns until nothing moves by more than this, or for so long.
CONVERGED_LOG = 1e-5
MAX_TURNS = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuietStateFit:
    """log latency = model + beta * (log anchor - reference) + drift + residual.

    Attributes:
        beta: How much of the anchor's slowdown the models share, 0 to 2.
        reference_log_anchor: The anchor's quiet level.
        effect_log: `(model_count,)`, log latency in the quiet state.
        standard_error_log: `(model_count,)`, of `effect_log` against the other
            models'; about the relative error of the latency.
        drift_log: `(window_count,)`, what slowed all models in a window beyond the
            anchor; 0 on average over the visits.
        counted: `(visit_count,)`, whether a visit counts: not if its window drifted
            by more than 5 %, and its model has others.
        discarded: `(window_count,)`, whether no visit of a window counts.
    """

    beta: float
    reference_log_anchor: float
    effect_log: FloatArray
    standard_error_log: FloatArray
    drift_log: FloatArray
    counted: NDArray[np.bool_]
    discarded: NDArray[np.bool_]


def quiet_state(
    log_latency: FloatArray,
    log_anchor: FloatArray,
    model_index: IndexArray,
    *,
    model_count: int,
    window_index: IndexArray | None = None,
    feels_anchor: NDArray[np.bool_] | None = None,
    beta: float | None = None,
    reference_log_anchor: float | None = None,
) -> QuietStateFit:
    """Estimate every model's latency in the machine's quiet state.

    Args:
        log_latency: `(visit_count,)`, natural logarithm of each visit's latency.
        log_anchor: `(visit_count,)`, of the anchor's time at that visit.
        model_index: `(visit_count,)`, which model was visited, below `model_count`.
        model_count: Number of models; each needs a visit.
        window_index: `(visit_count,)`, in which stretch of time, numbered from 0 on;
            windows tell of drift by the models that they share. None has one window,
            and sees none.
        feels_anchor: `(visit_count,)`, whether what slows the anchor may slow the
            visit; None if so of all. Where it does of none, `beta` is 0, whatever is
            given.
        beta: Taken as given, as an earlier run on this machine found it; None fits it.
        reference_log_anchor: Likewise; None takes it from `log_anchor`. A short run
            needs it: it may never see the quiet state.

    Returns:
        The fit; it does not depend on the order of the visits.

    Raises:
        ValueError: The arrays do not match, hold non-finite values, or leave a model
            or a window without a visit.
    """
    if window_index is None:
        window_index = np.zeros_like(model_index)
    _check_visits(log_latency, log_anchor, model_index, model_count, window_index)
    models = _Groups(model_index, model_count)
    windows = _Groups(window_index, int(window_index.max()) + 1)
    if reference_log_anchor is None:
        reference_log_anchor = float(np.quantile(log_anchor, QUIET_QUANTILE))
    slowdown = log_anchor - reference_log_anchor
    if feels_anchor is not None:
        slowdown = np.where(feels_anchor, slowdown, 0.0)
        beta = beta if feels_anchor.any() else 0.0

    if windows.count == 1:
        if beta is None:
            beta = _slope(models.centred(slowdown), models.centred(log_latency))
        drift = np.zeros(1)
        quiet = log_latency - beta * slowdown
    else:
        # To each window's mean of the anchor first: from one visit to the next it
        # mostly varies by what does not concern the model, and its slope is smaller
        # than over minutes.
        within = _slope_within(slowdown, log_latency, models, windows)
        steadied = log_latency - within * windows.centred(slowdown)
        level, slowdowns = _levels(steadied, models, windows), windows.means(slowdown)
        if beta is None:
            beta = _slope_between(slowdowns, level, windows.sizes)
        drift = _centred_drift(level - beta * slowdowns, windows.sizes)
        quiet = steadied - (beta * slowdowns + drift)[window_index]

    counted = _counted(np.abs(drift) <= MAX_DRIFT_LOG, models, window_index)
    effect, standard_error = _effects(quiet[counted], model_index[counted], model_count)
    return QuietStateFit(
        beta=beta,
        reference_log_anchor=reference_log_anchor,
        effect_log=effect,
        standard_error_log=standard_error,
        drift_log=drift,
        counted=counted,
        discarded=windows.means(counted.astype(np.float64)) == 0,
    )


def _effects(
    quiet: FloatArray, model_index: IndexArray, model_count: int
) -> tuple[FloatArray, FloatArray]:
    """Models' latencies, and the standard errors of these."""
    models = _Groups(model_index, model_count)
    effect, variance = models.trimmed(quiet)
    freedom = models.sizes - 1
    pooled = float(freedom @ variance) / max(1, int(freedom.sum()))
    moderated = (freedom * variance + POOLED_VISITS * pooled) / (
        freedom + POOLED_VISITS
    )
    return effect, np.sqrt(moderated / models.sizes)


def _centred_drift(drift: FloatArray, sizes: NDArray[np.intp]) -> FloatArray:
    """0 on average over the visits of the windows that will count."""
    # Those around the middle one: a mean of two states may lie far from both.
    order = np.argsort(drift, kind="stable")
    middle = np.searchsorted(np.cumsum(sizes[order]), sizes.sum() / 2)
    steady = np.abs(drift - drift[order[middle]]) <= MAX_DRIFT_LOG
    return np.asarray(drift - np.average(drift[steady], weights=sizes[steady]))


def _counted(
    steady: NDArray[np.bool_], models: _Groups, window_index: IndexArray
) -> NDArray[np.bool_]:
    """Visits in steady windows, and all of a model that has hardly one there."""
    counted = steady[window_index]
    kept = np.bincount(models.index, weights=counted, minlength=models.count)
    return np.asarray(counted | (kept < MIN_COUNTED)[models.index])


class _Groups:
    """Visits in groups, of which each has at least one."""

    def __init__(self, index: IndexArray, count: int) -> None:
        self.index = index
        self.count = count
        self.sizes = np.bincount(index, minlength=count)
        cut = (TRIMMED_SHARE * self.sizes).astype(np.intp)
        self._ends = np.cumsum(self.sizes)
        self._low = self._ends - self.sizes + cut
        self._high = self._ends - cut - 1
        self._kept_share = 1 - 2 * cut / self.sizes

    def means(self, values: FloatArray) -> FloatArray:
        """Mean of each group."""
        sums = np.bincount(self.index, weights=values, minlength=self.count)
        return np.asarray(sums / self.sizes)

    def centred(self, values: FloatArray) -> FloatArray:
        """Values without their group's mean."""
        return np.asarray(values - self.means(values)[self.index])

    def trimmed_means(self, values: FloatArray) -> FloatArray:
        """Trimmed mean of each group."""
        return self._trimmed(values[self._by_value(values)])

    def trimmed(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Trimmed means, and the variance that one value contributes to each.

        The variance is that of the winsorised values, widened for what was trimmed
        (Tukey and McLaughlin, 1963); 0 of a single value.
        """
        by_value = self._by_value(values)
        ordered, group = values[by_value], self.index[by_value]
        clipped = np.clip(
            ordered, ordered[self._low][group], ordered[self._high][group]
        )
        distance = clipped - self._sums(clipped)[group] / self.sizes[group]
        variance = self._sums(distance**2) / np.maximum(1, self.sizes - 1)
        return self._trimmed(ordered), variance / self._kept_share**2

    def _by_value(self, values: FloatArray) -> IndexArray:
        """An order in which groups are slices, each with its values ascending."""
        return np.lexsort((values, self.index))

    def _trimmed(self, ordered: FloatArray) -> FloatArray:
        # Around their own middle: sums over all visits would lose the last digits.
        shift = float(ordered.mean())
        sums = np.concatenate([[0.0], np.cumsum(ordered - shift)])
        kept = sums[self._high + 1] - sums[self._low]
        return np.asarray(shift + kept / (self._high + 1 - self._low))

    def _sums(self, ordered: FloatArray) -> FloatArray:
        return np.add.reduceat(ordered, self._ends - self.sizes)


def _check_visits(
    log_latency: FloatArray,
    log_anchor: FloatArray,
    model_index: IndexArray,
    model_count: int,
    window_index: IndexArray,
) -> None:
    shapes = {log_latency.shape, log_anchor.shape, window_index.shape}
    if shapes != {model_index.shape}:
        raise ValueError(
            f"log_latency {log_latency.shape}, log_anchor {log_anchor.shape}, "
            f"model_index {model_index.shape} and window_index {window_index.shape} "
            "must have one entry per visit"
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
    windows = np.unique(window_index)
    if not np.array_equal(windows, np.arange(windows.size)):
        raise ValueError(
            f"window_index names {windows.size} windows up to {windows[-1]}; number "
            "them from 0, and leave none out"
        )


def _slope(anchor: FloatArray, latency: FloatArray) -> float:
    """Of centred latencies over centred anchors."""
    spread = float(anchor @ anchor)
    # Rounding leaves a spread of about 1e-32 per visit when the anchor is constant.
    if spread <= 1e-24 * anchor.size:
        return 0.0
    return min(max(float(anchor @ latency) / spread, BETA_LOW), BETA_HIGH)


def _slope_within(
    slowdown: FloatArray, log_latency: FloatArray, models: _Groups, windows: _Groups
) -> float:
    """Of the anchor from visit to visit, with models and windows taken out."""

    def rest(values: FloatArray) -> FloatArray:
        for _ in range(MAX_TURNS):
            before = values
            values = windows.centred(models.centred(values))
            if np.abs(values - before).max() < CONVERGED_LOG:
                break
        return values

    return _slope(rest(slowdown), rest(log_latency))


def _levels(steadied: FloatArray, models: _Groups, windows: _Groups) -> FloatArray:
    """How slow each window was, up to a constant; robust against single visits.

    Windows without models in common stay as they are to each other.
    """
    level = np.zeros(windows.count)
    for _ in range(MAX_TURNS):
        effect = models.trimmed_means(steadied - level[windows.index])
        new = windows.trimmed_means(steadied - effect[models.index])
        moved = np.abs(new - level).max()
        level = new
        if moved < CONVERGED_LOG:
            break
    return level


def _slope_between(
    slowdown: FloatArray, level_log: FloatArray, sizes: NDArray[np.intp]
) -> float:
    """Of the windows' levels over their anchors, drawn towards 1."""
    weight = sizes / sizes.mean()
    anchor = slowdown - np.average(slowdown, weights=weight)
    level = level_log - np.average(level_log, weights=weight)
    strength = BETA_PRIOR_STRENGTH
    slope = float((weight * anchor) @ level + strength * BETA_PRIOR) / float(
        (weight * anchor) @ anchor + strength
    )
    return min(max(slope, BETA_LOW), BETA_HIGH)
