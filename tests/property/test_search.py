from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ofa_deploy.errors import InfeasibleBudget, SpaceError
from ofa_deploy.families import mbv3
from ofa_deploy.plan import lower
from ofa_deploy.predict.accuracy import (
    AccuracyPredictor,
    feature_count,
    fit_accuracy_predictor,
    one_hot,
)
from ofa_deploy.search.evolution import (
    EXCEEDED,
    Evolution,
    Limit,
    SearchProblem,
    SearchResult,
    descend,
    within_latency,
)
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.space import Genomes, SearchSpace, SubnetConfig
from tests.support import tiny

SPACE = tiny.SPACE
ALL = enumerate_genomes(SPACE)
SPACES = (SPACE, mbv3.small(), mbv3.imagenet(), mbv3.imagenet(width=1.2))
QUICK = Evolution(population=60, generations=30)


def tabulated(seed: int, *, low: float, high: float) -> dict[bytes, float]:
    """A random number for each network: no structure that a search could lean on."""
    values = np.random.default_rng(seed).uniform(low, high, len(ALL))
    return {row.tobytes(): float(v) for row, v in zip(ALL, values, strict=True)}


def by_work(genomes: Genomes) -> NDArray[np.float64]:
    """A latency that grows with the work: 1 ms per million multiply-accumulates."""
    return np.array([lower(SPACE, SPACE.decode(r)).mac_count / 1e6 for r in genomes])


def bumpy_accuracy(genomes: Genomes) -> NDArray[np.float64]:
    """An accuracy that mostly grows with the work, and is different everywhere."""
    bumps = tabulated(7, low=0.0, high=0.03)
    smooth = tiny.accuracy_of(SPACE, genomes)
    result: NDArray[np.float64] = smooth + [bumps[row.tobytes()] for row in genomes]
    return result


LATENCY = {row.tobytes(): ms for row, ms in zip(ALL, by_work(ALL), strict=True)}
ACCURACY = {row.tobytes(): a for row, a in zip(ALL, bumpy_accuracy(ALL), strict=True)}


def latency_ms(genomes: Genomes) -> NDArray[np.float64]:
    return np.array([LATENCY[row.tobytes()] for row in genomes])


def accuracy(genomes: Genomes) -> NDArray[np.float64]:
    return np.array([ACCURACY[row.tobytes()] for row in genomes])


def problem(budget_ms: float) -> SearchProblem:
    return within_latency(
        SPACE, accuracy=accuracy, latency_ms=latency_ms, budget_ms=budget_ms
    )


def budget_at(share: float) -> float:
    """The latency that this share of all networks stays within."""
    return float(np.quantile(latency_ms(ALL), share))


def search(budget_ms: float, *, seed: int = 0) -> SearchResult:
    return QUICK.search(problem(budget_ms), np.random.default_rng(seed))


# -- evolution -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_evolution_finds_the_best_of_all_networks(share: float, seed: int) -> None:
    budget_ms = budget_at(share)
    fits = latency_ms(ALL) <= budget_ms
    assert search(budget_ms, seed=seed).score[0] == accuracy(ALL[fits]).max()


@pytest.mark.parametrize("seed", range(5))
def test_every_network_found_is_within_the_budget(seed: int) -> None:
    budget_ms = budget_at(0.2)
    result = search(budget_ms, seed=seed)
    assert (latency_ms(result.genomes) <= budget_ms).all()


def test_the_networks_found_have_the_figures_that_come_with_them() -> None:
    result = search(budget_at(0.5))
    share = latency_ms(result.genomes) / budget_at(0.5)
    assert np.array_equal(result.load, share)
    assert np.array_equal(result.score, accuracy(result.genomes))


