"""Evolutionary search under limits, on whole populations at once.

Source: the Once-for-All code's evolution finder (population 100, 500 generations,
a quarter survives, half of the children are mutants, half crossovers). It rejects
children until they fit, one by one and without bound; here a generation is drawn at
once, children that do not fit lose to any that do, copies of a survivor are dropped,
and every loop is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.constraints import require_budget
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.search.breeding import Breeding, promoted, unlike
from ofa_deploy.search.dominated_widths import Promotion
from ofa_deploy.search.local_search import exchange
from ofa_deploy.space import Genomes, SearchSpace, first_of_each

Floats = NDArray[np.float64]
Objective = Callable[[Genomes], Floats]

# Below any score: networks that exceed a limit come after all that do not.
EXCEEDED = -1e6
# Of the polish of all resolutions, which tells the promising ones.
FIRST_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What must not be exceeded.

    Args:
        label: Names it in messages, such as `latency on openvino-cpu`.
        unit: Of its values, such as `ms`.
        value: Genomes `(n, genes)` to values `(n,)`, none below 0; infinite for what
            cannot be had.
        upper: The largest value allowed, above 0.
    """

    label: str
    unit: str
    value: Objective
    upper: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProblem:
    """What to maximise, and under which limits.

    Args:
        space: Where to look.
        score: Genomes `(n, genes)` to what is to be large, `(n,)`, above -1e6.
        limits: One at least.
        promotion: Widths to leave out; None for none.
        landmarks: Networks to begin with, such as the fastest, `(n, genes)`; None for
            the smallest.
    """

    space: SearchSpace
    score: Objective
    limits: tuple[Limit, ...]
    promotion: Promotion | None = None
    landmarks: Genomes | None = None

    def shares(self, genomes: Genomes) -> Floats:
        """What is used up of each limit, `(n, limits)`; 1 still fits."""
        used = [limit.value(genomes) / limit.upper for limit in self.limits]
        return np.stack(used, axis=1)

    def load(self, genomes: Genomes) -> Floats:
        """The share used up of the limit used up the most, `(n,)`."""
        return np.asarray(self.shares(genomes).max(axis=1))

    def fitness(self, genomes: Genomes, load: Floats) -> Floats:
        """The score within the limits; below any, and ordered by excess, outside."""
        fitness = EXCEEDED - load
        fits = load <= 1
        if fits.any():
            fitness[fits] = self.score(genomes[fits])
        return fitness


