"""The closed loop, on devices that are made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.choosing import Chooser
from ofa_deploy.constraints import MEGABYTE, Constraints
from ofa_deploy.contract import (
    LADDER,
    LONGEST_CALL_S,
    MAX_CERTIFIED,
    MAX_LADDERS,
    PATIENCE_S,
    fulfil,
)
from ofa_deploy.errors import (
    InfeasibleBudget,
    RunFailed,
    StaleTable,
    UnstableMeasurement,
)
from ofa_deploy.evidence import EXPECTED_RATIO, Confirmed
from ofa_deploy.feasibility import reachable_range
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.space import SubnetConfig
from tests.support import made_up_bench, tiny
from tests.support.made_up_bench import MEMORY_OVERHEAD_MB, MadeUpBench

ALL = enumerate_genomes(tiny.SPACE)


@lru_cache(maxsize=1)
def chooser() -> Chooser:
    return made_up_bench.chooser()


def predicted_ms(config: SubnetConfig) -> float:
    return chooser().predictors.latency.estimate(config).ms


def budget_at(place: float) -> float:
    """Between the fastest and the slowest prediction, evenly by ratio."""
    reached = reachable_range(chooser().predictors.latency)
    ratio = reached.slowest_ms / reached.fastest_ms
    return float(reached.fastest_ms * ratio**place)


def bench(
    constraints: Constraints,
    *,
    factor: float = 1.0,
    certified: Callable[[int], float] = lambda count: 1.0,
) -> MadeUpBench:
    return MadeUpBench(
        predictors=chooser().predictors,
        constraints=constraints,
        quiet=lambda config: factor * predicted_ms(config),
        certified=certified,
    )


def run(device: MadeUpBench, *, step_s: float = 0.0) -> VerifiedNetwork:
    """What a call finds; `step_s` pass from each look at the clock to the next."""
    now_s = itertools.count(step=step_s)
    return fulfil(
        device.constraints,
        chooser=chooser(),
        bench=device,
        where="a made-up device",
        clock_s=lambda: next(now_s),
    )


def accuracies() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return chooser().predictors.accuracy(ALL)


# -- a device that is what its table says ----------------------------------------------


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_device_as_predicted_gives_the_best_network_within_the_budget(
    place: float,
) -> None:
    budget_ms = budget_at(place)
    device = bench(Constraints(latency_ms=budget_ms))
    found = run(device)
    latency = chooser().predictors.latency.predict_ms(ALL)
    # What a certified bound usually adds is left free.
    best = accuracies()[latency * 1.02 <= budget_ms].max()
    assert found.accuracy.value >= best - 1e-6
    assert found.met


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_device_as_expected_takes_one_certified_network(place: float) -> None:
    device = bench(
        Constraints(latency_ms=budget_at(place)), certified=lambda count: EXPECTED_RATIO
    )
    run(device)
    assert len(device.tried) == 1


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.1, 1.5, 2.0])
def test_a_device_that_is_off_its_table_is_learnt(factor: float) -> None:
    budget_ms = budget_at(0.6)
    device = bench(Constraints(latency_ms=budget_ms), factor=factor)
    found = run(device)
    latency = factor * chooser().predictors.latency.predict_ms(ALL)
    best = accuracies()[latency * 1.02 <= budget_ms].max()
    assert found.accuracy.value >= best - 0.01


@pytest.mark.parametrize("excess", [0.7, 1.05, 1.3])
def test_what_certifying_adds_is_learnt(excess: float) -> None:
    budget_ms = budget_at(0.6)
    device = bench(Constraints(latency_ms=budget_ms), certified=lambda count: excess)
    found = run(device)
    latency = excess * chooser().predictors.latency.predict_ms(ALL)
    best = accuracies()[latency * 1.02 <= budget_ms].max()
    assert found.accuracy.value >= best - 0.01


# -- laws ------------------------------------------------------------------------------

# Certified over confirmed, of one network after the other; the last one stays.
excesses = st.lists(st.floats(0.5, 4), min_size=1, max_size=8)
places = st.floats(0.01, 1)
factors = st.floats(0.4, 3)


def drifting(place: float, factor: float, by_try: list[float]) -> MadeUpBench:
    return bench(
        Constraints(latency_ms=budget_at(place)),
        factor=factor,
        certified=lambda count: by_try[min(count, len(by_try) - 1)],
    )


@settings(max_examples=40, deadline=None)
@given(places, factors, excesses)
@example(0.5, 1.0, [4.0, 0.5, 4.0])
def test_no_network_is_confirmed_or_certified_twice(
    place: float, factor: float, by_try: list[float]
) -> None:
    device = drifting(place, factor, by_try)
    with suppress(InfeasibleBudget):
        run(device)
    tried = [found.config.id for found in device.tried]
    assert len(set(tried)) == len(tried) <= MAX_CERTIFIED
    assert len(set(device.confirmed)) == len(device.confirmed)
    assert len(device.confirmed) <= MAX_LADDERS * len(LADDER) + 1
    assert set(tried) <= set(device.confirmed)


@settings(max_examples=40, deadline=None)
@given(places, factors, excesses)
@example(0.5, 1.0, [4.0, 0.5, 4.0])
def test_a_budget_is_refused_exactly_if_every_certified_network_exceeds_it(
    place: float, factor: float, by_try: list[float]
) -> None:
    device = drifting(place, factor, by_try)
    try:
        found = [run(device)]
    except InfeasibleBudget:
        found = []
    assert all(network.met for network in found)
    assert bool(found) == any(network.met for network in device.tried)


@settings(max_examples=40, deadline=None)
@given(places, factors, excesses)
def test_of_certified_networks_that_fit_the_most_accurate_is_returned(
    place: float, factor: float, by_try: list[float]
) -> None:
    device = drifting(place, factor, by_try)
    try:
        found = run(device)
    except InfeasibleBudget:
        return
    met = [network.accuracy.value for network in device.tried if network.met]
    assert found.accuracy.value == max(met)


@settings(max_examples=40, deadline=None)
@given(places, factors, excesses)
def test_a_refusal_names_the_least_latency_that_was_certified(
    place: float, factor: float, by_try: list[float]
) -> None:
    device = drifting(place, factor, by_try)
    try:
        run(device)
    except InfeasibleBudget as error:
        refusal = error
    else:
        return
    if not device.tried:  # refused by prediction
        assert refusal.fastest_ms is not None
        return
    least = min(device.tried, key=lambda network: network.verdict("latency").bound)
    assert refusal.fastest_ms == least.verdict("latency").bound
    assert refusal.nearest == least.config.id


# -- other constraints -----------------------------------------------------------------


def test_an_accuracy_to_keep_gives_the_fastest_network_that_does() -> None:
    least = float(np.quantile(accuracies(), 0.7))
    device = bench(Constraints(min_accuracy=least))
    found = run(device)
    latency = chooser().predictors.latency.predict_ms(ALL)
    fastest_ms = latency[accuracies() >= least].min()
    assert found.measurement.quiet_ms == pytest.approx(fastest_ms)
    assert found.accuracy.value >= least


def test_a_size_is_kept_by_the_file_and_not_by_its_weights_alone() -> None:
    weights = chooser().predictors.sizes.weight_bytes(ALL)
    limit = round(float(np.median(weights)))
    constraints = Constraints(latency_ms=budget_at(1.0) * 2, size_bytes=limit)
    device = bench(constraints)
    found = run(device)
    assert device.size_bytes(found.config) <= limit
    fits = weights + made_up_bench.SIZE_OVERHEAD_BYTES <= limit
    assert found.accuracy.value >= accuracies()[fits].max() - 0.01


def test_a_size_alone_gives_the_most_accurate_network_within_it() -> None:
    weights = chooser().predictors.sizes.weight_bytes(ALL)
    limit = round(float(np.median(weights)))
    device = bench(Constraints(size_bytes=limit))
    found = run(device)
    (verdict,) = found.verdicts
    assert (verdict.constraint, verdict.met) == ("size", True)
    fits = weights + made_up_bench.SIZE_OVERHEAD_BYTES <= limit
    assert found.accuracy.value >= accuracies()[fits].max() - 0.01
    assert found.measurement.quiet_ms > 0  # measured, and limited by nothing


def test_a_memory_alone_gives_an_accurate_network_within_it() -> None:
    sizes = chooser().predictors.sizes

    def memory_mb(config: SubnetConfig) -> float:
        row = tiny.SPACE.encode(config)[None]
        return float(sizes.memory_bytes(row)[0]) / MEGABYTE + MEMORY_OVERHEAD_MB

    needed_mb = sizes.memory_bytes(ALL) / MEGABYTE + MEMORY_OVERHEAD_MB
    limit_mb = float(np.quantile(needed_mb, 0.6))
    device = bench(Constraints(peak_memory_mb=limit_mb))
    device.memory_mb = memory_mb
    found = run(device)
    assert memory_mb(found.config) <= limit_mb
    best = accuracies()[needed_mb <= limit_mb].max()
    assert found.accuracy.value >= best - 0.02


@pytest.mark.parametrize("latency_ms", [None, 1e4])
def test_a_size_that_files_overhead_exceeds_names_the_nearest(
    latency_ms: float | None,
) -> None:
    weights = chooser().predictors.sizes.weight_bytes(ALL)
    limit = round(float(weights.min())) + 1
    device = bench(Constraints(latency_ms=latency_ms, size_bytes=limit))
    with pytest.raises(InfeasibleBudget) as caught:
        run(device)
    assert caught.value.nearest in device.confirmed
    nearest = SubnetConfig.from_id(str(caught.value.nearest))
    assert device.size_bytes(nearest) == min(
        device.size_bytes(SubnetConfig.from_id(name)) for name in device.confirmed
    )
    assert str(caught.value) == (
        "no network of tiny keeps all limits on a made-up device here: the nearest, "
        f"{nearest.id}, exported and measured, has size "
        f"{device.size_bytes(nearest):,} bytes; {limit:,} bytes is asked for. Loosen "
        "that"
    )
    assert caught.value.budget_ms == latency_ms
    assert (caught.value.fastest_ms is None) == (latency_ms is None)


def test_memory_that_the_runtime_itself_takes_is_learnt() -> None:
    sizes = chooser().predictors.sizes

    def memory_mb(config: SubnetConfig) -> float:
        row = tiny.SPACE.encode(config)[None]
        return float(sizes.memory_bytes(row)[0]) / MEGABYTE + MEMORY_OVERHEAD_MB

    middle_mb = float(np.median(sizes.memory_bytes(ALL))) / MEGABYTE
    limit_mb = middle_mb + MEMORY_OVERHEAD_MB
    constraints = Constraints(latency_ms=budget_at(1.0) * 2, peak_memory_mb=limit_mb)
    device = bench(constraints)
    device.memory_mb = memory_mb
    found = run(device)
    assert memory_mb(found.config) <= limit_mb
    assert len(device.tried) >= 2  # the first one did not know


def test_no_network_that_keeps_everything_is_a_refusal_that_names_what_is_missed() -> (
    None
):
    constraints = Constraints(latency_ms=budget_at(0.5), peak_memory_mb=1.0)
    device = bench(constraints)
    device.memory_mb = lambda config: 50.0
    with pytest.raises(InfeasibleBudget, match=r"has memory 50 MB; 1 MB is asked for"):
        run(device)


@pytest.mark.parametrize("grows", [0.0, 1.0, 3.0])
def test_memory_that_grows_with_the_model_is_learnt(grows: float) -> None:
    sizes = chooser().predictors.sizes

    def memory_mb(config: SubnetConfig) -> float:
        row = tiny.SPACE.encode(config)[None]
        planned_mb = float(sizes.memory_bytes(row)[0]) / MEGABYTE
        return (1 + grows) * planned_mb + MEMORY_OVERHEAD_MB

    planned_mb = sizes.memory_bytes(ALL) / MEGABYTE
    needed_mb = (1 + grows) * planned_mb + MEMORY_OVERHEAD_MB
    limit_mb = float(np.quantile(needed_mb, 0.3))
    constraints = Constraints(latency_ms=budget_at(1.0) * 2, peak_memory_mb=limit_mb)
    device = bench(constraints)
    device.memory_mb = memory_mb
    assert memory_mb(run(device).config) <= limit_mb


def test_an_accuracy_that_is_measured_lower_than_predicted_is_learnt() -> None:
    least = float(np.quantile(accuracies(), 0.6))
    device = bench(Constraints(min_accuracy=least))
    device.optimism = 0.01
    found = run(device)
    assert found.accuracy.kind == "measured"
    assert found.accuracy.value >= least
    assert len(device.tried) >= 2


# -- devices that fail -----------------------------------------------------------------


def test_networks_that_the_runtime_fails_on_are_left_out() -> None:
    constraints = Constraints(latency_ms=budget_at(0.6))
    best = run(bench(constraints)).config
    device = bench(constraints)
    device.broken = {best.id}
    found = run(device)
    assert found.met
    assert found.config != best
    assert device.confirmed.count(best.id) == 1


def test_networks_that_fail_give_way_to_the_next_best() -> None:
    # All that the first ladder offers fail; the next one must not offer them again.
    constraints = Constraints(latency_ms=budget_at(0.6))
    first = bench(constraints)
    run(first)
    device = bench(constraints)
    device.broken = set(first.confirmed)
    found = run(device)
    fastest = tiny.SPACE.decode(chooser().predictors.fastest())
    assert found.met
    assert found.config != fastest


def test_of_two_networks_that_fit_the_one_measured_more_accurate_is_kept() -> None:
    # Half of the budget is left, so a better one is tried; images say it is none.
    device = bench(Constraints(latency_ms=budget_at(0.6)), certified=lambda count: 0.5)
    device.optimism_of = lambda count: 0.05 * (count + 1)
    found = run(device)
    assert len(device.tried) >= 2
    assert found.accuracy.value == max(n.accuracy.value for n in device.tried)


@pytest.mark.parametrize(
    ("call_s", "tries"), [(0.0, 2), (PATIENCE_S / 4, 2), (PATIENCE_S / 2, 1)]
)
def test_nothing_better_is_begun_once_it_has_taken_long(
    call_s: float, tries: int
) -> None:
    # Half of the budget is left over, whatever is tried.
    device = bench(Constraints(latency_ms=budget_at(0.6)), certified=lambda count: 0.5)
    found = run(device, step_s=call_s * 1.01)
    assert found.met
    assert (len(device.tried) >= 2) == (tries >= 2)


def test_networks_that_miss_by_a_hair_give_way_to_one_with_room() -> None:
    # Whatever is certified comes out at 4 % above the last one's ratio, three times.
    device = bench(
        Constraints(latency_ms=budget_at(0.6)),
        certified=lambda count: 1.04 ** min(count + 1, 4),
    )
    found = run(device)
    assert found.met
    assert len(device.tried) < MAX_CERTIFIED
    fastest = tiny.SPACE.decode(chooser().predictors.fastest())
    assert found.config != fastest
    assert found.verdict("latency").used_share > 0.8


def test_what_fits_is_taken_if_nothing_between_can_be_timed() -> None:
    budget_ms = budget_at(0.6)
    device = bench(Constraints(latency_ms=budget_ms), factor=0.6)
    confirm = device.confirm
    calls: list[int] = []

    def once(configs: Sequence[SubnetConfig]) -> Mapping[str, Confirmed]:
        calls.append(len(configs))
        if len(calls) > 1:
            raise RunFailed("crashed")
        return confirm(configs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MadeUpBench, "confirm", lambda self, configs: once(configs))
        found = run(device)
    assert found.met
    assert len(calls) > 1


def test_a_ladder_that_offers_nothing_new_is_put_further_down() -> None:
    budget_ms = budget_at(0.8)
    device = bench(Constraints(latency_ms=budget_ms))

    def quiet(config: SubnetConfig) -> float:
        # As if whatever is near the budget happened to be timed in a slow moment.
        predicted = predicted_ms(config)
        near = predicted > 0.8 * budget_ms
        return max(predicted, 1.001 * budget_ms) if near else predicted

    device.quiet = quiet
    found = run(device)
    latency = chooser().predictors.latency.predict_ms(ALL)
    best = accuracies()[latency <= 0.7 * budget_ms].max()
    assert found.accuracy.value >= best - 1e-6


@pytest.mark.parametrize(("try_s", "tries"), [(0.0, 3), (LONGEST_CALL_S / 2, 2)])
def test_the_last_try_that_there_is_time_for_has_all_the_room(
    try_s: float, tries: int
) -> None:
    # The device slows down by 4 % from try to try, three times.
    device = bench(
        Constraints(latency_ms=budget_at(0.6)),
        certified=lambda count: 1.04 ** min(count + 1, 4),
    )
    found = run(device, step_s=try_s * 1.01)  # asked before and after a try
    assert found.met
    assert (len(device.tried) <= 2) == (tries <= 2)


def test_a_file_that_was_given_up_does_not_frighten_off_the_next() -> None:
    # The bound of two processes is Student's: a spread of a percent makes it huge.
    device = bench(
        Constraints(latency_ms=budget_at(0.6)),
        certified=lambda count: 1.05 if count == 0 else 1.0,
    )
    device.error_ratio = lambda count: 0.3 if count == 0 else 0.0
    found = run(device)
    assert found.met
    assert found.verdict("latency").used_share > 0.85


def test_time_does_not_end_a_call_that_has_shown_nothing() -> None:
    device = bench(
        Constraints(latency_ms=budget_at(0.6)),
        certified=lambda count: 1.2 if count < 2 else 1.0,
    )
    found = run(device, step_s=PATIENCE_S)
    assert found.met
    assert len(device.tried) >= 2


@pytest.mark.parametrize("measured_mb", [0.0, 50.0])
def test_memory_that_says_nothing_of_the_model_is_survived(measured_mb: float) -> None:
    limit_mb = 40.0
    constraints = Constraints(latency_ms=budget_at(0.5), peak_memory_mb=limit_mb)
    device = bench(constraints)
    # Hardly grows: a line through two such networks leads far below nothing.
    device.memory_mb = lambda config: measured_mb + 1e-9 * len(config.id)
    if measured_mb > limit_mb:
        with pytest.raises(InfeasibleBudget):
            run(device)
    else:
        assert run(device).met


def test_limits_that_only_the_predictors_error_may_let_in_are_measured() -> None:
    fastest_ms = budget_at(0.0)
    size = 10**9  # binds nothing
    constraints = Constraints(latency_ms=fastest_ms * 1.002, size_bytes=size)
    device = bench(constraints, factor=0.95)
    assert run(device).met


def test_a_refusal_of_several_limits_tells_what_was_asked_for() -> None:
    constraints = Constraints(latency_ms=budget_at(0.0) * 0.5, size_bytes=10**9)
    with pytest.raises(InfeasibleBudget) as caught:
        run(bench(constraints))
    assert f"latency {constraints.latency_ms:.4g} ms" in str(caught.value)
    assert "size 1,000,000,000 bytes" in str(caught.value)
    assert str(caught.value.nearest) in str(caught.value)


def test_a_device_that_runs_nothing_is_refused_without_a_certified_network() -> None:
    device = bench(Constraints(latency_ms=budget_at(0.6)))
    device.broken = {tiny.SPACE.decode(row).id for row in ALL}
    with pytest.raises(InfeasibleBudget) as caught:
        run(device)
    assert str(caught.value) == (
        f"no network of tiny runs on a made-up device here: all "
        f"{len(set(device.confirmed))} that were tried failed. See `ofa-deploy doctor`"
    )


def test_a_network_that_fails_when_certified_gives_way_to_the_next() -> None:
    constraints = Constraints(latency_ms=budget_at(0.6))
    best = run(bench(constraints)).config
    device = bench(constraints)
    device.breaking = {best.id}
    found = run(device)
    assert found.met
    assert device.failed == [best.id]
    # Not some small network: one of those that were ready.
    assert found.verdict("latency").used_share > 0.8


@settings(max_examples=40, deadline=None)
@given(places, factors, excesses, st.sets(st.integers(0, len(ALL) - 1), min_size=400))
def test_no_network_that_failed_is_tried_again_and_a_failure_is_told_if_all_fail(
    place: float, factor: float, by_try: list[float], breaking: set[int]
) -> None:
    device = drifting(place, factor, by_try)
    device.breaking = {tiny.SPACE.decode(ALL[index]).id for index in breaking}
    told = ""
    try:
        assert run(device).met
    except InfeasibleBudget:
        pass
    except RunFailed as failure:
        told = str(failure)
    all_failed = bool(device.failed) and not device.tried
    assert told == (f"{device.failed[0]} crashed" if all_failed else "")
    every = device.failed + [found.config.id for found in device.tried]
    assert len(set(every)) == len(every) <= MAX_CERTIFIED


def test_a_refusal_says_that_the_runtime_failed_on_others() -> None:
    constraints = Constraints(latency_ms=budget_at(0.6))
    device = bench(constraints, certified=lambda count: 50.0)
    device.breaking = {run(bench(constraints)).config.id}
    with pytest.raises(InfeasibleBudget) as caught:
        run(device)
    assert str(caught.value).endswith(
        f"Besides, a made-up device failed on 1 others: {device.failed[0]} crashed"
    )


@pytest.mark.parametrize("where", ["certify", "confirm"])
@pytest.mark.parametrize(
    "failure",
    [
        RunFailed("it crashed"),
        StaleTable("it is slower", ratio=1.2),
        UnstableMeasurement("none could be measured"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_device_that_fails_half_way_leaves_what_was_shown(
    failure: Exception, where: str
) -> None:
    # The first network uses so little that a better one is looked for.
    device = bench(Constraints(latency_ms=budget_at(0.6)), certified=lambda count: 0.5)
    device.fails_after, device.failure, device.fails_to = 1, failure, where
    found = run(device)
    assert found.met
    assert [network.config for network in device.tried] == [found.config]


def test_a_device_that_fails_at_once_says_why() -> None:
    device = bench(Constraints(latency_ms=budget_at(0.6)))
    device.fails_after, device.failure = 0, RunFailed("it crashed")
    with pytest.raises(RunFailed, match="it crashed"):
        run(device)


def test_what_was_measured_on_the_way_is_kept() -> None:
    device = bench(Constraints(latency_ms=budget_at(0.6)), certified=lambda count: 1.3)
    found = run(device)
    assert [candidate.config_id for candidate in found.candidates] == device.confirmed
    bounds = {
        candidate.config_id: candidate.certified_ms
        for candidate in found.candidates
        if candidate.certified_ms is not None
    }
    assert bounds == {
        network.config.id: network.verdict("latency").bound for network in device.tried
    }


def test_a_budget_just_below_the_fastest_prediction_is_measured() -> None:
    fastest_ms = budget_at(0.0)
    device = bench(Constraints(latency_ms=fastest_ms * 0.99), factor=0.95)
    assert run(device).met


@pytest.mark.parametrize("percentile", [90, 95, 99])
def test_a_percentile_is_kept_by_all_runs(percentile: int) -> None:
    device = bench(Constraints(latency_ms=budget_at(0.6), percentile=percentile))
    device.spread = 0.2
    found = run(device)
    quiet_ms = found.measurement.quiet_ms
    # Runs take up to a fifth longer than the quiet latency, evenly.
    assert found.verdict("latency").found == pytest.approx(
        quiet_ms * (1 + 0.2 * percentile / 100), rel=1e-3
    )
    assert found.verdict("latency").bound <= budget_at(0.6)


@pytest.mark.parametrize("share", [None, 0.2])
def test_a_rate_is_a_budget_by_itself(share: float | None) -> None:
    slowest_ms = budget_at(1.0)
    least = None if share is None else float(np.quantile(accuracies(), share))
    asked = Constraints(min_accuracy=least, rate_hz=1000 / slowest_ms)
    assert asked.budget_ms == pytest.approx(slowest_ms)
    assert run(bench(asked)).verdict("latency").limit == asked.budget_ms
