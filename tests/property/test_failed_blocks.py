"""Blocks that a runtime fails on: whatever is chosen has none of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ofa_deploy.choosing import Chooser, PredictedLimits, Predictors, find_front
from ofa_deploy.constraints import Constraints
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.feasibility import feasibility, reachable_range
from ofa_deploy.plan import all_blocks, lower
from ofa_deploy.predict.block_costs import sample_runnable, table_blocks
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.predict.sizes import network_sizes
from ofa_deploy.profiling import calibration_networks
from ofa_deploy.report.facts import left_out
from ofa_deploy.search.evolution import Evolution
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.search.pareto import Nsga2, exhaustive_front
from ofa_deploy.space import SubnetConfig
from profilers import LatencyTable
from tests.support import tiny

SPACE = tiny.SPACE
ALL = enumerate_genomes(SPACE)
BLOCKS = sorted(all_blocks(SPACE))
KEYS = [{block.key for block in lower(SPACE, SPACE.decode(row)).blocks} for row in ALL]
SIZES = network_sizes(SPACE)
WHOLE = tiny.latency_table(
    SPACE,
    networks=[SPACE.decode(row) for row in ALL],
    network_ms=lambda config: sum(map(tiny.work_ms, lower(SPACE, config).blocks)),
)


def runnable(failed: set[str]) -> NDArray[np.bool_]:
    return np.array([not keys & failed for keys in KEYS])


failures = st.sets(st.sampled_from(BLOCKS), max_size=8).filter(
    lambda failed: runnable(failed).sum() >= 2
)


def table(failed: set[str]) -> LatencyTable:
    """Of all networks, those with failed blocks too: none of these may count."""
    return replace(
        WHOLE,
        blocks={key: one for key, one in WHOLE.blocks.items() if key not in failed},
        failures=dict.fromkeys(failed, "it crashed"),
    )


def predictors(failed: set[str]) -> Predictors:
    return Predictors(
        latency=fit_latency_predictor(SPACE, table(failed)),
        accuracy=tiny.predictor().predict,
        sizes=SIZES,
    )


@settings(max_examples=25, deadline=None)
@given(failures)
def test_exactly_networks_with_a_failed_block_cost_infinitely_much(
    failed: set[str],
) -> None:
    latency = predictors(failed).latency
    found = latency.predict_ms(ALL)
    np.testing.assert_array_equal(np.isfinite(found), runnable(failed))
    assert found[np.isfinite(found)].min() == pytest.approx(
        latency.predict_ms(latency.fastest()[None])[0]
    )


@settings(max_examples=25, deadline=None)
@given(failures)
def test_a_predictor_is_calibrated_by_what_runs(failed: set[str]) -> None:
    known = left_out(SPACE, table(failed))
    expected = {SPACE.decode(row).id for row in ALL[runnable(failed)]}
    assert set(known.names) == expected
    np.testing.assert_allclose(known.predicted_ms, known.measured_ms, rtol=0.2)


@settings(max_examples=25, deadline=None)
@given(failures, st.integers(0, 2**32 - 1))
def test_networks_to_measure_are_drawn_of_what_runs(
    failed: set[str], seed: int
) -> None:
    costs = table_blocks(SPACE, table(failed))
    rng = np.random.default_rng(seed)
    drawn = sample_runnable(SPACE, costs, 200, rng)
    chosen = calibration_networks(SPACE, costs, count=12, rng=rng).every
    able = {SPACE.decode(row).id for row in ALL[runnable(failed)]}
    assert {SPACE.decode(row).id for row in drawn} <= able
    assert {config.id for config in chosen} <= able
    assert len({config.id for config in chosen}) == len(chosen)
    # Where the draw finds few of them, so does what is chosen from it.
    assert len(chosen) == min(12, len(able)) or len(able) > len(drawn)


def test_a_choice_that_fails_everywhere_leaves_as_many_networks_to_draw() -> None:
    # Of uniformly drawn networks hardly one in ten is without these.
    failed = {
        block.key
        for block in all_blocks(SPACE).values()
        if any(getattr(layer, "kernel", 0) in (5, 7) for layer in block.layers)
    }
    assert runnable(failed).any()
    costs = table_blocks(SPACE, table(failed))
    drawn = sample_runnable(SPACE, costs, 500, np.random.default_rng(0))
    assert len(drawn) == 500


@settings(max_examples=10, deadline=None)
@given(failures)
def test_the_front_is_that_of_what_runs(failed: set[str]) -> None:
    known = predictors(failed)
    front = find_front(known, Nsga2(population=40, generations=20, polish=20_000))
    able = ALL[runnable(failed)]
    whole = exhaustive_front(able, known.costs(able))
    # Predictions in float32 differ in the last digits by how many are made together.
    for one, other in ((front.costs, whole.costs), (whole.costs, front.costs)):
        beyond = other[None, :, :] > one[:, None, :] * (1 + 1e-5)
        assert np.logical_not(beyond.any(axis=2)).any(axis=1).all()


@settings(max_examples=15, deadline=None)
@given(failures, st.floats(0, 1), st.sets(st.sampled_from(["ms", "bytes", "memory"])))
@pytest.mark.parametrize("least", [None, 0.5])
def test_what_is_chosen_runs(
    least: float | None, failed: set[str], place: float, limited: set[str]
) -> None:
    known = predictors(failed)
    able = ALL[runnable(failed)]
    values: dict[str, Any] = {
        "ms": known.latency.predict_ms(able),
        "bytes": SIZES.weight_bytes(able),
        "memory": SIZES.memory_bytes(able),
    }
    upper = {name: float(np.quantile(values[name], place)) for name in limited}
    limits = PredictedLimits(
        latency_ms=upper.get("ms"),
        weight_bytes=upper.get("bytes"),
        memory_bytes=upper.get("memory"),
        min_accuracy=None
        if least is None
        else float(np.quantile(known.accuracy(able), least)),
    )
    assume(limits != PredictedLimits())
    search = Nsga2(population=20, generations=5, polish=500)
    front = find_front(known, search)
    # From the front, and by the search that takes over where it offers nothing.
    for offered in (front, replace(front, costs=np.full_like(front.costs, np.inf))):
        found = Chooser(
            predictors=known, front=offered, evolution=Evolution(generations=10)
        )
        try:
            chosen = found.best(limits, count=3)
        except InfeasibleBudget as error:
            chosen = [SubnetConfig.from_id(str(error.nearest))]
        rows = np.stack([SPACE.encode(config) for config in chosen])
        assert np.isfinite(known.latency.predict_ms(rows)).all()


@settings(max_examples=15, deadline=None)
@given(failures)
def test_what_can_be_reached_is_that_of_what_runs(failed: set[str]) -> None:
    known = predictors(failed)
    able = ALL[runnable(failed)]
    latency_ms = known.latency.predict_ms(able)
    reached = reachable_range(known.latency)
    assert reached.fastest_ms == pytest.approx(latency_ms.min())
    assert reached.slowest_ms <= latency_ms.max() * (1 + 1e-9)
    for row in feasibility(
        Constraints(latency_ms=1.0),
        latency=known.latency,
        accuracy=known.accuracy,
        sizes=SIZES,
    ):
        assert np.isfinite([row.best, row.median, row.worst]).all()
        nearest = SPACE.encode(SubnetConfig.from_id(row.nearest))[None]
        assert np.isfinite(known.latency.predict_ms(nearest)).all()
