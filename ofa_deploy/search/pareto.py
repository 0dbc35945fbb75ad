"""The Pareto front of a space: NSGA-II with an archive, then a polish gene by gene.

Source: K. Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II",
2002: ranks by domination, crowding within a rank, parents by tournaments. What it
forgets, an archive keeps; and since its children are drawn at random, the front is
polished at the end by looking at all neighbours of its networks (Pareto local search:
L. Paquete et al., "Pareto local optimum sets in the biobjective traveling salesman
problem", 2004).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.search.breeding import Breeding, unlike
from ofa_deploy.search.dominated_widths import Promotion
from ofa_deploy.search.local_search import neighbours
from ofa_deploy.space import Genomes, SearchSpace, first_of_each

Costs = NDArray[np.float64]
Progress = Callable[[int, int], None]

# Networks compared with the archive at a time: the comparison is all against all.
BATCH = 4_096
# Networks whose neighbours are looked at before the archive is: those that fall out of
# it need no looking at.
POLISHED_AT_A_TIME = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontProblem:
    """What is to be little, all at once.

    Args:
        space: Where to look.
        costs: Genomes `(n, genes)` to costs `(n, objectives)`, 2 or 3 of them; infinite
            for what cannot be had.
        promotion: Widths to leave out; None for none.
        landmarks: Networks to begin with, such as the fastest, `(n, genes)`; one of
            them at least can be had.
    """

    space: SearchSpace
    costs: Callable[[Genomes], Costs]
    landmarks: Genomes
    promotion: Promotion | None = None

    def costed(self, genomes: Genomes) -> tuple[Genomes, Costs]:
        """Those of some networks that can be had, and their costs."""
        costs = self.costs(genomes)
        finite = np.isfinite(costs).all(axis=1)
        return genomes[finite], costs[finite]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Front:
    """Networks of which none is better than another in everything.

    Args:
        genomes: `(n, genes)`, ascending in the first cost.
        costs: `(n, objectives)`.
        evaluation_count: Networks predicted to find them.
    """

    genomes: Genomes
    costs: Costs
    evaluation_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nsga2:
    """The search and its settings.

    Args:
        population: Individuals of a generation.
        generations: How many.
        polish: Networks predicted at most in the polish.
        capacity: Networks that the archive holds at most of each projection; beyond,
            the most crowded go.
        mutant_share: See `Breeding`.
        block_mutation: See `Breeding`.
        resolution_mutation: See `Breeding`.
    """

    population: int = 200
    generations: int = 300
    polish: int = 300_000
    capacity: int = 1_000
    mutant_share: float = 0.5
    block_mutation: float = 0.1
    resolution_mutation: float = 0.3

    def search(
        self,
        problem: FrontProblem,
        rng: np.random.Generator,
        *,
        progress: Progress | None = None,
    ) -> Front:
        """Find the front.

        Args:
            problem: What is to be little.
            rng: Source of all choices.
            progress: Called with generations done, and all of them.
        """
        breeding = Breeding(
            space=problem.space,
            promotion=problem.promotion,
            mutant_share=self.mutant_share,
            block_mutation=self.block_mutation,
            resolution_mutation=self.resolution_mutation,
        )
        drawn = problem.space.sample(10 * self.population, rng)
        start = np.concatenate([problem.landmarks, drawn])
        start = unlike(breeding.settle(start), start[:0])
        genomes, costs = problem.costed(start)
        evaluated = len(start)
        archive = _Archive.empty(problem.space, costs.shape[1], self.capacity)
        archive = archive.merged(genomes, costs)
        for generation in range(self.generations):
            genomes, costs, fitness = _survivors(genomes, costs, self.population)
            # Half of the mothers are of the archive, which holds the extremes.
            mothers = np.concatenate(
                [
                    genomes[_tournament(fitness, self.population // 2, rng)],
                    _draw(archive.genomes, self.population - self.population // 2, rng),
                ]
            )
            fathers = genomes[_tournament(fitness, self.population, rng)]
            mothers = mothers[rng.permutation(len(mothers))]
            children = unlike(breeding.children(mothers, fathers, rng), genomes)
            if progress is not None:
                progress(generation + 1, self.generations)
            if not len(children):
                continue
            evaluated += len(children)
            children, found = problem.costed(children)
            archive = archive.merged(children, found)
            genomes = np.concatenate([genomes, children])
            costs = np.concatenate([costs, found])
        archive, polished = self._polished(problem, breeding, archive)
        return archive.front(evaluation_count=evaluated + polished)

    def _polished(
        self, problem: FrontProblem, breeding: Breeding, archive: _Archive
    ) -> tuple[_Archive, int]:
        """Look at all neighbours of the archive's networks, until none is new to it."""
        looked_at = archive.genomes[:0]
        seen = _Seen()
        left = self.polish
        while left > 0:
            fresh = unlike(archive.genomes, looked_at)
            if not len(fresh):
                break
            affordable = left // max(1, neighbour_count(problem.space))
            count = max(1, min(affordable, POLISHED_AT_A_TIME))
            if len(fresh) > count:  # spread over the front
                fresh = fresh[np.linspace(0, len(fresh) - 1, count).round().astype(int)]
            looked_at = np.concatenate([looked_at, fresh])
            near = neighbours(problem.space, fresh).reshape(-1, fresh.shape[1])
            near = breeding.settle(near)
            near = near[seen.are_new(near)]
            left -= max(1, len(near))
            for start in range(0, len(near), BATCH):
                part = near[start : start + BATCH]
                archive = archive.merged(*problem.costed(part))
        return archive, self.polish - left


