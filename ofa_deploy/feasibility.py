"""What a space can reach, before anything is searched or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ofa_deploy.constraints import MEGABYTE, ConstraintName, Constraints, in_words
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.predict.latency import LatencyPredictor, Objective
from ofa_deploy.predict.sizes import NetworkSizes
from ofa_deploy.search.dominated_widths import Promotion, promotion
from ofa_deploy.search.evolution import descend

SAMPLE_COUNT = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRange:
    """What networks need of one thing, as predicted.

    Args:
        constraint: Of what.
        best: Of the network that needs the least, or is the most accurate.
        median: Of networks drawn at random.
        worst: Of the network that needs the most, or is the least accurate.
        limit: What is asked for; None if nothing is.
        nearest: Id of the network that is best.
    """

    constraint: ConstraintName
    best: float
    median: float
    worst: float
    limit: float | None
    nearest: str

    @property
    def satisfiable(self) -> bool:
        """Whether some network keeps this limit, the others aside."""
        if self.limit is None:
            return True
        if self.constraint == "accuracy":
            return self.best >= self.limit
        return self.best <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachableRange:
    """The latencies that a space can reach on a device, in quiet-state ms."""

    fastest_ms: float
    median_ms: float
    slowest_ms: float

    @property
    def middle_ms(self) -> float:
        """The geometric middle between fastest and slowest."""
        return float(np.sqrt(self.fastest_ms * self.slowest_ms))


def reachable_range(
    predictor: LatencyPredictor, *, sample_count: int = SAMPLE_COUNT
) -> ReachableRange:
    """The latencies that a space can reach, as predicted."""
    found = _range_of(
        predictor,
        predictor.predict_ms,
        widths=promotion(predictor.space, predictor.slot_ms),
        count=sample_count,
    )
    return ReachableRange(
        fastest_ms=found.least, median_ms=found.median, slowest_ms=found.most
    )


def feasibility(
    constraints: Constraints,
    *,
    latency: LatencyPredictor,
    accuracy: Objective,
    sizes: NetworkSizes,
) -> tuple[CostRange, ...]:
    """A row for every constraint there is, whether it is asked for or not.

    Of networks that the runtime can run.

    Args:
        constraints: What is asked for.
        latency: Predicts latencies.
        accuracy: Predicts accuracies.
        sizes: Knows sizes.
    """
    space = latency.space
    asked: Sequence[
        tuple[ConstraintName, Objective, float | None, Promotion | None]
    ] = (
        (
            "latency",
            latency.predict_ms,
            constraints.budget_ms,
            promotion(space, latency.slot_ms),
        ),
        ("size", sizes.weight_bytes, constraints.size_bytes, None),
        (
            "memory",
            lambda genomes: sizes.memory_bytes(genomes) / MEGABYTE,
            constraints.peak_memory_mb,
            None,
        ),
    )
    rows = [
        _row(name, _range_of(latency, value, widths=widths), limit)
        for name, value, limit, widths in asked
    ]
    # A regression does not know that accuracies end at 1.
    errors = _range_of(latency, lambda genomes: np.clip(1 - accuracy(genomes), 0, 1))
    turned = _Range(
        least=1 - errors.least,
        median=1 - errors.median,
        most=1 - errors.most,
        nearest=errors.nearest,
    )
    return (*rows, _row("accuracy", turned, constraints.min_accuracy))


def require_satisfiable(
    row: CostRange, predictor: LatencyPredictor, *, where: str
) -> None:
    """Refuse at once what no network can keep, whatever the other limits are.

    A latency just below the fastest prediction is worth a measurement.

    Args:
        row: Of one constraint.
        predictor: Of the latencies.
        where: Of what runtime, for people.

    Raises:
        InfeasibleBudget: No network keeps it.
    """
    if row.satisfiable or row.limit is None:
        return
    name = predictor.space.name
    if row.constraint == "latency":
        slack = predictor.upper_ratio
        if row.best <= row.limit * slack:
            return
        raise InfeasibleBudget(
            f"no network of {name} meets {row.limit:g} ms on {where} here; the fastest "
            f"is predicted to take {row.best:.4g} ms. Ask for at least "
            f"{row.best * slack:.4g} ms",
            budget_ms=row.limit,
            fastest_ms=row.best,
            nearest=row.nearest,
        )
    needs = {
        "size": "weighs, its weights alone,",
        "memory": "needs, for weights and activations alone,",
        "accuracy": "is predicted to reach",
    }
    raise InfeasibleBudget(
        f"no network of {name} keeps {row.constraint} "
        f"{in_words(row.constraint, row.limit)}: the one that comes nearest "
        f"{needs[row.constraint]} {in_words(row.constraint, row.best)}. Loosen that "
        "limit",
        budget_ms=None,
        fastest_ms=None,
        nearest=row.nearest,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """Values, and the network of the least."""

    least: float
    median: float
    most: float
    nearest: str


def _row(constraint: ConstraintName, found: _Range, limit: float | None) -> CostRange:
    return CostRange(
        constraint=constraint,
        best=found.least,
        median=found.median,
        worst=found.most,
        limit=limit,
        nearest=found.nearest,
    )


def _range_of(
    latency: LatencyPredictor,
    value: Objective,
    *,
    widths: Promotion | None = None,
    count: int = SAMPLE_COUNT,
) -> _Range:
    """The least that a descent finds, the median of a sample, and the most."""
    space, rng = latency.space, np.random.default_rng(0)
    value = latency.where_runnable(value)
    smallest, largest = space.encode(space.smallest()), space.encode(space.largest())
    least, _ = descend(
        space,
        value,
        rng,
        promotion=widths,
        landmarks=np.stack([smallest, latency.fastest()]),
    )
    ends = value(np.stack([least, smallest, largest]))
    drawn = value(space.sample(count, rng))
    drawn = drawn[np.isfinite(drawn)]
    return _Range(
        least=float(ends[0]),
        median=float(np.median(drawn if len(drawn) else ends[:1])),
        most=float(np.concatenate([ends[np.isfinite(ends)], drawn]).max()),
        nearest=space.decode(least).id,
    )
