from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from ofa_deploy.search.local_search import PAIRS, changes, exchange
from ofa_deploy.space import Genomes
from tests.support import tiny

Floats = NDArray[np.float64]

SPACE = tiny.SPACE
GENES = len(SPACE.choice_counts)
# Every choice has a worth and a price of its own: what two changes do is the sum.
WORTH = np.random.default_rng(0).uniform(0, 1, (GENES, 4))
PRICE = np.random.default_rng(1).uniform(0.5, 1, (GENES, 4))


def summed(table: Floats, genomes: Genomes) -> Floats:
    found: Floats = np.take_along_axis(table, genomes.T, axis=1).sum(axis=0)
    return found


def score(genomes: Genomes) -> Floats:
    return summed(WORTH, genomes)


def budget() -> float:
    return float(np.median(summed(PRICE, SPACE.sample(500, np.random.default_rng(2)))))


def shares(genomes: Genomes) -> Floats:
    return (summed(PRICE, genomes) / budget())[:, None]


def starts(count: int) -> Genomes:
    drawn = SPACE.sample(500, np.random.default_rng(3))
    return drawn[shares(drawn)[:, 0] <= 1][:count]


def polish(genomes: Genomes, *, steps: int = 50) -> tuple[Genomes, int]:
    return exchange(
        SPACE,
        genomes,
        score=score,
        shares=shares,
        settle=SPACE.canonical,
        steps=steps,
    )


def test_no_network_gets_worse_or_exceeds_a_limit() -> None:
    found, _ = polish(starts(20))
    assert (score(found) >= score(starts(20))).all()
    assert (shares(found) <= 1).all()
    assert (score(found) > score(starts(20))).any()


def test_what_is_polished_to_the_end_has_no_better_single_change() -> None:
    found, _ = polish(starts(20))
    gene, step = changes(SPACE)
    for row in found:
        near = np.repeat(row[None], len(gene), axis=0)
        place = np.arange(len(gene))
        near[place, gene] = (near[place, gene] + step) % SPACE.choice_counts[gene]
        near = SPACE.canonical(near)
        fits = shares(near)[:, 0] <= 1
        assert (score(near[fits]) <= score(row[None])).all()


def test_what_is_polished_to_the_end_has_no_better_pair_of_changes() -> None:
    found, _ = polish(starts(5))
    gene, step = changes(SPACE)
    assert len(list(combinations(range(len(gene)), 2))) > PAIRS
    for row in found:
        best = score(row[None])[0]
        for one, other in combinations(range(len(gene)), 2):
            if gene[one] == gene[other]:
                continue
            pair = row.copy()
            for change in (one, other):
                counts = SPACE.choice_counts[gene[change]]
                pair[gene[change]] = (pair[gene[change]] + step[change]) % counts
            # Where a depth changes, the sum of two changes is not what both do.
            if not np.array_equal(pair, SPACE.canonical(pair[None])[0]):
                continue
            if np.isin(gene[[one, other]], np.arange(1, SPACE.first_slot_gene)).any():
                continue
            if shares(pair[None])[0, 0] <= 1:
                assert score(pair[None])[0] <= best + 1e-12


def test_each_network_is_polished_by_itself() -> None:
    together, _ = polish(starts(6))
    alone = np.concatenate([polish(row[None])[0] for row in starts(6)])
    assert np.array_equal(together, alone)


def test_no_step_changes_and_predicts_nothing() -> None:
    found, predicted = polish(starts(6), steps=0)
    assert np.array_equal(found, starts(6))
    assert predicted == 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_step_predicts_all_changes_and_some_pairs(steps: int) -> None:
    _, predicted = polish(starts(3), steps=steps)
    gene, _ = changes(SPACE)
    assert 3 * len(gene) <= predicted <= 3 * steps * (len(gene) + PAIRS)
