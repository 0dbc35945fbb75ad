from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ofa_deploy.errors import UnmeasuredBlock
from ofa_deploy.families import mbv3
from ofa_deploy.plan import all_blocks, lower
from ofa_deploy.predict import latency
from ofa_deploy.predict.block_costs import BlockCosts, features, look_up_blocks
from ofa_deploy.predict.latency import (
    LEAST_RANDOM,
    LatencyPredictor,
    ResidualRatios,
    fit_latency_predictor,
    price_list,
)
from ofa_deploy.profiling import calibration_networks
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.space import SearchSpace, SubnetConfig
from profilers import LatencyTable
from tests.support import tiny
from tests.support.tiny import work_ms

SMALL = mbv3.small()
CONSTANT_MS = 0.01
# What stem and head, then each stage, cost in a network, of what they cost alone.
TRUE_SHARES = (0.9, 0.8, 0.7, 0.85)


def stage_sums_ms(space: SearchSpace, config: SubnetConfig) -> list[float]:
    """Stem and head, then each stage, by adding blocks one by one."""
    sums = [0.0] * (1 + len(space.stages))
    for block in lower(space, config).blocks:
        stage = int(block.name[5]) if block.name.startswith("stage") else 0
        sums[stage] += work_ms(block)
    return sums


def true_ms(space: SearchSpace) -> Callable[[SubnetConfig], float]:
    def latency(config: SubnetConfig) -> float:
        sums = stage_sums_ms(space, config)
        return CONSTANT_MS + sum(
            share * ms for share, ms in zip(TRUE_SHARES, sums, strict=False)
        )

    return latency


def table(space: SearchSpace, *, network_count: int = 48) -> LatencyTable:
    rng = np.random.default_rng(0)
    found = calibration_networks(space, costs(space), count=network_count, rng=rng)
    return tiny.latency_table(space, networks=found.every, network_ms=true_ms(space))


def fitted(space: SearchSpace) -> LatencyPredictor:
    return fit_latency_predictor(space, table(space))


@pytest.mark.parametrize("space", [tiny.SPACE, SMALL], ids=lambda s: s.name)
def test_weighted_stage_sums_are_recovered_within_a_percent(
    space: SearchSpace,
) -> None:
    predictor = fitted(space)
    drawn = space.sample(200, np.random.default_rng(9))
    truth = np.array([true_ms(space)(space.decode(row)) for row in drawn])
    np.testing.assert_allclose(predictor.predict_ms(drawn), truth, rtol=0.01)


def test_what_blocks_are_worth_may_change_with_the_resolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A tenth less at its least resolution, and more at its largest.
    space = replace(SMALL, resolutions=(24, 30, 32))

    def truth_ms(config: SubnetConfig) -> float:
        return true_ms(space)(config) * (1 + 0.1 * (config.resolution - 28) / 4)

    found = calibration_networks(
        space, costs(space), count=180, rng=np.random.default_rng(0)
    )
    known = tiny.latency_table(space, networks=found.every, network_ms=truth_ms)
    drawn = space.sample(200, np.random.default_rng(9))
    truth = np.array([truth_ms(space.decode(row)) for row in drawn])
    predicted = fit_latency_predictor(space, known).predict_ms(drawn)
    np.testing.assert_allclose(predicted, truth, rtol=0.02)
    monkeypatch.setattr(latency, "RESOLUTION_PRIOR_STRENGTH", 1e9)
    fixed = fit_latency_predictor(space, known).predict_ms(drawn)
    assert np.abs(fixed / truth - 1).max() > 0.02


def test_a_space_of_one_resolution_is_predicted_as_well() -> None:
    space = replace(SMALL, resolutions=(32,))
    predictor = fitted(space)
    drawn = space.sample(200, np.random.default_rng(9))
    truth = np.array([true_ms(space)(space.decode(row)) for row in drawn])
    np.testing.assert_allclose(predictor.predict_ms(drawn), truth, rtol=0.01)


def costs(space: SearchSpace) -> BlockCosts:
    return look_up_blocks(
        space, {key: work_ms(block) for key, block in all_blocks(space).items()}
    )


def features_by_hand(space: SearchSpace, config: SubnetConfig) -> list[float]:
    plan = lower(space, config)
    return [
        1.0,
        *stage_sums_ms(space, config),
        plan.mac_count / 1e6,
        plan.parameter_count / 1e6,
        sum(block.activation_count for block in plan.blocks) / 1e6,
        float(len(plan.blocks)),
    ]


