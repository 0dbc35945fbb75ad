"""Networks predicted to keep limits: from a front, or by a search of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.constraints import MEGABYTE
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.predict.latency import LatencyPredictor, Objective
from ofa_deploy.predict.sizes import NetworkSizes
from ofa_deploy.search.dominated_widths import Promotion, promotion
from ofa_deploy.search.evolution import Evolution, Limit, SearchProblem
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.search.pareto import Front, FrontProblem, Nsga2, exhaustive_front
from ofa_deploy.space import Genomes, SearchSpace, SubnetConfig, first_of_each

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]

# Columns of a front's costs.
LATENCY_MS, ERROR, WEIGHT_BYTES = range(3)
# Networks of a space that are all looked at, if the search may look at as many.
MAX_LOOKED_AT = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictors:
    """What is known of networks without measuring them.

    Args:
        latency: Quiet-state milliseconds.
        accuracy: Genomes `(n, genes)` to accuracies `(n,)`, 0..1.
        sizes: Bytes.
    """

    latency: LatencyPredictor
    accuracy: Objective
    sizes: NetworkSizes

    @property
    def space(self) -> SearchSpace:
        """Whose networks."""
        return self.latency.space

    @property
    def widths(self) -> Promotion:
        """Widths that are not worth having, as far as latency and accuracy go."""
        return promotion(self.space, self.latency.slot_ms)

    def costs(self, genomes: Genomes) -> Floats:
        """Milliseconds, errors (1 - accuracy) and bytes, `(n, 3)`."""
        return np.stack(
            [
                self.latency.predict_ms(genomes),
                1 - self.accuracy(genomes),
                self.sizes.weight_bytes(genomes),
            ],
            axis=1,
        )

    def fastest(self) -> Genomes:
        """The fastest network, `(genes,)`, with the widths that cost nothing more."""
        found: Genomes = self.widths.apply(self.latency.fastest()[None])[0]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedLimits:
    """What predictions must keep; None where nothing is asked.

    Args:
        latency_ms: At most.
        weight_bytes: At most.
        memory_bytes: At most.
        min_accuracy: At least.
    """

    latency_ms: float | None = None
    weight_bytes: float | None = None
    memory_bytes: float | None = None
    min_accuracy: float | None = None

    @property
    def sized(self) -> bool:
        """Whether a narrower block that costs as much time may be worth having."""
        return self.weight_bytes is not None or self.memory_bytes is not None


def find_front(
    predictors: Predictors,
    search: Nsga2,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Front:
    """The front of latency, accuracy and size.

    Of a small space all networks are looked at: where some fail on the runtime, one of
    the front may have none of the others near it.

    Widths that cost no less time than a wider one cost less memory: none is left out.

    Args:
        predictors: Of the space.
        search: And its settings.
        seed: Of the search.
        progress: Called with generations done, and all of them.
    """
    space = predictors.space
    landmarks = np.stack(
        [
            predictors.fastest(),
            space.encode(space.smallest()),
            space.encode(space.largest()),
        ]
    )
    problem = FrontProblem(space=space, costs=predictors.costs, landmarks=landmarks)
    if math.prod(space.choice_counts.tolist()) <= min(MAX_LOOKED_AT, search.polish):
        return exhaustive_front(*problem.costed(enumerate_genomes(space)))
    return search.search(problem, np.random.default_rng(seed), progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chooser:
    """Finds the networks that are predicted to be best.

    Args:
        predictors: Of the space.
        front: Of it.
        evolution: Searches where nothing on the front keeps the limits: memory is not
            among its costs.
        seed: Of it.
    """

    predictors: Predictors
    front: Front
    evolution: Evolution
    seed: int = 0

    def best(
        self,
        limits: PredictedLimits,
        *,
        count: int = 1,
        without: frozenset[str] = frozenset(),
    ) -> list[SubnetConfig]:
        """The best networks within limits, `count` at most.

        The most accurate ones first; where an accuracy is to be kept, the fastest.
        Where no size is limited, widths that cost no less time than a wider one are
        left out, whatever the accuracy predictor makes of them.

        Args:
            limits: Of predictions.
            count: At most so many.
            without: Ids of networks to leave out.

        Raises:
            InfeasibleBudget: There is none.
        """
        found = self._first(self._from_front(limits), count, without)
        if found:
            return found
        rng = np.random.default_rng(self.seed)
        searched = self.evolution.search(self._problem(limits), rng)
        return self._first(searched.genomes, count, without)

    def _first(
        self, rows: Genomes, count: int, without: frozenset[str]
    ) -> list[SubnetConfig]:
        configs: list[SubnetConfig] = []
        for row in rows:
            if len(configs) == count:
                break
            config = self.predictors.space.decode(row)
            if config.id not in without:
                configs.append(config)
        return configs

    def _candidates(self, limits: PredictedLimits) -> tuple[Genomes, Floats]:
        """The front's networks, the widest of those that cost no more, and costs."""
        front = self.front
        if limits.sized:
            return front.genomes, front.costs
        wide = self.predictors.widths.apply(front.genomes)
        if np.array_equal(wide, front.genomes):
            return front.genomes, front.costs
        wide = wide[first_of_each(wide)]
        return wide, self.predictors.costs(wide)

    def _from_front(self, limits: PredictedLimits) -> Genomes:
        genomes, costs = self._candidates(limits)
        inside = np.ones(len(costs), dtype=bool)
        if limits.latency_ms is not None:
            inside &= costs[:, LATENCY_MS] <= limits.latency_ms
        if limits.weight_bytes is not None:
            inside &= costs[:, WEIGHT_BYTES] <= limits.weight_bytes
        if limits.memory_bytes is not None:
            memory = self.predictors.sizes.memory_bytes(genomes)
            inside &= memory <= limits.memory_bytes
        if limits.min_accuracy is not None:
            inside &= 1 - costs[:, ERROR] >= limits.min_accuracy
        order = (
            (LATENCY_MS, ERROR) if limits.min_accuracy is None else (ERROR, LATENCY_MS)
        )
        ranked = np.lexsort([costs[inside, column] for column in order])
        return genomes[inside][ranked]

    def _problem(self, limits: PredictedLimits) -> SearchProblem:
        predictors = self.predictors
        given: list[Limit] = []
        if limits.latency_ms is not None:
            given.append(
                Limit(
                    label="latency",
                    unit="ms",
                    value=predictors.latency.predict_ms,
                    upper=limits.latency_ms,
                )
            )
        for label, value, upper in (
            ("weights", predictors.sizes.weight_bytes, limits.weight_bytes),
            ("memory", predictors.sizes.memory_bytes, limits.memory_bytes),
        ):
            if upper is not None:
                runnable = predictors.latency.where_runnable(value)
                given.append(_in_megabytes(label, runnable, upper))
        score = predictors.accuracy
        if limits.min_accuracy is not None:
            given.append(
                Limit(
                    label="errors",
                    unit="of all images",
                    value=predictors.latency.where_runnable(
                        lambda genomes: 1 - predictors.accuracy(genomes)
                    ),
                    upper=1 - limits.min_accuracy,
                )
            )
            score = _negative(predictors.latency.predict_ms)
        only_latency = len(given) == 1 and limits.latency_ms is not None
        return SearchProblem(
            space=predictors.space,
            score=score,
            limits=tuple(given),
            # A wider block is as fast, but larger.
            promotion=predictors.widths if only_latency else None,
            landmarks=predictors.fastest()[None],
        )


