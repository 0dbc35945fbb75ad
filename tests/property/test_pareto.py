from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.search.local_search import neighbours
from ofa_deploy.search.pareto import (
    Front,
    FrontProblem,
    Nsga2,
    crowding,
    exhaustive_front,
    hypervolume,
    neighbour_count,
    nondominated,
    ranks,
)
from ofa_deploy.space import Genomes
from tests.support import tiny

Costs = NDArray[np.float64]

SPACE = tiny.SPACE
ALL = enumerate_genomes(SPACE)
QUICK = Nsga2(population=100, generations=150, polish=100_000)


def tabulated(seed: int) -> dict[bytes, float]:
    values = np.random.default_rng(seed).uniform(0.0, 1.0, len(ALL))
    return {row.tobytes(): float(v) for row, v in zip(ALL, values, strict=True)}


BUMPS = [tabulated(seed) for seed in (1, 2, 3)]


def costs_of(objectives: int, roughness: float) -> dict[bytes, Costs]:
    """A trade-off along the genes' sum, and bumps that no search can foresee."""
    share = ALL.sum(axis=1) / ALL.sum(axis=1).max()
    smooth = (share, 1 - share**0.5, (share - 0.5) ** 2)
    return {
        row.tobytes(): np.array(
            [
                smooth[index][place] + roughness * BUMPS[index][row.tobytes()]
                for index in range(objectives)
            ]
        )
        for place, row in enumerate(ALL)
    }


def problem(objectives: int, *, roughness: float = 0.05) -> FrontProblem:
    known = costs_of(objectives, roughness)

    def costs(genomes: Genomes) -> Costs:
        return np.stack([known[row.tobytes()] for row in genomes])

    ends = np.stack([SPACE.encode(SPACE.smallest()), SPACE.encode(SPACE.largest())])
    return FrontProblem(space=SPACE, costs=costs, landmarks=ends)


def found(objectives: int, *, seed: int = 0, roughness: float = 0.05) -> Front:
    given_problem = problem(objectives, roughness=roughness)
    return QUICK.search(given_problem, np.random.default_rng(seed))


# -- the front of a space that can be looked at whole ----------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("objectives", "roughness"), list(product((2, 3), (0.02, 0.3)))
)
def test_the_front_is_the_exhaustive_one(
    objectives: int, roughness: float, seed: int
) -> None:
    given_problem = problem(objectives, roughness=roughness)
    whole = exhaustive_front(ALL, given_problem.costs(ALL))
    front = found(objectives, seed=seed, roughness=roughness)
    assert np.array_equal(front.costs, whole.costs)
    assert np.array_equal(front.genomes, whole.genomes)


def test_a_front_repeats_with_its_seed() -> None:
    first, again = found(3, seed=4), found(3, seed=4)
    assert np.array_equal(first.genomes, again.genomes)
    assert first.evaluation_count == again.evaluation_count


def test_the_costs_of_a_front_are_those_of_its_networks() -> None:
    front = found(3)
    assert np.array_equal(front.costs, problem(3).costs(front.genomes))
    assert len(np.unique(front.genomes, axis=0)) == len(front.genomes)


def test_a_small_archive_keeps_the_extremes() -> None:
    given_problem = problem(2)
    whole = exhaustive_front(ALL, given_problem.costs(ALL))
    small = Nsga2(population=60, generations=40, polish=50_000, capacity=5)
    front = small.search(given_problem, np.random.default_rng(0))
    assert len(front.genomes) == 5 < len(whole.genomes)
    assert np.array_equal(front.costs[[0, -1]], whole.costs[[0, -1]])


def test_the_polish_predicts_no_more_than_it_may() -> None:
    given_problem = problem(3)
    rough = Nsga2(population=10, generations=1, polish=0, capacity=50)
    spent = rough.search(given_problem, np.random.default_rng(0)).evaluation_count
    polished = Nsga2(population=10, generations=1, polish=100, capacity=50)
    count = polished.search(given_problem, np.random.default_rng(0)).evaluation_count
    # One step looks at all neighbours of a network, or at none.
    assert spent < count <= spent + 100 + neighbour_count(SPACE)


# -- domination ------------------------------------------------------------------------


@st.composite
def cost_rows(draw: st.DrawFn) -> Costs:
    objectives = draw(st.sampled_from([2, 3]))
    cell = st.integers(0, 6).map(float)  # with ties
    rows = draw(
        st.lists(
            st.lists(cell, min_size=objectives, max_size=objectives),
            min_size=1,
            max_size=40,
        )
    )
    return np.array(rows)


def dominates(one: Costs, other: Costs) -> bool:
    return bool((one <= other).all() and (one < other).any())


@given(cost_rows())
def test_nondominated_rows_are_those_that_nothing_dominates(costs: Costs) -> None:
    kept = nondominated(costs)
    for place, row in enumerate(costs):
        free = not any(dominates(other, row) for other in costs)
        earlier = any(np.array_equal(row, costs[k]) for k in range(place))
        # Of equal rows one stays; which one does not matter to anybody but tests.
        if not earlier and not free:
            assert not kept[place]
        same = [k for k in range(len(costs)) if np.array_equal(costs[k], row)]
        assert kept[same].sum() == (1 if free else 0)


@given(cost_rows())
def test_a_rank_is_one_more_than_the_best_that_dominates_allows(costs: Costs) -> None:
    rank = ranks(costs)
    for place, row in enumerate(costs):
        above = [rank[k] for k, other in enumerate(costs) if dominates(other, row)]
        assert rank[place] == (max(above) + 1 if above else 0)


@given(cost_rows())
def test_the_ends_of_a_rank_have_all_the_room_in_the_world(costs: Costs) -> None:
    rank = ranks(costs)
    room = crowding(costs, rank)
    for level in range(rank.max() + 1):
        inside = np.flatnonzero(rank == level)
        for column in range(costs.shape[1]):
            values = costs[inside, column]
            for end in (values.min(), values.max()):
                assert np.isinf(room[inside[values == end]]).any()


# -- neighbours ------------------------------------------------------------------------


def test_neighbours_differ_in_one_gene_and_are_all_there() -> None:
    rows = SPACE.sample(3, np.random.default_rng(0))
    near = neighbours(SPACE, rows)
    assert near.shape[:2] == (3, neighbour_count(SPACE))
    for row, others in zip(rows, near, strict=True):
        assert ((others != row).sum(axis=1) == 1).all()
        assert len(np.unique(others, axis=0)) == neighbour_count(SPACE)
        assert (others >= 0).all()
        assert (others < SPACE.choice_counts).all()


# -- hypervolume -----------------------------------------------------------------------


@given(cost_rows())
def test_the_hypervolume_is_the_number_of_unit_cells_dominated(costs: Costs) -> None:
    reference = np.full(costs.shape[1], 7.0)
    cells = product(range(7), repeat=costs.shape[1])
    counted = sum(bool((costs <= np.array(cell)).all(axis=1).any()) for cell in cells)
    assert hypervolume(costs, reference=reference) == pytest.approx(counted)


@given(cost_rows())
def test_only_the_front_counts_in_the_hypervolume(costs: Costs) -> None:
    reference = np.full(costs.shape[1], 6.5)
    front = costs[nondominated(costs)]
    whole = hypervolume(costs, reference=reference)
    assert hypervolume(front, reference=reference) == pytest.approx(whole)