@pytest.mark.parametrize("space", [tiny.SPACE, SMALL], ids=lambda s: s.name)
def test_features_are_the_sums_done_by_hand(space: SearchSpace) -> None:
    drawn = space.sample(50, np.random.default_rng(1))
    expected = [features_by_hand(space, space.decode(row)) for row in drawn]
    np.testing.assert_allclose(features(space, costs(space), drawn), expected)


def test_activations_are_counted_layer_by_layer() -> None:
    block = lower(SMALL, SMALL.largest()).blocks[-1]  # at 4x4: 640, pool, 512, classes
    assert block.activation_count == 640 * 16 + 640 + 512 + 10


def test_many_networks_at_once_are_predicted_as_one_by_one() -> None:
    predictor = fitted(tiny.SPACE)
    genomes = enumerate_genomes(tiny.SPACE)
    together = predictor.predict_ms(genomes)
    alone = [predictor.estimate(tiny.SPACE.decode(row)).ms for row in genomes]
    np.testing.assert_allclose(together, alone)


@pytest.mark.parametrize("space", [tiny.SPACE, SMALL], ids=lambda s: s.name)
def test_a_prediction_is_the_weighted_sum_of_the_features(space: SearchSpace) -> None:
    count = len(features_by_hand(space, space.largest()))
    base, slopes = np.random.default_rng(2).uniform(0.5, 1.5, (2, count))
    predictor = price_list(
        space,
        costs(space),
        np.concatenate([base, slopes]),
        residuals=ResidualRatios(rms=0.1, low=0.8, high=1.2, upper=1.15, count=100),
    )
    drawn = space.sample(200, np.random.default_rng(3))
    resolutions = np.array(space.resolutions)[drawn[:, 0]]
    low, high = space.resolutions[0], space.resolutions[-1]
    # From -1 at the least resolution to 1 at the largest.
    place = (2 * resolutions - low - high) / max(high - low, 1)
    found = features(space, costs(space), drawn)
    expected = found @ base + place * (found @ slopes)
    np.testing.assert_allclose(predictor.predict_ms(drawn), expected)


def noisy_predictor(seed: int) -> LatencyPredictor:
    """Fitted to networks measured with an error of 3 %."""
    exact = table(tiny.SPACE, network_count=60)
    rng = np.random.default_rng(seed)
    networks = {
        name: tiny.measurement(name, m.quiet_ms * (1 + 0.03 * rng.standard_normal()))
        for name, m in exact.networks.items()
    }
    return fit_latency_predictor(tiny.SPACE, replace(exact, networks=networks))


@pytest.mark.parametrize("seed", range(3))
def test_the_residual_is_about_the_measurements_own_error(seed: int) -> None:
    assert 0.02 < noisy_predictor(seed).residual_ratio < 0.05


def test_the_interval_lies_around_the_prediction() -> None:
    estimate = noisy_predictor(0).estimate(tiny.SPACE.largest())
    assert estimate.low_ms < estimate.ms < estimate.high_ms


def test_nearly_all_true_latencies_lie_in_their_intervals() -> None:
    predictor = noisy_predictor(0)
    inside = []
    for row in enumerate_genomes(tiny.SPACE):
        config = tiny.SPACE.decode(row)
        estimate = predictor.estimate(config)
        truth = true_ms(tiny.SPACE)(config)
        inside.append(estimate.low_ms <= truth <= estimate.high_ms)
    assert np.mean(inside) >= 0.95


def test_a_new_measurement_stays_below_the_upper_bound_as_often_as_promised() -> None:
    below = []
    for seed in range(20):
        predictor = noisy_predictor(seed)
        rng = np.random.default_rng(100 + seed)
        drawn = tiny.SPACE.sample(50, rng)
        truth = np.array([true_ms(tiny.SPACE)(tiny.SPACE.decode(r)) for r in drawn])
        measured = truth * (1 + 0.03 * rng.standard_normal(50))
        bound = predictor.predict_ms(drawn) * predictor.upper_ratio
        below.append(np.mean(measured <= bound))
    assert np.mean(below) >= 0.94


def worst_miss(*, told_error: float) -> float:
    """Of a fit to networks of which every fifth was measured a third too slow."""
    exact = table(tiny.SPACE, network_count=60)
    networks = dict(exact.networks)
    for name in sorted(networks)[::5]:
        networks[name] = replace(
            networks[name],
            quiet_ms=1.33 * networks[name].quiet_ms,
            standard_error_ratio=told_error,
        )
    predictor = fit_latency_predictor(tiny.SPACE, replace(exact, networks=networks))
    genomes = enumerate_genomes(tiny.SPACE)
    truth = np.array([true_ms(tiny.SPACE)(tiny.SPACE.decode(r)) for r in genomes])
    return float(np.abs(predictor.predict_ms(genomes) / truth - 1).max())