def _in_megabytes(label: str, value: Objective, upper_bytes: float) -> Limit:
    return Limit(
        label=label,
        unit="MB",
        value=lambda genomes: value(genomes) / MEGABYTE,
        upper=upper_bytes / MEGABYTE,
    )


def _negative(value: Objective) -> Objective:
    return lambda genomes: -value(genomes)


def ladder(
    chooser: Chooser,
    limits: PredictedLimits,
    *,
    steps: tuple[float, ...],
    without: frozenset[str] = frozenset(),
) -> list[SubnetConfig]:
    """Different networks around a latency limit, the most accurate at each step.

    Where an accuracy is to be kept, as many of the fastest.

    Args:
        chooser: Finds them.
        limits: Of predictions.
        steps: Multiples of the latency limit, descending.
        without: Ids of networks to leave out.

    Raises:
        InfeasibleBudget: There is none at any step.
    """
    if limits.latency_ms is None or limits.min_accuracy is not None:
        return chooser.best(limits, count=len(steps), without=without)
    found: dict[str, SubnetConfig] = {}
    refusal: InfeasibleBudget | None = None
    for step in steps:
        stepped = PredictedLimits(
            latency_ms=limits.latency_ms * step,
            weight_bytes=limits.weight_bytes,
            memory_bytes=limits.memory_bytes,
        )
        try:
            configs = chooser.best(stepped, without=without)
        except InfeasibleBudget as error:
            refusal = refusal or error
        else:
            found |= {config.id: config for config in configs}
    if not found and refusal is not None:
        raise refusal
    return list(found.values())
