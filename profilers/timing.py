"""Timing model files that somebody has, without anything else of the product."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from profilers.errors import MeasurementError, RunFailed
from profilers.execute import execute
from profilers.fresh import (
    ProcessReport,
    pool_reports,
    report_of_fresh_process,
    visits_by_process,
)
from profilers.journal import Journal
from profilers.measurement import MeasureSettings, Stability, Visit, percentile_of
from profilers.order import DEFAULT_LIMIT_S, WorkOrder
from profilers.summary import fit_visits

__all__ = ["CERTIFY_PROCESSES", "TIERS", "Tier", "Timing", "time_models"]

Tier = Literal["screen", "confirm", "certify"]
Progress = Callable[[int, int], None]

TIERS: Mapping[Tier, Callable[[], MeasureSettings]] = {
    "screen": MeasureSettings.screen,
    "confirm": MeasureSettings.confirm,
    "certify": MeasureSettings.certify,
}
CERTIFY_PROCESSES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What is said of one file.

    Attributes:
        model: The file.
        visits: Raw data.
        quiet_ms: Latency in the machine's quiet state.
        standard_error_ratio: Standard error of `quiet_ms`, as a share of it.
        stability: Whether the tier's precision was reached.
        problem: Why it was not timed; empty if it was. The other fields then say
            nothing.
    """

    model: Path
    visits: tuple[Visit, ...] = ()
    quiet_ms: float | None = None
    standard_error_ratio: float | None = None
    stability: Stability | None = None
    problem: str = ""

    def percentile_ms(self, percentile: float) -> float | None:
        """Percentile of all runs; None where it is not known."""
        return percentile_of(self.visits, percentile)


def time_models(
    models: Sequence[Path],
    *,
    backend: str,
    threads: int,
    tier: Tier,
    limit_s: float | None = None,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time model files.

    Screening and confirming compare them with each other, in worker processes that a
    crash costs one model; certifying times each in fresh processes, all in turn.

    Args:
        models: Files in the backend's format; all different.
        backend: As `get_backend` takes it.
        threads: Of one inference.
        tier: How carefully.
        limit_s: Time after which a silent process is stopped, or, in the tier
            `certify`, a process whatever it does; None takes the tier's own.
        progress: Called with work done and work known to be done.

    Raises:
        MeasurementError: A file is named twice, or is not there.
        DeviceUnfit: `threads` is more than the cores that can be used.
        RunFailed: The backend cannot be used.
        UnstableMeasurement: Not one file could be compared.
    """
    _check_files(models)
    if tier not in TIERS:
        raise MeasurementError(
            f"tier={tier!r} is unknown; give one of {', '.join(TIERS)}"
        )
    settings = TIERS[tier]()
    if tier == "certify":
        return _certify(models, backend, threads, settings, limit_s, progress)
    files = {str(model): model for model in models}
    order = WorkOrder(
        names=tuple(files),
        backend=backend,
        threads=threads,
        settings=settings,
        limit_s=DEFAULT_LIMIT_S if limit_s is None else limit_s,
    )
    with (
        tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder,
        Journal(Path(folder) / "journal", subject={}) as journal,
    ):
        result = execute(
            order,
            lambda name, _: files[name].resolve(),
            journal=journal,
            progress=progress,
        )
    return [
        Timing(
            model=model,
            visits=found.visits,
            quiet_ms=found.quiet_ms,
            standard_error_ratio=found.standard_error_ratio,
            stability=found.stability,
        )
        if (found := result.measurements.get(name))
        else Timing(model=model, problem=result.failures[name])
        for name, model in files.items()
    ]


def _certify(
    models: Sequence[Path],
    backend: str,
    threads: int,
    settings: MeasureSettings,
    limit_s: float | None,
    progress: Progress | None,
) -> list[Timing]:
    """Time each file in fresh processes, all files in turn.

    One file after the other would be timed in one phase of the machine each.
    """
    reports: dict[Path, list[ProcessReport]] = {model: [] for model in models}
    problems: dict[Path, str] = {}
    rng = np.random.default_rng(settings.seed)
    for number in range(CERTIFY_PROCESSES):
        for place, index in enumerate(rng.permutation(len(models))):
            model = models[index]
            if progress is not None:
                done = number * len(models) + place
                progress(done, CERTIFY_PROCESSES * len(models))
            if model in problems:
                continue
            try:
                report = report_of_fresh_process(
                    model,
                    backend_name=backend,
                    threads=threads,
                    settings=settings,
                    number=number,
                    timeout_s=limit_s,
                )
            except RunFailed as error:
                problems[model] = str(error)
            else:
                reports[model].append(report)
    timed = {model: found for model, found in reports.items() if model not in problems}
    beta, reference_ns = _common_level(timed)
    return [
        Timing(model=model, problem=problems[model])
        if model in problems
        else _certified(model, timed[model], settings, beta, reference_ns)
        for model in models
    ]


def _common_level(
    reports: Mapping[Path, Sequence[ProcessReport]],
) -> tuple[float | None, float | None]:
    """Slope and quiet level of the anchor over all files, so that they compare."""
    if not reports:
        return None, None
    visits = [
        [visit for process in visits_by_process(found) for visit in process]
        for found in reports.values()
    ]
    fit = fit_visits(visits, drift=False)
    return fit.beta, math.exp(fit.reference_log_anchor)


def _certified(
    model: Path,
    reports: Sequence[ProcessReport],
    settings: MeasureSettings,
    beta: float | None,
    anchor_reference_ns: float | None,
) -> Timing:
    found = pool_reports(
        reports, settings=settings, beta=beta, anchor_reference_ns=anchor_reference_ns
    )
    return Timing(
        model=model,
        visits=found.visits,
        quiet_ms=found.quiet_ms,
        standard_error_ratio=found.standard_error_ratio,
        stability=found.stability,
    )


def _check_files(models: Sequence[Path]) -> None:
    for model in models:
        if not model.is_file():
            raise MeasurementError(f"{model} is not a file; name a model file")
    if len(set(models)) < len(models):
        raise MeasurementError("a file is named twice; name each once")