def test_what_was_not_measured_well_counts_less() -> None:
    assert worst_miss(told_error=0.3) < 0.02 < worst_miss(told_error=0.0)


def test_without_a_measured_difference_the_predictor_adds_plain_sums() -> None:
    def plain_ms(config: SubnetConfig) -> float:
        return sum(stage_sums_ms(tiny.SPACE, config))

    same = [tiny.SPACE.largest(), tiny.SPACE.smallest()]
    sums = tiny.latency_table(tiny.SPACE, networks=same, network_ms=plain_ms)
    predictor = fit_latency_predictor(tiny.SPACE, sums)
    drawn = enumerate_genomes(tiny.SPACE)
    expected = [plain_ms(tiny.SPACE.decode(row)) for row in drawn]
    np.testing.assert_allclose(predictor.predict_ms(drawn), expected)


def test_a_missing_block_is_named() -> None:
    whole = table(tiny.SPACE)
    missing = sorted(whole.blocks)[0]
    rest = {key: m for key, m in whole.blocks.items() if key != missing}
    with pytest.raises(UnmeasuredBlock) as caught:
        fit_latency_predictor(tiny.SPACE, replace(whole, blocks=rest))
    assert str(caught.value) == (
        f"block {missing} is not in the latency table; the table is of another space. "
        "Run `ofa-deploy profile` to measure this one"
    )


@pytest.mark.parametrize("key", sorted(all_blocks(tiny.SPACE)))
def test_no_block_may_be_missing(key: str) -> None:
    latency_ms = {k: work_ms(b) for k, b in all_blocks(tiny.SPACE).items() if k != key}
    with pytest.raises(UnmeasuredBlock, match=key):
        look_up_blocks(tiny.SPACE, latency_ms)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_networks_are_refused(count: int) -> None:
    whole = table(tiny.SPACE)
    few = dict(list(whole.networks.items())[:count])
    with pytest.raises(UnmeasuredBlock) as caught:
        fit_latency_predictor(tiny.SPACE, replace(whole, networks=few))
    assert str(caught.value) == (
        f"the table holds {count} whole networks; at least 2 are needed to calibrate. "
        "Run `ofa-deploy profile`"
    )


def test_calibration_networks_are_different_and_hold_the_extremes() -> None:
    rng = np.random.default_rng(0)
    found = calibration_networks(SMALL, costs(SMALL), count=20, rng=rng)
    assert len(set(found.every)) == len(found.every) == 20
    assert {SMALL.largest(), SMALL.smallest()} <= set(found.chosen)


def test_a_third_of_the_calibration_networks_is_drawn_whatever_they_cost() -> None:
    dearer = look_up_blocks(
        SMALL,
        {key: len(key) + work_ms(block) for key, block in all_blocks(SMALL).items()},
    )
    one, other = (
        calibration_networks(SMALL, prices, count=60, rng=np.random.default_rng(0))
        for prices in (costs(SMALL), dearer)
    )
    assert one.drawn == other.drawn
    assert len(one.drawn) == 20
    assert one.chosen != other.chosen


def test_random_networks_alone_say_how_far_off_predictions_are() -> None:
    rng = np.random.default_rng(0)
    found = calibration_networks(SMALL, costs(SMALL), count=150, rng=rng)
    drawn = [config.id for config in found.drawn]
    off = {name: float(rng.choice([0.9, 1.1])) for name in drawn}

    def network_ms(config: SubnetConfig) -> float:
        return true_ms(SMALL)(config) * off.get(config.id, 1.0)

    known = tiny.latency_table(SMALL, networks=found.every, network_ms=network_ms)
    by_all = fit_latency_predictor(SMALL, known).residuals
    by_drawn = fit_latency_predictor(
        SMALL, replace(known, random_networks=tuple(drawn))
    ).residuals
    assert by_drawn.rms == pytest.approx(0.1, rel=0.2)
    assert by_all.rms == pytest.approx(0.1 / math.sqrt(3), rel=0.3)
    some = fit_latency_predictor(
        SMALL, replace(known, random_networks=tuple(drawn[:LEAST_RANDOM]))
    ).residuals
    assert some.count == LEAST_RANDOM
    few = tuple(drawn[: LEAST_RANDOM - 1])
    assert (
        fit_latency_predictor(SMALL, replace(known, random_networks=few)).residuals
        == by_all
    )
