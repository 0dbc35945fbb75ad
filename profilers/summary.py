"""From raw visits to a measurement: the fit, and what is said of its precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from profilers.measurement import (
    NO_TARGET,
    Drift,
    Measurement,
    MeasureSettings,
    Stability,
    Visit,
)
from profilers.quiet import TRIMMED_SHARE, QuietStateFit, quiet_state

__all__ = [
    "at_level",
    "fit_visits",
    "need_visits",
    "summarize",
    "summarize_drift",
    "summarize_model",
]

# The planned visits and this many times more; beyond, more visits show no more.
MAX_VISITS_FACTOR = 4

# Visits of one window: enough to tell its drift to half a percent, and over in seconds.
WINDOW_VISITS = 32
# Fewer models than this cannot tell what is common to them all.
MIN_DRIFT_MODELS = 16
# Larger ones are told of.
FLAGGED_DRIFT_LOG = 0.02


def fit_visits(
    visits: Sequence[Sequence[Visit]],
    *,
    beta: float | None = None,
    anchor_reference_ns: float | None = None,
    drift: bool = True,
) -> QuietStateFit:
    """Fit the quiet state to raw visits.

    Args:
        visits: `visits[m]` are those of model `m`; at least one each.
        beta: None fits it; whatever is given, 0 if no visit felt the host.
        anchor_reference_ns: None takes it from the visits.
        drift: False where every process had one model, and cannot tell of it.

    Returns:
        The fit; its visits are those of the first model, then those of the second, and
        so on.
    """
    tells = drift and len(visits) >= MIN_DRIFT_MODELS
    flat = [visit for of_model in visits for visit in of_model]
    counts = [len(of_model) for of_model in visits]
    return quiet_state(
        np.log([median(visit.samples_ns) for visit in flat]),
        0.5
        * np.log([(v.anchor_before_ns, v.anchor_after_ns) for v in flat]).sum(axis=1),
        np.repeat(np.arange(len(visits)), counts),
        model_count=len(visits),
        window_index=_windows(flat) if tells else None,
        feels_anchor=np.array([visit.feels_host for visit in flat]),
        beta=beta,
        reference_log_anchor=(
            None if anchor_reference_ns is None else math.log(anchor_reference_ns)
        ),
    )


def at_level(fit: QuietStateFit, *, model: int, latency_ms: float) -> QuietStateFit:
    """The same fit, all latencies shifted alike so that one model has a given one.

    Args:
        fit: Any.
        model: Number of the model.
        latency_ms: What it is to have.
    """
    shift = math.log(latency_ms * 1e6) - fit.effect_log[model]
    return replace(fit, effect_log=fit.effect_log + shift)


def _windows(visits: Sequence[Visit]) -> NDArray[np.intp]:
    """Number the stretches of time that visits were made in."""
    sessions = np.array([visit.session for visit in visits])
    order = np.lexsort((np.array([visit.time_ns for visit in visits]), sessions))
    windows = np.empty(len(visits), dtype=np.intp)
    number = 0
    for session in np.unique(sessions):
        inside = order[sessions[order] == session]
        parts = max(1, len(inside) // WINDOW_VISITS)
        for part in np.array_split(inside, parts):
            windows[part] = number
            number += 1
    return windows


def need_visits(
    visits: Sequence[Sequence[Visit]],
    fit: QuietStateFit,
    settings: MeasureSettings,
) -> list[int]:
    """Which models most need another visit, those with the largest errors first.

    None where no precision is asked for (`NO_TARGET`). Else those that are not precise
    enough, of which too many visits were disturbed or too few count, and that have not
    the most that a model can have.

    Args:
        visits: `visits[m]` are those of model `m`.
        fit: To these visits.
        settings: What is to be reached.
    """
    if settings.target_relative_error >= NO_TARGET:
        return []
    target_log = math.log1p(settings.target_relative_error)
    most = settings.visits * MAX_VISITS_FACTOR
    counted = _counted(visits, fit)
    return [
        int(index)
        for index in np.argsort(-fit.standard_error_log, kind="stable")
        if len(visits[index]) < most
        and (
            fit.standard_error_log[index] > target_log
            or counted[index] < settings.visits
            or _too_disturbed(visits[index])
        )
    ]


def _counted(visits: Sequence[Sequence[Visit]], fit: QuietStateFit) -> list[int]:
    """How many of each model's visits count."""
    counts = [len(of_model) for of_model in visits]
    ends = np.cumsum(counts)
    return [
        int(fit.counted[end - count : end].sum())
        for end, count in zip(ends, counts, strict=True)
    ]


