"""Whether an exported file computes what it should, as fast as it should."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import ParityError
from ofa_deploy.inference import infer
from ofa_deploy.predict.latency import ONE_SIDED_95
from profilers.backends.base import Session
from profilers.fresh import FreshMeasurement

MAX_RELATIVE_ERROR = 1e-4


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyVerdict:
    """A measurement against a budget.

    Args:
        budget_ms: What was asked for.
        measured_ms: Quiet-state latency of the exported file.
        upper_ms: Its one-sided 95 % bound; what must stay within the budget.
    """

    budget_ms: float
    measured_ms: float
    upper_ms: float

    @property
    def meets_budget(self) -> bool:
        """Whether the file is within the budget, its uncertainty included."""
        return self.upper_ms <= self.budget_ms


def judge_latency(measurement: FreshMeasurement, *, budget_ms: float) -> LatencyVerdict:
    """Hold a fresh measurement of the exported file against the budget."""
    margin = 1 + ONE_SIDED_95 * measurement.standard_error_ratio
    return LatencyVerdict(
        budget_ms=budget_ms,
        measured_ms=measurement.quiet_ms,
        upper_ms=measurement.quiet_ms * margin,
    )
