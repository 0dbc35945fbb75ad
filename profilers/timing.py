"""Timing model files that somebody has, without anything else of the product."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from profilers.errors import MeasurementError, RunFailed
from profilers.execute import execute
from profilers.fresh import measure_in_fresh_process
from profilers.journal import Journal
from profilers.measurement import MeasureSettings, Stability, Visit, percentile_of
from profilers.order import WorkOrder

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
    progress: Progress | None = None,
) -> list[Timing]:
    """Time model files.

    Screening and confirming compare them with each other, in worker processes that a
    crash costs one model; certifying times each by itself in fresh processes.

    Args:
        models: Files in the backend's format; all different.
        backend: As `get_backend` takes it.
        threads: Of one inference.
        tier: How carefully.
        progress: Called with work done and work known to be done.

    Raises:
        MeasurementError: A file is named twice, or is not there.
        DeviceUnfit: `threads` is more than the cores that can be used.
        RunFailed: The backend cannot be used.
        UnstableMeasurement: Not one file could be compared.
    """
    _check_files(models)
    settings = TIERS[tier]()
    if tier == "certify":
        return _certify(models, backend, threads, settings, progress)
    files = {str(model): model for model in models}
    order = WorkOrder(
        names=tuple(files), backend=backend, threads=threads, settings=settings
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
    progress: Progress | None,
) -> list[Timing]:
    timings = []
    for number, model in enumerate(models):
        if progress is not None:
            progress(number, len(models))
        timings.append(_certify_one(model, backend, threads, settings))
    return timings


def _certify_one(
    model: Path, backend: str, threads: int, settings: MeasureSettings
) -> Timing:
    try:
        found = measure_in_fresh_process(
            model,
            backend_name=backend,
            threads=threads,
            settings=settings,
            processes=CERTIFY_PROCESSES,
        )
    except RunFailed as error:
        return Timing(model=model, problem=str(error))
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