def within_latency(
    space: SearchSpace,
    *,
    accuracy: Objective,
    latency_ms: Objective,
    budget_ms: float,
    promotion: Promotion | None = None,
) -> SearchProblem:
    """The most accurate network within a latency.

    Args:
        space: Where to look.
        accuracy: Genomes `(n, genes)` to predicted accuracies `(n,)`.
        latency_ms: Genomes `(n, genes)` to predicted latencies `(n,)`.
        budget_ms: Upper bound of these.
        promotion: Widths to leave out; None for none.

    Raises:
        SpaceError: The budget is not a finite number above 0.
    """
    require_budget(budget_ms)
    limit = Limit(label="latency", unit="ms", value=latency_ms, upper=budget_ms)
    return SearchProblem(
        space=space, score=accuracy, limits=(limit,), promotion=promotion
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchResult:
    """What a search found.

    Args:
        genomes: Different networks within the limits, best first, `(n, genes)`.
        score: Theirs, `(n,)`.
        load: The largest share of a limit that each uses up, `(n,)`.
        best_by_generation: Best score so far, never decreasing; `EXCEEDED` and less
            while none fits.
        evaluation_count: Networks predicted.
    """

    genomes: Genomes
    score: Floats
    load: Floats
    best_by_generation: Floats
    evaluation_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """The search and its settings.

    Args:
        population: Individuals of a generation.
        generations: How many.
        parent_share: Share of the population that survives and breeds.
        mutant_share: See `Breeding`.
        block_mutation: See `Breeding`.
        resolution_mutation: See `Breeding`.
        keep: How many different networks to return at most.
        polished: Networks that are polished to the end, of different resolutions.
        steps: Of that polish, at most.
    """

    population: int = 100
    generations: int = 500
    parent_share: float = 0.25
    mutant_share: float = 0.5
    block_mutation: float = 0.1
    resolution_mutation: float = 0.5
    keep: int = 10
    polished: int = 6
    steps: int = 40

    def search(self, problem: SearchProblem, rng: np.random.Generator) -> SearchResult:
        """The best networks within the limits.

        Raises:
            InfeasibleBudget: Not one fits: not the one that a directed descent finds,
                none drawn at random, and, under several limits, no child of these.
        """
        breeding = Breeding(
            space=problem.space,
            promotion=problem.promotion,
            mutant_share=self.mutant_share,
            block_mutation=self.block_mutation,
            resolution_mutation=self.resolution_mutation,
        )
        population, evaluated = self._first_population(problem, rng)
        load = problem.load(population)
        fitness = problem.fitness(population, load)
        if load[0] > 1 and len(problem.limits) == 1:
            raise _infeasible(problem, population[0])
        archive = _Archive.empty(problem.space, self.keep)
        archive = archive.merged(population, fitness, load)
        champions = _Champions(problem.space)
        champions.take(population, fitness)
        best = [float(fitness.max())]
        parent_count = max(2, round(self.population * self.parent_share))
        for _ in range(self.generations):
            survivors = np.argsort(-fitness, kind="stable")[:parent_count]
            parents, parent_fitness = population[survivors], fitness[survivors]
            first = parents[rng.integers(len(parents), size=self.population)]
            second = parents[rng.integers(len(parents), size=self.population)]
            children = unlike(breeding.children(first, second, rng), parents)
            if not len(children):  # a space of few networks is soon known
                best.append(best[-1])
                population, fitness = parents, parent_fitness
                continue
            load = problem.load(children)
            child_fitness = problem.fitness(children, load)
            evaluated += len(children)
            archive = archive.merged(children, child_fitness, load)
            champions.take(children, child_fitness)
            best.append(max(best[-1], float(child_fitness.max())))
            population = np.concatenate([parents, children])
            fitness = np.concatenate([parent_fitness, child_fitness])
        if not len(archive.genomes):
            raise _infeasible(problem, population[fitness.argmax()])
        archive, more = self._polish(problem, breeding, archive, champions.rows)
        best[-1] = float(archive.score[0])
        return SearchResult(
            genomes=archive.genomes,
            score=archive.score,
            load=archive.load,
            best_by_generation=np.array(best),
            evaluation_count=evaluated + more,
        )

    def _polish(
        self,
        problem: SearchProblem,
        breeding: Breeding,
        archive: _Archive,
        starts: Genomes,
    ) -> tuple[_Archive, int]:
        """Polish the best of every resolution a little, and the best of all to the end.

        To change the resolution, everything else has to change with it: breeding soon
        has but one of them left, and not always the right one.
        """
        predicted = 0
        for steps in (FIRST_STEPS, self.steps):
            starts, more = exchange(
                problem.space,
                starts,
                score=problem.score,
                shares=problem.shares,
                settle=breeding.settle,
                steps=steps,
            )
            predicted += more
            score, load = problem.score(starts), problem.load(starts)
            archive = archive.merged(starts, score, load)
            starts = starts[np.argsort(-score, kind="stable")[: self.polished]]
        return archive, predicted

    def _first_population(
        self, problem: SearchProblem, rng: np.random.Generator
    ) -> tuple[Genomes, int]:
        space = problem.space
        least, evaluated = descend(
            space,
            problem.load,
            rng,
            promotion=problem.promotion,
            landmarks=problem.landmarks,
        )
        drawn = promoted(problem.promotion, space.sample(self.population * 10, rng))
        # Any that fit, then those that exceed the limits least; where few fit, the
        # neighbourhood of the least one fills up by breeding.
        excess = np.maximum(problem.load(drawn) - 1, 0)
        order = np.argsort(excess, kind="stable")
        chosen = np.concatenate([least[None], drawn[order]])
        chosen = chosen[first_of_each(chosen)[: self.population]]
        return chosen, evaluated + len(drawn)


def _infeasible(problem: SearchProblem, nearest: Genomes) -> InfeasibleBudget:
    """The refusal, with what the network that comes nearest would need."""
    space = problem.space
    needs = [float(limit.value(nearest[None])[0]) for limit in problem.limits]
    if len(problem.limits) == 1 and problem.limits[0].unit == "ms":
        limit = problem.limits[0]
        message = (
            f"no network of space {space.name} is predicted to take {limit.upper:g} "
            f"ms or less; the fastest takes {needs[0]:.4g} ms. Ask for at least that"
        )
    else:
        told = "; ".join(
            f"{limit.label} {need:.4g} {limit.unit}, allowed {limit.upper:.4g}"
            for limit, need in zip(problem.limits, needs, strict=True)
        )
        message = (
            f"no network of space {space.name} is predicted to keep all limits; the "
            f"nearest has {told}. Loosen those that it exceeds"
        )
    in_ms = [
        (limit.upper, need)
        for limit, need in zip(problem.limits, needs, strict=True)
        if limit.unit == "ms"
    ]
    budget_ms, needed_ms = in_ms[0] if in_ms else (None, None)
    return InfeasibleBudget(
        message,
        budget_ms=budget_ms,
        fastest_ms=needed_ms,
        nearest=space.decode(nearest).id,
    )


def descend(
    space: SearchSpace,
    value: Objective,
    rng: np.random.Generator,
    *,
    promotion: Promotion | None = None,
    landmarks: Genomes | None = None,
    rounds: int = 4,
) -> tuple[Genomes, int]:
    """The network of least value that coordinate descent finds, from a given one.

    A measured predictor need not rank the smallest network fastest, so each gene's
    choices are tried in turn, all at once per gene.

    Args:
        space: Where to look.
        value: Genomes `(n, genes)` to what is to be little, `(n,)`.
        rng: Gives the order of the genes.
        promotion: Widths to leave out; None for none.
        landmarks: The descent begins at the best of them, `(n, genes)`; None for the
            smallest network.
        rounds: Over all genes, at most.

    Returns:
        Its genome, and the number of networks predicted.
    """
    starts = landmarks
    if starts is None:
        starts = np.zeros_like(space.choice_counts)[None]
    found = value(starts)
    best, least, evaluated = starts[found.argmin()], float(found.min()), len(starts)
    for _ in range(rounds):
        before = least
        for gene in rng.permutation(len(best)):
            trials = np.repeat(best[None], space.choice_counts[gene], axis=0)
            trials[:, gene] = np.arange(len(trials))
            trials = space.canonical(trials)
            found = value(trials)
            evaluated += len(trials)
            if found.min() < least:
                best, least = trials[found.argmin()], float(found.min())
        if least == before:
            break
    # Widths that cost nothing more; it is no slower for them.
    return promoted(promotion, best[None])[0], evaluated


class _Champions:
    """The best network of every resolution so far, of those within the limits."""

    def __init__(self, space: SearchSpace) -> None:
        count, genes = len(space.resolutions), len(space.choice_counts)
        self._genomes: Genomes = np.zeros((count, genes), dtype=np.int64)
        self._score = np.full(count, EXCEEDED)

    def take(self, genomes: Genomes, fitness: Floats) -> None:
        """Look at some networks more."""
        better = fitness > self._score[genomes[:, 0]]
        genomes, fitness = genomes[better], fitness[better]
        order = np.argsort(fitness, kind="stable")  # of several the best comes last
        place = genomes[order, 0]
        self._genomes[place], self._score[place] = genomes[order], fitness[order]

    @property
    def rows(self) -> Genomes:
        """Those there are, `(n, genes)`."""
        return self._genomes[self._score > EXCEEDED]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Archive:
    """The best different networks within the limits so far."""

    genomes: Genomes
    score: Floats
    load: Floats
    keep: int

    @classmethod
    def empty(cls, space: SearchSpace, keep: int) -> _Archive:
        return cls(
            genomes=np.empty((0, len(space.choice_counts)), dtype=np.int64),
            score=np.empty(0),
            load=np.empty(0),
            keep=keep,
        )

    def merged(self, genomes: Genomes, fitness: Floats, load: Floats) -> _Archive:
        floor = self.score[-1] if len(self.score) == self.keep else -np.inf
        fits = (load <= 1) & (fitness > floor)
        if not fits.any():
            return self
        pool = np.concatenate([self.genomes, genomes[fits]])
        score = np.concatenate([self.score, fitness[fits]])
        load = np.concatenate([self.load, load[fits]])
        # Best first; of equals, the one with more room to the limits.
        order = np.lexsort((load, -score))
        kept = order[first_of_each(pool[order])[: self.keep]]
        return _Archive(
            genomes=pool[kept], score=score[kept], load=load[kept], keep=self.keep
        )