class _Seen:
    """Networks that were predicted already: neighbourhoods overlap."""

    def __init__(self) -> None:
        self._rows: set[bytes] = set()

    def are_new(self, genomes: Genomes) -> NDArray[np.bool_]:
        """Whether each row is seen for the first time; it is then no longer new."""
        packed = np.ascontiguousarray(genomes, dtype=np.uint16)
        width = packed.shape[1] * packed.itemsize
        rows = packed.view(f"V{width}")[:, 0].tolist()
        new = np.zeros(len(rows), dtype=bool)
        for place, row in enumerate(rows):
            if row not in self._rows:
                self._rows.add(row)
                new[place] = True
        return new


def neighbour_count(space: SearchSpace) -> int:
    """How many networks differ from one in a single gene."""
    return int((space.choice_counts - 1).sum())


def nondominated(costs: Costs) -> NDArray[np.bool_]:
    """Rows `(n,)` that no other row is better than in one cost, and as good in all.

    Of equal rows the first is one.
    """
    if costs.shape[1] == 2:
        return _nondominated_pairs(costs)
    order = np.lexsort(costs.T[::-1])
    ordered = costs[order]
    kept = np.zeros(len(costs), dtype=bool)
    front = ordered[:0]
    # Nothing later in this order dominates anything earlier.
    for start in range(0, len(ordered), BATCH // 8):
        part = ordered[start : start + BATCH // 8]
        inside = ~_covered(part, front).any(axis=1)
        among = _covered(part, part)
        inside &= ~np.tril(among, -1).any(axis=1)
        kept[order[start : start + len(part)]] = inside
        front = np.concatenate([front, part[inside]])
    return kept


def _nondominated_pairs(costs: Costs) -> NDArray[np.bool_]:
    order = np.lexsort((costs[:, 1], costs[:, 0]))
    least = np.minimum.accumulate(costs[order, 1])
    kept = np.zeros(len(costs), dtype=bool)
    kept[order] = np.concatenate([[True], costs[order, 1][1:] < least[:-1]])[
        : len(order)
    ]
    return kept


def _covered(rows: Costs, by: Costs) -> NDArray[np.bool_]:
    """Whether each row `(n,)` is no better in anything than each other one `(m,)`."""
    covered = np.ones((len(rows), len(by)), dtype=bool)
    for cost in range(rows.shape[1]):
        covered &= by[None, :, cost] <= rows[:, None, cost]
    return covered


def ranks(costs: Costs) -> NDArray[np.int64]:
    """0 for rows that nothing dominates, 1 for those that only these do, and so on."""
    covered = _covered(costs, costs)
    dominated = covered & ~covered.T
    count = dominated.sum(axis=1)
    rank = np.full(len(costs), -1, dtype=np.int64)
    level = 0
    while (rank < 0).any():
        front = (rank < 0) & (count == 0)
        rank[front] = level
        count -= dominated[:, front].sum(axis=1)
        level += 1
    return rank


def crowding(costs: Costs, rank: NDArray[np.int64]) -> Costs:
    """How far the neighbours of the same rank are, `(n,)`; infinite at the ends.

    The sum over the costs, each as a share of its range within the rank.
    """
    total = np.zeros(len(costs))
    for column in costs.T:
        order = np.lexsort((column, rank))
        ordered, of_rank = column[order], rank[order]
        first = np.concatenate([[True], of_rank[1:] != of_rank[:-1]])
        last = np.concatenate([first[1:], [True]])
        group = np.cumsum(first) - 1
        spread = (ordered[last] - ordered[first])[group]
        gap = np.empty(len(costs))
        gap[1:-1] = ordered[2:] - ordered[:-2]
        gap[first | last] = np.inf
        spread = np.where(spread > 0, spread, 1.0)
        total[order] += gap / spread
    return total


def _survivors(
    genomes: Genomes, costs: Costs, count: int
) -> tuple[Genomes, Costs, NDArray[np.int64]]:
    """The best by rank, then by room; and their places in that order."""
    rank = ranks(costs)
    order = np.lexsort((-crowding(costs, rank), rank))[:count]
    return genomes[order], costs[order], np.arange(len(order))


def _tournament(
    place: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The better of two drawn at random, `count` times."""
    pairs = rng.integers(len(place), size=(2, count))
    return np.asarray(pairs.min(axis=0))  # survivors stand best first


def _draw(genomes: Genomes, count: int, rng: np.random.Generator) -> Genomes:
    return genomes[rng.integers(len(genomes), size=count)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Archive:
    """Fronts of all costs together, and of every pair of them.

    What is on a pair's front is on the whole one; by itself the whole one, which has
    many more networks, would crowd it out.
    """

    genomes: Genomes
    costs: Costs
    capacity: int

    @classmethod
    def empty(cls, space: SearchSpace, objectives: int, capacity: int) -> _Archive:
        return cls(
            genomes=np.empty((0, len(space.choice_counts)), dtype=np.int64),
            costs=np.empty((0, objectives)),
            capacity=capacity,
        )

    def merged(self, genomes: Genomes, costs: Costs) -> _Archive:
        new = ~_covered(costs, self.costs).any(axis=1)
        if not new.any():
            return self
        genomes, costs = genomes[new], costs[new]
        among = nondominated(costs)
        genomes, costs = genomes[among], costs[among]
        # Its own networks do not dominate each other; the new ones may.
        still = ~_covered(self.costs, costs).any(axis=1)
        pool = np.concatenate([self.genomes[still], genomes])
        costs = np.concatenate([self.costs[still], costs])
        kept = self._roomiest(costs)
        return _Archive(genomes=pool[kept], costs=costs[kept], capacity=self.capacity)

    def _roomiest(self, costs: Costs) -> NDArray[np.bool_]:
        """Which rows to keep of a front that may be too large."""
        if len(costs) <= self.capacity:
            return np.ones(len(costs), dtype=bool)
        kept = np.zeros(len(costs), dtype=bool)
        everything = np.arange(len(costs))
        kept[_roomiest(everything, costs, self.capacity)] = True
        if costs.shape[1] > 2:
            for pair in combinations(range(costs.shape[1]), 2):
                some = np.flatnonzero(nondominated(costs[:, pair]))
                kept[_roomiest(some, costs[:, pair], self.capacity)] = True
        return kept

    def front(self, *, evaluation_count: int) -> Front:
        order = np.lexsort(self.costs.T[::-1])
        return Front(
            genomes=self.genomes[order],
            costs=self.costs[order],
            evaluation_count=evaluation_count,
        )


def _roomiest(rows: NDArray[np.intp], costs: Costs, capacity: int) -> NDArray[np.intp]:
    if len(rows) <= capacity:
        return rows
    room = crowding(costs[rows], np.zeros(len(rows), dtype=np.int64))
    return rows[np.argsort(-room, kind="stable")[:capacity]]


def exhaustive_front(genomes: Genomes, costs: Costs) -> Front:
    """The front of networks that were all looked at."""
    distinct = first_of_each(genomes)
    genomes, costs = genomes[distinct], costs[distinct]
    kept = nondominated(costs)
    order = np.lexsort(costs[kept].T[::-1])
    return Front(
        genomes=genomes[kept][order],
        costs=costs[kept][order],
        evaluation_count=len(genomes),
    )


def hypervolume(costs: Costs, *, reference: Costs) -> float:
    """Volume that rows `(n, 2 or 3)` dominate below a reference point.

    Source: E. Zitzler and L. Thiele, "Multiobjective optimization using evolutionary
    algorithms", 1998; computed by slices along the last cost.
    """
    inside = costs[(costs < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    if costs.shape[1] == 2:
        front = inside[nondominated(inside)]
        front = front[np.argsort(front[:, 0])]
        width = np.diff(np.append(front[:, 0], reference[0]))
        return float((width * (reference[1] - front[:, 1])).sum())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    levels = np.append(inside[:, -1], reference[-1])
    total, part = 0.0, inside[:0, :-1]
    for index, depth in enumerate(np.diff(levels)):
        part = np.concatenate([part, inside[index : index + 1, :-1]])
        part = part[nondominated(part)]
        if depth > 0:
            total += depth * hypervolume(part, reference=reference[:-1])
    return total
