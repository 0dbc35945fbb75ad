"""Whether an exported file computes what it should, as fast as it should."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.constraints import ConstraintName, Constraints, Evidence, Verdict
from ofa_deploy.errors import (
    DeviceUnfit,
    ParityError,
    SpaceError,
    UnstableMeasurement,
)
from ofa_deploy.inference import infer
from ofa_deploy.predict.latency import ONE_SIDED_95, TWO_SIDED_95
from profilers.backends.base import Session
from profilers.fresh import FreshMeasurement
from profilers.measurement import MeasureSettings
from profilers.memory import MemoryGauge
from profilers.stats import percentile_floor
from profilers.timing import CERTIFY_PROCESSES

MAX_RELATIVE_ERROR = 1e-4
# Runs at a rate where only their quiet latency matters.
MEDIAN_RUNS = 100
# Visits of a process at a rate: between two the anchor is read, which takes time.
PACED_VISITS = 5
NO_MEMORY_GAUGE = (
    "peak_memory_mb: this system does not tell how much memory a process takes; leave "
    "that limit out"
)
# Of one process, however long the budget or slow the rate.
MAX_PACED_S = 6 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyClaim:
    """Top-1 accuracy, 0..1, and where it comes from.

    Args:
        kind: "measured" on the exported file, or "predicted".
        value: The accuracy.
        low: Lower end of its 95 % interval.
        high: Upper end.
        image_count: Images it was measured on, or that its predictor's labels were.
    """

    kind: Evidence
    value: float
    low: float
    high: float
    image_count: int


def accuracy_interval(value: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy; of no error at all it is none either.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", Journal of the American Statistical Association 22, 1927.

    Args:
        value: Share of images that were right, 0..1.
        count: Of images, at least 1.
    """
    z = TWO_SIDED_95
    centre = value + z**2 / (2 * count)
    half = z * math.sqrt(value * (1 - value) / count + (z / (2 * count)) ** 2)
    whole = 1 + z**2 / count
    low, high = (centre - half) / whole, (centre + half) / whole
    return min(max(0.0, low), value), max(min(1.0, high), value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A network that was measured on the way to a bundle.

    Args:
        config_id: Which.
        predicted_ms: In the quiet state.
        confirmed_ms: Timed against the others of its round.
        certified_ms: What was held against the latency asked for, its uncertainty
            included; None where it was not certified, or no latency asked for.
    """

    config_id: str
    predicted_ms: float
    confirmed_ms: float
    certified_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """Two runners' outputs on the same inputs.

    Args:
        max_relative_error: Largest difference over the largest absolute reference
            output.
        top1_agreement: Share of images with the same top class, 0..1.
        image_count: How many images.
        tolerance: Allowed relative error.
    """

    max_relative_error: float
    top1_agreement: float
    image_count: int
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the error is within tolerance and every top class is the same."""
        return self.max_relative_error <= self.tolerance and self.top1_agreement == 1.0


def compare_outputs(
    found: NDArray[np.float32],
    reference: NDArray[np.float32],
    *,
    tolerance: float = MAX_RELATIVE_ERROR,
) -> ParityReport:
    """Compare logits `(n, classes)` with reference logits of the same shape."""
    if found.shape != reference.shape:
        raise ValueError(f"shapes {found.shape} and {reference.shape} differ")
    scale = float(np.abs(reference).max()) or 1.0
    difference = np.abs(found.astype(np.float64) - reference.astype(np.float64))
    # A NaN must not pass a comparison.
    error = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    return ParityReport(
        max_relative_error=error / scale,
        top1_agreement=float((found.argmax(1) == reference.argmax(1)).mean()),
        image_count=len(reference),
        tolerance=tolerance,
    )


def require_parity(report: ParityReport, *, what: str) -> None:
    """Refuse a file that computes something else.

    Raises:
        ParityError: With the figures.
    """
    if not report.agrees:
        raise ParityError(
            f"{what} differs from the unfused reference: relative error "
            f"{report.max_relative_error:.2g} (allowed {report.tolerance:g}), the same "
            f"top class on {report.top1_agreement:.1%} of {report.image_count} images "
            "(all are required). The runtime computes something else; report this "
            "with the versions of `ofa-deploy doctor`",
            max_relative_error=report.max_relative_error,
            top1_agreement=report.top1_agreement,
        )


def run_one_by_one(
    session: Session, inputs: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Outputs `(n, classes)` of a model of static batch 1."""
    return np.concatenate(
        [infer(session, inputs[i : i + 1]) for i in range(len(inputs))]
    )


def judge_latency(
    measurement: FreshMeasurement,
    *,
    budget_ms: float,
    percentile: int = 50,
    paced: bool = False,
) -> Verdict:
    """Hold a fresh measurement of the exported file against a budget.

    Args:
        measurement: Of the file.
        budget_ms: What was asked for.
        percentile: Of all runs; 50 speaks of the quiet state.
        paced: Runs were made at a rate, or after a load: what slows the whole machine
            down is then what was asked about, and 50 is the median of all runs.

    Raises:
        UnstableMeasurement: The runs are too few for the percentile, or too short to
            be timed one by one.
    """
    found_ms: float | None = measurement.quiet_ms
    bound_ms: float | None = measurement.quiet_ms * (
        1 + ONE_SIDED_95 * measurement.standard_error_ratio
    )
    if percentile != 50 or paced:
        found_ms = measurement.percentile_ms(percentile)
        bound_ms = measurement.percentile_upper_ms(percentile)
    if found_ms is None or bound_ms is None:
        raise UnstableMeasurement(
            f"no p{percentile} is known from {len(measurement.samples_ns)} samples: "
            "either runs are too short to be timed one by one, or more are needed. Ask "
            "for percentile=50"
        )
    return Verdict(
        constraint="latency",
        limit=budget_ms,
        found=found_ms,
        bound=bound_ms,
        evidence="measured",
    )


class LoadedFiles(Protocol):
    """Files of a network, as far as their size is concerned."""

    @property
    def loaded_bytes(self) -> int:
        """Size of what the runtime loads."""

    @property
    def compressed_bytes(self) -> int:
        """Size of the same, compressed by xz."""


def judge(
    constraints: Constraints,
    *,
    measurement: FreshMeasurement,
    files: LoadedFiles,
    accuracy: AccuracyClaim | None,
) -> tuple[Verdict, ...]:
    """Hold what was found of an exported file against all that was asked for.

    Args:
        constraints: What was asked for.
        measurement: Of the file.
        files: What the runtime loads.
        accuracy: Measured or predicted; None to leave it out.

    Raises:
        UnstableMeasurement: See `judge_latency`.
        DeviceUnfit: A limit on memory, and the system does not tell of any.
    """
    verdicts: list[Verdict] = []
    if constraints.budget_ms is not None:
        verdicts.append(
            judge_latency(
                measurement,
                budget_ms=constraints.budget_ms,
                percentile=constraints.percentile,
                paced=constraints.pace is not None,
            )
        )
    if constraints.size_bytes is not None:
        verdicts.append(_exact("size", constraints.size_bytes, files.loaded_bytes))
    if constraints.compressed_bytes is not None:
        verdicts.append(
            _exact("compressed", constraints.compressed_bytes, files.compressed_bytes)
        )
    if constraints.peak_memory_mb is not None:
        if measurement.memory_mb is None:
            raise DeviceUnfit(NO_MEMORY_GAUGE)
        verdicts.append(
            _exact("memory", constraints.peak_memory_mb, measurement.memory_mb)
        )
    if constraints.min_accuracy is not None and accuracy is not None:
        verdicts.append(
            Verdict(
                constraint="accuracy",
                limit=constraints.min_accuracy,
                found=accuracy.value,
                bound=accuracy.value,
                evidence=accuracy.kind,
            )
        )
    return tuple(verdicts)


def require_memory_gauge() -> None:
    """Refuse a limit on memory where nobody counts it.

    Raises:
        DeviceUnfit: The system does not tell how much memory a process takes.
    """
    if MemoryGauge().peak_growth_mb() is None:
        raise DeviceUnfit(NO_MEMORY_GAUGE)


def _exact(constraint: ConstraintName, limit: float, found: float) -> Verdict:
    return Verdict(
        constraint=constraint,
        limit=limit,
        found=found,
        bound=found,
        evidence="measured",
    )


def require_time_for(constraints: Constraints) -> None:
    """Refuse a percentile at a rate that is too slow for its runs.

    Raises:
        SpaceError: Certifying would take more than `MAX_PACED_S` in each process.
    """
    if constraints.percentile == 50 or constraints.rate_hz is None:
        return
    planned = enough_runs(
        MeasureSettings.certify(), constraints, processes=CERTIFY_PROCESSES
    )
    made = planned.visits * (planned.runs_per_visit + 1)
    if made / constraints.rate_hz > MAX_PACED_S:
        least_hz = math.ceil(1e4 * made / MAX_PACED_S) / 1e4
        raise SpaceError(
            f"p{constraints.percentile} stands on "
            f"{2 * percentile_floor(constraints.percentile)} runs, which at "
            f"rate_hz={constraints.rate_hz:g} take more than {MAX_PACED_S / 3600:g} "
            f"hours in each of {CERTIFY_PROCESSES} processes. Ask for a lower "
            f"percentile, or a rate of at least {least_hz:g} Hz"
        )


def enough_runs(
    settings: MeasureSettings, constraints: Constraints, *, processes: int
) -> MeasureSettings:
    """Settings whose runs, over all processes, suffice for the percentile.

    At a rate no more runs are planned than that: they take as long as the
    application's.

    Args:
        settings: Of one process, without constraints.
        constraints: Give the percentile and the rate.
        processes: How many there will be.
    """
    floor = percentile_floor(constraints.percentile)
    if floor == 1 and constraints.rate_hz is None:
        return settings
    # Twice the least: the percentile's own upper bound must be among the runs.
    needed = 2 * floor if floor > 1 else MEDIAN_RUNS
    per_process = math.ceil(needed / processes)
    runs, visits = settings.runs_per_visit, settings.visits
    if constraints.rate_hz is None:
        visits = max(visits, math.ceil(per_process / runs))
        run_s = (constraints.latency_ms or 0.0) / 1e3
    else:
        visits = min(visits, PACED_VISITS)
        runs = math.ceil(per_process / visits)
        run_s = 1 / constraints.rate_hz
    # Twice what they should take; a busy machine takes longer.
    least_s = min(2 * visits * (runs + 1) * run_s, MAX_PACED_S)
    return replace(
        settings,
        visits=visits,
        runs_per_visit=runs,
        max_seconds=max(settings.max_seconds, least_s),
    )
