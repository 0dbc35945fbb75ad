"""Evolutionary search under a latency budget, on whole populations at once.

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

from ofa_deploy.errors import InfeasibleBudget, SpaceError
from ofa_deploy.search.dominance import Promotion
from ofa_deploy.space import Genomes, SearchSpace, first_of_each

Objective = Callable[[Genomes], NDArray[np.float64]]


def require_budget(budget_ms: float) -> None:
    """Refuse a budget that no latency can be compared with.

    Raises:
        SpaceError: Not a finite number above 0.
    """
    if not (np.isfinite(budget_ms) and budget_ms > 0):
        raise SpaceError(
            f"a latency budget of {budget_ms} ms makes no sense; give a finite number "
            "above 0, such as 0.5"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProblem:
    """What to maximise, and under which limit.

    Args:
        space: Where to look.
        accuracy: Genomes `(n, genes)` to predicted accuracies `(n,)`.
        latency_ms: Genomes `(n, genes)` to predicted latencies `(n,)`.
        budget_ms: Upper bound of `latency_ms`.
        promotion: Widths to leave out; None for none.
    """

    space: SearchSpace
    accuracy: Objective
    latency_ms: Objective
    budget_ms: float
    promotion: Promotion | None = None

    def __post_init__(self) -> None:
        require_budget(self.budget_ms)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchResult:
    """What a search found.

    Args:
        genomes: Different networks within the budget, best first, `(n, genes)`.
        accuracy: Their predicted accuracies, `(n,)`.
        latency_ms: Their predicted latencies, `(n,)`.
        best_by_generation: Best accuracy so far, never decreasing.
        evaluation_count: Networks predicted.
    """

    genomes: Genomes
    accuracy: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    best_by_generation: NDArray[np.float64]
    evaluation_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """The search and its settings.

    Args:
        population: Individuals of a generation.
        generations: How many.
        parent_share: Share of the population that survives and breeds.
        mutant_share: Share of the children that are mutants; the rest are crossovers.
        block_mutation: Probability that a mutant's block (or depth) is redrawn.
        resolution_mutation: The same for the resolution.
        keep: How many different networks to return at most.
    """

    population: int = 100
    generations: int = 500
    parent_share: float = 0.25
    mutant_share: float = 0.5
    block_mutation: float = 0.1
    resolution_mutation: float = 0.5
    keep: int = 10

    def search(self, problem: SearchProblem, rng: np.random.Generator) -> SearchResult:
        """The best networks within the budget.

        Raises:
            InfeasibleBudget: Not even the fastest network found by a directed descent
                and random draws fits.
        """
        space = problem.space
        population, evaluated = self._first_population(problem, rng)
        latency = problem.latency_ms(population)
        fitness = _fitness(problem, population, latency)
        archive = _Archive.empty(space, self.keep)
        archive = archive.merged(population, fitness, latency, problem.budget_ms)
        best = [float(archive.accuracy[0])]
        parent_count = max(2, round(self.population * self.parent_share))
        for _ in range(self.generations):
            survivors = np.argsort(-fitness, kind="stable")[:parent_count]
            parents, parent_fitness = population[survivors], fitness[survivors]
            children = self._breed(problem, parents, rng)
            if not len(children):  # a space of few networks is soon known
                best.append(best[-1])
                population, fitness = parents, parent_fitness
                continue
            child_latency = problem.latency_ms(children)
            child_fitness = _fitness(problem, children, child_latency)
            evaluated += len(children)
            archive = archive.merged(
                children, child_fitness, child_latency, problem.budget_ms
            )
            best.append(float(archive.accuracy[0]))
            population = np.concatenate([parents, children])
            fitness = np.concatenate([parent_fitness, child_fitness])
        return SearchResult(
            genomes=archive.genomes,
            accuracy=archive.accuracy,
            latency_ms=archive.latency_ms,
            best_by_generation=np.array(best),
            evaluation_count=evaluated,
        )

    def _first_population(
        self, problem: SearchProblem, rng: np.random.Generator
    ) -> tuple[Genomes, int]:
        space = problem.space
        fastest, fastest_ms, evaluated = descend_to_fastest(problem, rng)
        if fastest_ms > problem.budget_ms:
            raise InfeasibleBudget(
                f"no network of space {space.name} is predicted to take "
                f"{problem.budget_ms:g} ms or less; the fastest takes "
                f"{fastest_ms:.4g} ms. Ask for at least that",
                budget_ms=problem.budget_ms,
                fastest_ms=fastest_ms,
            )
        drawn = _promoted(problem, space.sample(self.population * 10, rng))
        latency = problem.latency_ms(drawn)
        # Any that fit, then those that exceed the budget least; where few fit, the
        # fastest one's neighbourhood fills up by breeding.
        order = np.argsort(np.maximum(latency - problem.budget_ms, 0), kind="stable")
        chosen = np.concatenate([fastest[None], drawn[order]])
        chosen = chosen[first_of_each(chosen)[: self.population]]
        return chosen, evaluated + len(drawn)

    def _breed(
        self, problem: SearchProblem, parents: Genomes, rng: np.random.Generator
    ) -> Genomes:
        """At most a population of children, unlike the parents and each other.

        Copies would take a small population over, and the search stop at a local
        optimum.
        """
        mutant_count = round(self.population * self.mutant_share)
        first = parents[rng.integers(len(parents), size=self.population)]
        second = parents[rng.integers(len(parents), size=self.population)]
        mutants = self._mutate(problem.space, first[:mutant_count], rng)
        mother, father = first[mutant_count:], second[mutant_count:]
        crossed = np.where(rng.random(mother.shape) < 0.5, mother, father)
        bred = problem.space.canonical(np.concatenate([mutants, crossed]))
        family = np.concatenate([parents, _promoted(problem, bred)])
        different = first_of_each(family)
        return family[different[different >= len(parents)]]

    def _mutate(
        self, space: SearchSpace, genomes: Genomes, rng: np.random.Generator
    ) -> Genomes:
        counts = space.choice_counts
        redrawn = rng.integers(0, counts[None, :], size=genomes.shape)
        first_slot = space.first_slot_gene
        changes = rng.random(genomes.shape) < self.block_mutation
        changes[:, 0] = rng.random(len(genomes)) < self.resolution_mutation
        # Kernel and expand of a block are redrawn together.
        blocks = rng.random((len(genomes), space.slot_count)) < self.block_mutation
        changes[:, first_slot:] = np.repeat(blocks, 2, axis=1)
        return np.where(changes, redrawn, genomes)


def _promoted(problem: SearchProblem, genomes: Genomes) -> Genomes:
    return genomes if problem.promotion is None else problem.promotion.apply(genomes)


def descend_to_fastest(
    problem: SearchProblem, rng: np.random.Generator, *, rounds: int = 4
) -> tuple[Genomes, float, int]:
    """The fastest network that coordinate descent finds, from the smallest one.

    A measured predictor need not rank the smallest network fastest, so each gene's
    choices are tried in turn, all at once per gene.

    Returns:
        Its genome, its latency in ms, and the number of networks predicted.
    """
    space = problem.space
    best = np.zeros_like(space.choice_counts)
    best_ms = float(problem.latency_ms(best[None])[0])
    evaluated = 1
    for _ in range(rounds):
        before = best_ms
        for gene in rng.permutation(len(best)):
            trials = np.repeat(best[None], space.choice_counts[gene], axis=0)
            trials[:, gene] = np.arange(len(trials))
            trials = space.canonical(trials)
            latency = problem.latency_ms(trials)
            evaluated += len(trials)
            if latency.min() < best_ms:
                best, best_ms = trials[latency.argmin()], float(latency.min())
        if best_ms == before:
            break
    # Widths that cost nothing more; it is no slower for them.
    best = _promoted(problem, best[None])[0]
    best_ms = float(problem.latency_ms(best[None])[0])
    return best, best_ms, evaluated + 1


def _fitness(
    problem: SearchProblem, genomes: Genomes, latency: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Accuracy within the budget; below it, and ordered by excess, outside."""
    excess = latency - problem.budget_ms
    fitness = -1.0 - excess / problem.budget_ms
    fits = excess <= 0
    if fits.any():
        fitness[fits] = problem.accuracy(genomes[fits])
    return fitness


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Archive:
    """The best different networks within the budget so far."""

    genomes: Genomes
    accuracy: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    keep: int

    @classmethod
    def empty(cls, space: SearchSpace, keep: int) -> _Archive:
        return cls(
            genomes=np.empty((0, len(space.choice_counts)), dtype=np.int64),
            accuracy=np.empty(0),
            latency_ms=np.empty(0),
            keep=keep,
        )

    def merged(
        self,
        genomes: Genomes,
        fitness: NDArray[np.float64],
        latency: NDArray[np.float64],
        budget_ms: float,
    ) -> _Archive:
        floor = self.accuracy[-1] if len(self.accuracy) == self.keep else -np.inf
        fits = (latency <= budget_ms) & (fitness > floor)
        if not fits.any():
            return self
        pool = np.concatenate([self.genomes, genomes[fits]])
        accuracy = np.concatenate([self.accuracy, fitness[fits]])
        latency = np.concatenate([self.latency_ms, latency[fits]])
        # Best first; of equals, the faster.
        order = np.lexsort((latency, -accuracy))
        kept = order[first_of_each(pool[order])[: self.keep]]
        return _Archive(
            genomes=pool[kept],
            accuracy=accuracy[kept],
            latency_ms=latency[kept],
            keep=self.keep,
        )