def _too_disturbed(visits: Sequence[Visit]) -> bool:
    # The estimator trims this share; measured tables did not gain by less than that.
    return _disturbed_count(visits) > TRIMMED_SHARE * len(visits)


def _disturbed_count(visits: Sequence[Visit]) -> int:
    return sum(visit.disturbed for visit in visits)


def summarize_drift(fit: QuietStateFit) -> Drift:
    """Say how far the windows of a fit drifted."""
    drift = np.abs(fit.drift_log)
    return Drift(
        window_count=len(drift),
        flagged_count=int(((drift > FLAGGED_DRIFT_LOG) | fit.discarded).sum()),
        discarded_count=int(fit.discarded.sum()),
        largest_ratio=math.expm1(float(drift.max())),
    )


def summarize(
    names: Sequence[str],
    visits: Sequence[Sequence[Visit]],
    fit: QuietStateFit,
    settings: MeasureSettings,
) -> tuple[Measurement, ...]:
    """Make measurements from visits and the fit to them.

    Args:
        names: Of the models.
        visits: `visits[m]` are those of model `m`.
        fit: To these visits.
        settings: What was to be reached.
    """
    counted = _counted(visits, fit)
    return tuple(
        summarize_model(
            name,
            visits[index],
            counted=counted[index],
            effect_log=float(fit.effect_log[index]),
            standard_error_log=float(fit.standard_error_log[index]),
            settings=settings,
        )
        for index, name in enumerate(names)
    )


def summarize_model(
    name: str,
    visits: Sequence[Visit],
    *,
    effect_log: float,
    standard_error_log: float,
    settings: MeasureSettings,
    counted: int | None = None,
) -> Measurement:
    """Make one model's measurement from its visits and its part of a fit.

    Args:
        name: The model's name.
        visits: Its visits.
        effect_log: Natural logarithm of its quiet latency in ns.
        standard_error_log: Standard error of that.
        settings: What was to be reached.
        counted: How many of the visits count; None if all do.
    """
    error = math.expm1(standard_error_log)
    reasons = []
    if error > settings.target_relative_error:
        reasons.append(
            f"standard error {error:.1%} after {len(visits)} visits is above the "
            f"target {settings.target_relative_error:.1%}"
        )
    if len(visits) < settings.visits:
        reasons.append(
            f"only {len(visits)} of {settings.visits} planned visits fitted into "
            f"{settings.max_seconds:g} s"
        )
    elif counted is not None and counted < settings.visits:
        reasons.append(
            f"only {counted} of {len(visits)} visits count: the machine had drifted "
            "too far during the others"
        )
    if _too_disturbed(visits):
        reasons.append(
            f"the machine changed its speed during {_disturbed_count(visits)} of "
            f"{len(visits)} visits"
        )
    fallbacks = [visit.fallback for visit in visits if visit.fallback is not None]
    if fallbacks:
        reasons.append(
            f"{len(fallbacks)} of {len(visits)} visits ran in another way than the "
            f"runtime's fastest: {fallbacks[-1]}"
        )
    samples_ns = [sample for visit in visits for sample in visit.samples_ns]
    return Measurement(
        name=name,
        visits=tuple(visits),
        quiet_ms=math.exp(effect_log) / 1e6,
        standard_error_ratio=error,
        median_ms=median(samples_ns) / 1e6,
        stability=Stability(
            verdict="unstable" if reasons else "stable", reasons=tuple(reasons)
        ),
    )
