"""How devices are grouped, and what becomes of a network that misses on one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.choosing import Chooser
from ofa_deploy.constraints import Constraints
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.evidence import EXPECTED_RATIO
from ofa_deploy.feasibility import reachable_range
from ofa_deploy.fleet import MAX_TRIES, fulfil_together
from ofa_deploy.fleet_groups import Planner
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.space import SubnetConfig
from tests.support import made_up_bench, tiny
from tests.support.made_up_bench import Law, MadeUpBench


@st.composite
def planners(draw: st.DrawFn) -> Planner:
    count = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, 12))
    # Of budgets of which a part of the latencies fits.
    budgets_ms = draw(st.lists(st.floats(0.2, 1.0), min_size=count, max_size=count))
    return Planner(
        space=tiny.SPACE,
        budgets_ms={f"device {place}": ms for place, ms in enumerate(budgets_ms)},
        genomes=tiny.SPACE.sample(size, rng),
        accuracy=rng.uniform(0.5, 1.0, size),
        expected_ms=rng.uniform(0.01, 1.0, size=(size, count)),
    )


def partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """All ways to group items."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        for place, group in enumerate(smaller):
            yield [*smaller[:place], (first, *group), *smaller[place + 1 :]]
        yield [(first,), *smaller]


def worth(planner: Planner, groups: list[tuple[int, ...]]) -> float:
    return sum(len(group) * planner.best_accuracy(group) for group in groups)


@given(planners(), st.integers(1, 5))
def test_devices_are_grouped_as_well_as_can_be(planner: Planner, count: int) -> None:
    devices = tuple(range(len(planner.names)))
    best = max(
        worth(planner, groups) for groups in partitions(devices) if len(groups) <= count
    )
    if best == -np.inf:
        with pytest.raises(InfeasibleBudget):
            planner.groups(count)
        return
    groups = planner.groups(count)
    assert len(groups) <= count
    assert sorted(name for group in groups for name in group) == sorted(planner.names)
    indices = [tuple(planner.names.index(name) for name in group) for group in groups]
    assert worth(planner, indices) == pytest.approx(best)


def planner(*expected_ms: tuple[float, float]) -> Planner:
    """Of two devices, "a" with 1 ms and "b" with 2 ms."""
    return Planner(
        space=tiny.SPACE,
        budgets_ms={"a": 1.0, "b": 2.0},
        genomes=enumerate_genomes(tiny.SPACE)[: len(expected_ms)],
        accuracy=np.full(len(expected_ms), 0.9),
        expected_ms=np.array(expected_ms),
    )


def test_a_device_that_nothing_suits_is_told_what_it_can_have() -> None:
    found = planner((1.5, 1.0), (1.25, 3.0))
    with pytest.raises(InfeasibleBudget) as caught:
        found.groups(2)
    assert str(caught.value) == (
        "no network is expected to keep the budget of a; the fastest takes on a 1.25 "
        "ms (1 ms are asked for). Ask for more milliseconds there"
    )
    assert (caught.value.budget_ms, caught.value.fastest_ms) == (1.0, 1.25)
    assert caught.value.nearest == tiny.SPACE.decode(found.genomes[1]).id


def test_devices_that_need_more_models_are_told_what_each_can_have() -> None:
    found = planner((0.5, 2.5), (1.5, 1.75), (4.0, 1.5))
    with pytest.raises(InfeasibleBudget) as caught:
        found.groups(1)
    assert str(caught.value) == (
        "no network is expected to keep all budgets together; for itself the fastest "
        "takes on a 0.5 ms (1 ms are asked for), b 1.5 ms (2 ms are asked for). Allow "
        "more models, or ask for more milliseconds"
    )
    assert caught.value.nearest == tiny.SPACE.decode(found.genomes[0]).id
    assert len(found.groups(2)) == 2


# -- a group ---------------------------------------------------------------------------


@lru_cache(maxsize=1)
def chooser() -> Chooser:
    return made_up_bench.chooser()


def off_by(factor: float) -> Law:
    latency = chooser().predictors.latency
    return lambda config: factor * latency.estimate(config).ms


def group(budget_ms: float, slowdowns: dict[str, float]) -> tuple[Any, Any, Any]:
    """Sessions, budgets and benches of devices that are off their tables."""
    predictors = chooser().predictors
    session = SimpleNamespace(
        predictor=predictors.latency,
        predictors=predictors,
        supernet=SimpleNamespace(space=tiny.SPACE),
    )
    budgets_ms = dict.fromkeys(slowdowns, budget_ms)
    benches = {
        name: MadeUpBench(
            predictors=predictors,
            constraints=Constraints(latency_ms=budget_ms),
            quiet=off_by(factor),
        )
        for name, factor in slowdowns.items()
    }
    return dict.fromkeys(slowdowns, session), budgets_ms, benches


def middle_ms() -> float:
    return reachable_range(chooser().predictors.latency).middle_ms


def test_a_network_that_misses_on_one_device_is_replaced_for_all() -> None:
    sessions, budgets_ms, benches = group(middle_ms(), {"exact": 1.0, "slower": 1.2})
    networks = fulfil_together(sessions, budgets_ms, benches, seed=0)
    (config,) = {network.config for network in networks.values()}
    assert all(network.met for network in networks.values())
    # Not some small network: the slower device's budget is used.
    bound_ms = networks["slower"].verdict("latency").bound
    assert bound_ms >= 0.85 * middle_ms()
    assert len(benches["slower"].confirmed) > 1
    assert config.id == benches["slower"].confirmed[-1]


def test_a_network_that_certifying_finds_too_slow_is_replaced_for_all() -> None:
    """Confirmed it fits; what its own processes take is learnt, and goes on."""
    sessions, budgets_ms, benches = group(middle_ms(), {"exact": 1.0, "slower": 1.0})
    benches["slower"].certified = lambda count: 1.1 if count == 0 else 1.0
    networks = fulfil_together(sessions, budgets_ms, benches, seed=0)
    assert all(network.met for network in networks.values())
    tried = [network.config.id for network in benches["slower"].tried]
    assert 2 <= len(tried) <= MAX_TRIES
    (config,) = {network.config.id for network in networks.values()}
    assert config == tried[-1] != tried[0]
    assert networks["slower"].verdict("latency").used_share > 0.8


@pytest.mark.parametrize("slowdown", [3.0, 9.0])
def test_devices_that_nothing_satisfies_together_are_told(slowdown: float) -> None:
    budget_ms = middle_ms()
    sessions, budgets_ms, benches = group(budget_ms, {"exact": 1.0, "slow": slowdown})
    with pytest.raises(InfeasibleBudget) as caught:
        fulfil_together(sessions, budgets_ms, benches, seed=0)
    tried = benches["exact"].confirmed
    assert len(tried) <= MAX_TRIES
    predicted_ms = {
        name: off_by(EXPECTED_RATIO)(SubnetConfig.from_id(name)) for name in tried
    }
    nearest = min(tried, key=predicted_ms.__getitem__)
    assert caught.value.nearest == nearest
    assert str(caught.value) == (
        "no network was shown to keep the budgets of exact, slow together, of "
        f"{len(tried)} that were measured: the nearest, {nearest}, took up to "
        f"{predicted_ms[nearest]:.4g} ms on exact ({budget_ms:g} ms are asked for), "
        f"{slowdown * predicted_ms[nearest]:.4g} ms on slow ({budget_ms:g} ms are "
        "asked for). Ask for more milliseconds, or allow more models"
    )
