"""How good a latency predictor is, on networks that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionQuality:
    """Predictions against measurements, in the terms that others publish.

    Args:
        count: Networks.
        rmspe: Root mean square of predicted over measured, minus 1.
        within_5: Share of predictions within 5 % of the measurement, 0..1.
        within_10: Within 10 %.
        kendall_tau: Rank correlation (tau-b), -1..1.
        fastest_off: Mean of predicted over measured, minus 1, of the fastest fifth.
        slowest_off: Of the slowest fifth. A difference between the two is a slope: of
            the predictor, or of another state of the machine.
    """

    count: int
    rmspe: float
    within_5: float
    within_10: float
    kendall_tau: float
    fastest_off: float
    slowest_off: float


def judge(predicted_ms: Floats, measured_ms: Floats) -> PredictionQuality:
    """Compare latencies `(n,)` with measured ones, n at least 2.

    With the same models measured again in place of predictions, this is the noise
    floor: no predictor can be better.

    Raises:
        ValueError: Different or too few networks, or a latency that is not positive.
    """
    if predicted_ms.shape != measured_ms.shape or measured_ms.ndim != 1:
        raise ValueError(
            f"shapes {predicted_ms.shape} and {measured_ms.shape}; give (n,) twice"
        )
    if len(measured_ms) < 2:
        raise ValueError(f"{len(measured_ms)} networks; give at least 2")
    if not (measured_ms > 0).all():
        raise ValueError(f"a latency is {measured_ms.min()} ms; it must be above 0")
    error = predicted_ms / measured_ms - 1
    # By both: by one of them, its own errors would sort them to the ends.
    ranked = error[np.argsort(predicted_ms * measured_ms, kind="stable")]
    fifth = max(1, len(error) // 5)
    return PredictionQuality(
        count=len(measured_ms),
        rmspe=float(np.sqrt((error**2).mean())),
        within_5=float((np.abs(error) <= 0.05).mean()),
        within_10=float((np.abs(error) <= 0.10).mean()),
        kendall_tau=kendall_tau(predicted_ms, measured_ms),
        fastest_off=float(ranked[:fifth].mean()),
        slowest_off=float(ranked[-fifth:].mean()),
    )


def kendall_tau(one: Floats, other: Floats) -> float:
    """Tau-b of two rankings `(n,)`; 0 where one of them does not rank at all.

    Source: M. Kendall, "The treatment of ties in ranking problems", 1945.
    """
    first = np.sign(one[:, None] - one[None, :])
    second = np.sign(other[:, None] - other[None, :])
    ranked = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / ranked if ranked else 0.0