def test_the_networks_found_are_different_and_best_first() -> None:
    result = search(budget_at(0.5))
    assert len(np.unique(result.genomes, axis=0)) == len(result.genomes) == QUICK.keep
    assert (np.diff(result.score) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_best_so_far_never_gets_worse(seed: int) -> None:
    result = search(budget_at(0.5), seed=seed)
    assert (np.diff(result.best_by_generation) >= 0).all()


def test_there_is_a_best_so_far_for_every_generation() -> None:
    result = search(budget_at(0.5))
    assert len(result.best_by_generation) == QUICK.generations + 1


def test_the_best_so_far_ends_at_the_best_found() -> None:
    result = search(budget_at(0.5))
    assert result.best_by_generation[-1] == result.score[0]


def test_a_search_repeats_with_its_seed() -> None:
    first, again = search(budget_at(0.5), seed=3), search(budget_at(0.5), seed=3)
    assert np.array_equal(first.genomes, again.genomes)
    assert np.array_equal(first.best_by_generation, again.best_by_generation)


def test_a_larger_budget_never_gives_a_worse_network() -> None:
    best = [search(budget_at(s)).score[0] for s in (0.05, 0.2, 0.5, 0.8, 1.0)]
    assert best == sorted(best)


# -- budgets ---------------------------------------------------------------------------


def test_the_descent_ends_at_the_fastest_network() -> None:
    genome, _ = descend(SPACE, latency_ms, np.random.default_rng(0))
    assert latency_ms(ALL).min() == latency_ms(genome[None])[0]


def test_a_budget_below_the_fastest_network_names_the_fastest() -> None:
    fastest_ms = latency_ms(ALL).min()
    with pytest.raises(InfeasibleBudget) as caught:
        search(fastest_ms * 0.99)
    error = caught.value
    assert (error.fastest_ms, error.budget_ms) == (fastest_ms, fastest_ms * 0.99)
    fastest = ALL[latency_ms(ALL).argmin()]
    assert error.nearest == SPACE.decode(fastest).id
    assert str(error) == (
        f"no network of space tiny is predicted to take {fastest_ms * 0.99:g} ms or "
        f"less; the fastest takes {fastest_ms:.4g} ms. Ask for at least that"
    )


def test_the_fastest_latency_is_a_budget_that_is_met() -> None:
    fastest_ms = float(latency_ms(ALL).min())
    assert latency_ms(search(fastest_ms).genomes)[0] == fastest_ms


@pytest.mark.parametrize("budget_ms", [math.nan, 0.0, -1.0, math.inf, -math.inf])
def test_a_budget_that_makes_no_sense_is_refused(budget_ms: float) -> None:
    with pytest.raises(SpaceError) as caught:
        problem(budget_ms)
    assert str(caught.value) == (
        f"a latency budget of {budget_ms} ms makes no sense; give a finite number "
        "above 0, such as 0.5"
    )


# -- several limits --------------------------------------------------------------------


def sizes(genomes: Genomes) -> NDArray[np.float64]:
    """Something that neither follows the latency nor the accuracy."""
    values = tabulated(11, low=1.0, high=9.0)
    return np.array([values[row.tobytes()] for row in genomes])


def limited(budget_ms: float, size: float) -> SearchProblem:
    return SearchProblem(
        space=SPACE,
        score=accuracy,
        limits=(
            Limit(label="latency", unit="ms", value=latency_ms, upper=budget_ms),
            Limit(label="size", unit="MB", value=sizes, upper=size),
        ),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("share", "size"), [(0.9, 2.0), (0.3, 5.0), (0.1, 8.0)])
def test_of_networks_that_keep_two_limits_the_best_is_found(
    share: float, size: float, seed: int
) -> None:
    budget_ms = budget_at(share)
    fits = (latency_ms(ALL) <= budget_ms) & (sizes(ALL) <= size)
    result = QUICK.search(limited(budget_ms, size), np.random.default_rng(seed))
    assert result.score[0] == accuracy(ALL[fits]).max()
    assert (result.load <= 1).all()


def test_limits_that_no_network_keeps_together_are_told_with_the_nearest() -> None:
    fastest = ALL[[latency_ms(ALL).argmin()]]
    budget_ms, size = float(latency_ms(fastest)[0]), float(sizes(fastest)[0])
    problem = limited(budget_ms, size * 0.9)
    fits = problem.load(ALL) <= 1
    assert not fits.any()
    with pytest.raises(InfeasibleBudget, match="the nearest has latency ") as caught:
        QUICK.search(problem, np.random.default_rng(0))
    nearest = caught.value.nearest
    assert nearest is not None
    row = SPACE.encode(SubnetConfig.from_id(nearest))[None]
    assert problem.load(row)[0] == problem.load(ALL).min()


def test_the_fastest_network_that_keeps_an_accuracy_is_found() -> None:
    least = float(np.quantile(accuracy(ALL), 0.8))
    fastest_ms = latency_ms(ALL[accuracy(ALL) >= least]).min()
    kept = SearchProblem(
        space=SPACE,
        score=lambda genomes: -latency_ms(genomes),
        limits=(
            Limit(
                label="errors",
                unit="of all images",
                value=lambda genomes: 1 - accuracy(genomes),
                upper=1 - least,
            ),
        ),
    )
    result = QUICK.search(kept, np.random.default_rng(0))
    assert result.score[0] == -fastest_ms


def test_while_no_network_fits_the_best_so_far_is_below_any_score() -> None:
    budget_ms, size = budget_at(0.05), 1.5
    fits = (latency_ms(ALL) <= budget_ms) & (sizes(ALL) <= size)
    assert 0 < fits.sum() < 5
    result = Evolution(population=12, generations=400).search(
        limited(budget_ms, size), np.random.default_rng(1)
    )
    best = result.best_by_generation
    assert (best[best < 0] <= EXCEEDED - 1).all()
    assert best[-1] == result.score[0]


# -- features --------------------------------------------------------------------------


@st.composite
def canonical_rows(draw: st.DrawFn) -> tuple[SearchSpace, Genomes]:
    space = draw(st.sampled_from(SPACES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return space, space.sample(4, rng)


def from_one_hot(space: SearchSpace, features: NDArray[np.float32]) -> Genomes:
    """The genomes whose features these are; the inverse of `one_hot`."""
    counts = space.choice_counts
    genomes = np.zeros((len(features), len(counts)), dtype=np.int64)
    column = len(space.resolutions)
    genomes[:, 0] = features[:, :column].argmax(1)
    gene = space.first_slot_gene
    for index, stage in enumerate(space.stages):
        depth = np.zeros(len(features), dtype=np.int64)
        for _ in range(stage.max_depth):
            for choices in (stage.kernels, stage.expands):
                hot = features[:, column : column + len(choices)]
                genomes[:, gene] = hot.argmax(1)
                gene, column = gene + 1, column + len(choices)
            depth += hot.any(1)
        genomes[:, 1 + index] = np.searchsorted(stage.depths, depth)
    return genomes


@given(canonical_rows())
def test_genomes_survive_their_features(drawn: tuple[SearchSpace, Genomes]) -> None:
    space, rows = drawn
    assert np.array_equal(from_one_hot(space, one_hot(space, rows)), rows)


@given(canonical_rows())
def test_there_is_one_hot_feature_per_choice_of_a_used_slot(
    drawn: tuple[SearchSpace, Genomes],
) -> None:
    space, rows = drawn
    ones = 1 + 2 * space.active_slots(rows).sum(1)
    features = one_hot(space, rows)
    assert np.array_equal(features.sum(1), ones)
    assert set(np.unique(features)) <= {0.0, 1.0}


def test_features_of_unused_slots_are_zero() -> None:
    smallest = SPACE.encode(SPACE.smallest())[None]
    # Resolution of 2; stage 1: two slots of 1 + 2; stage 2: two slots of 3 + 2.
    parts = ([1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0])
    assert one_hot(SPACE, smallest)[0].tolist() == [x for part in parts for x in part]


@pytest.mark.parametrize("width", [1.0, 1.2])
def test_the_published_space_has_the_published_features(width: float) -> None:
    space = mbv3.imagenet(width=width)
    rows = space.sample(2, np.random.default_rng(0))
    assert feature_count(space) == 3 * 20 * 2 + 25
    assert one_hot(space, rows).shape == (2, 3 * 20 * 2 + 25)


# -- the accuracy predictor ------------------------------------------------------------


def test_the_predictor_ranks_networks_that_it_has_not_seen() -> None:
    predicted, true = tiny.predictor().predict(ALL), tiny.accuracy_of(SPACE, ALL)
    assert np.corrcoef(predicted, true)[0, 1] > 0.9


def test_fitting_repeats_with_its_seed() -> None:
    first, again = (
        fit_accuracy_predictor(
            SPACE,
            tiny.sample(),
            rng=np.random.default_rng(5),
            members=1,
            epochs=3,
        )[0].predict(ALL[:20])
        for _ in range(2)
    )
    assert np.array_equal(first, again)


def test_residuals_are_judged_on_networks_that_were_left_out() -> None:
    predictor, held_out = fit_accuracy_predictor(
        SPACE, tiny.sample(), rng=np.random.default_rng(5), members=1, epochs=3
    )
    sample = tiny.sample()
    residual = predictor.predict(sample.genomes[held_out]) - sample.accuracy[held_out]
    assert predictor.residual_std == pytest.approx(np.sqrt((residual**2).mean()))


@pytest.mark.parametrize("count", [1, 2])
def test_a_predictor_of_hardly_any_networks_can_be_kept(count: int) -> None:
    sample = tiny.sample()
    few = replace(
        sample, genomes=sample.genomes[:count], accuracy=sample.accuracy[:count]
    )
    predictor, _ = fit_accuracy_predictor(
        SPACE, few, rng=np.random.default_rng(5), members=1, epochs=3
    )
    back = AccuracyPredictor.from_arrays(SPACE, predictor.to_arrays())
    assert back.residual_std == pytest.approx(predictor.residual_std)


def test_a_predictor_survives_its_arrays() -> None:
    predictor = tiny.predictor()
    back = AccuracyPredictor.from_arrays(SPACE, predictor.to_arrays())
    np.testing.assert_allclose(back.predict(ALL), predictor.predict(ALL), rtol=1e-6)


def test_an_ensemble_predicts_the_mean_of_its_members() -> None:
    ensemble, _ = fit_accuracy_predictor(
        SPACE, tiny.sample(), rng=np.random.default_rng(5), members=2, epochs=2
    )
    members = [
        replace(ensemble, weights=(member,)).predict(ALL) for member in ensemble.weights
    ]
    np.testing.assert_allclose(ensemble.predict(ALL), np.mean(members, axis=0))


def only(config: SubnetConfig) -> SearchSpace:
    """The space of one network."""
    stages = tuple(
        replace(
            stage,
            kernels=(blocks[0].kernel,),
            expands=(blocks[0].expand,),
            depths=(len(blocks),),
        )
        for stage, blocks in zip(SPACE.stages, config.stages, strict=True)
    )
    return replace(SPACE, resolutions=(config.resolution,), stages=stages)


def test_a_space_of_one_network_is_searched_to_its_end() -> None:
    space = only(SPACE.largest())
    assert space.count() == 1
    asked: list[int] = []

    def ones(genomes: Genomes) -> NDArray[np.float64]:
        asked.append(len(genomes))
        return np.ones(len(genomes))

    whole = within_latency(space, accuracy=ones, latency_ms=ones, budget_ms=1.0)
    result = QUICK.search(whole, np.random.default_rng(0))
    assert len(result.genomes) == 1
    assert len(result.best_by_generation) == QUICK.generations + 1
    assert min(asked) >= 1


def test_a_population_of_one_still_finds_a_network() -> None:
    lonely = Evolution(population=1, generations=5)
    result = lonely.search(problem(budget_at(0.5)), np.random.default_rng(0))
    assert (latency_ms(result.genomes) <= budget_at(0.5)).all()
