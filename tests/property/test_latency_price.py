"""Laws of the price in milliseconds, of latencies that no formula makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.shrink.channel_prices import (
    LatencyPrice,
    channel_grid,
    timed_layer,
    timed_layers,
)
from ofa_deploy.shrink.cost import Counts
from ofa_deploy.shrink.coupling import trace_channels
from ofa_deploy.shrink.groups import ChannelGraph
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.tas_price import ExpectedPrice
from tests.support import own_networks
from tests.support.searching import owned, picked, scattered, searched

SIZE, STEP = own_networks.SIZE, 4
seeds = st.integers(0, 10_000)


@lru_cache(maxsize=1)
def chain() -> ChannelGraph:
    """Of layers that read what one other writes: along each group prices are linear."""
    network = nn.Sequential(
        own_networks.conv(3, 32), own_networks.conv(32, 48, stride=2),
        own_networks.conv(48, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    return trace_channels(network, input_shape=(3, SIZE, SIZE))


@lru_cache(maxsize=1)
def depthwise() -> ChannelGraph:
    return trace_channels(own_networks.MobileNet(), input_shape=(3, SIZE, SIZE))


def measured(graph: ChannelGraph, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {key: float(rng.uniform(0.1, 1.0)) for key in timed_layers(graph, step=STEP)}


def priced(graph: ChannelGraph, seed: int) -> LatencyPrice:
    return LatencyPrice(
        graph,
        latency_ms=measured(graph, seed),
        step=STEP,
        scale=1.3,
        constant_ms=0.2,
    )


def at(price: LatencyPrice, counts: Sequence[float]) -> float:
    return float(price(torch.tensor(counts, dtype=torch.float64)))


def grids(graph: ChannelGraph) -> list[list[int]]:
    return [channel_grid(group.channels, step=STEP) for group in graph.groups]


@settings(max_examples=20, deadline=None)
@given(seeds, st.data(), st.sampled_from([chain, depthwise]))
def test_where_layers_were_measured_it_is_their_sum(
    seed: int, data: st.DataObject, of: object
) -> None:
    graph = chain() if of is chain else depthwise()
    counts = [data.draw(st.sampled_from(grid)) for grid in grids(graph)]
    latency_ms = measured(graph, seed)
    read, written = Counts(graph).of_layers(torch.tensor(counts))
    total = 0.0
    for layer, pair in zip(graph.layers, zip(read, written, strict=True), strict=True):
        block = timed_layer(layer, read=int(pair[0]), written=int(pair[1]))
        total += latency_ms.get(block.key, 0.0)  # a small classifier is not timed
    assert at(priced(graph, seed), counts) == pytest.approx(1.3 * total + 0.2)


@settings(max_examples=20, deadline=None)
@given(seeds, st.data(), st.floats(0.0, 1.0))
def test_between_two_points_it_is_between_their_prices(
    seed: int, data: st.DataObject, share: float
) -> None:
    price = priced(chain(), seed)
    counts: list[float] = [data.draw(st.sampled_from(grid)) for grid in grids(chain())]
    group = data.draw(st.integers(0, len(counts) - 1))
    low, high = data.draw(
        st.sampled_from(list(itertools.pairwise(grids(chain())[group])))
    )
    ends = []
    for count in (low, high):
        counts[group] = count
        ends.append(at(price, counts))
    counts[group] = low + share * (high - low)
    expected = ends[0] + share * (ends[1] - ends[0])
    assert at(price, counts) == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(seeds, st.data(), st.sampled_from([chain, depthwise]))
def test_its_gradient_is_that_of_finite_differences(
    seed: int, data: st.DataObject, of: object
) -> None:
    graph = chain() if of is chain else depthwise()
    price = priced(graph, seed)
    # Points of grids are whole numbers; between them nothing has a kink.
    values = [
        data.draw(st.integers(1, group.channels - 1)) + 0.5 for group in graph.groups
    ]
    counts = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(price(counts), counts)
    for index in range(len(values)):
        near = [
            [v + sign * 1e-4 * (k == index) for k, v in enumerate(values)]
            for sign in (-1, 1)
        ]
        slope = (at(price, near[1]) - at(price, near[0])) / 2e-4
        assert float(found[index]) == pytest.approx(slope, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(seeds, st.data())
def test_layers_priced_alone_are_what_the_network_is(
    seed: int, data: st.DataObject
) -> None:
    graph = depthwise()
    price = priced(graph, seed)
    counts = [float(data.draw(st.integers(1, g.channels))) for g in graph.groups]
    read, written = Counts(graph).of_layers(torch.tensor(counts))
    alone = sum(
        price.of_layer(place, float(read[place]), float(written[place]))
        for place in range(len(graph.layers))
    )
    assert at(price, counts) == pytest.approx(price.constant + alone)


# -- whole networks --------------------------------------------------------------------


def some_counts(graph: ChannelGraph, seed: int) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [
        torch.tensor([float(rng.integers(4, g.channels + 1)) for g in graph.groups])
        for _ in range(6)
    ]


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(0.3, 2.0), st.floats(0.0, 2.0))
def test_whole_networks_say_what_the_sum_of_layers_is_worth(
    seed: int, scale: float, constant_ms: float
) -> None:
    graph, counts = chain(), some_counts(chain(), seed)
    plain = LatencyPrice(graph, latency_ms=measured(graph, seed), step=STEP)
    sums_ms = np.array([float(plain(one)) for one in counts])
    found = priced(graph, seed).calibrated(sums_ms, scale * sums_ms + constant_ms)
    assert found.scale == pytest.approx(scale)
    assert found.constant_ms == pytest.approx(constant_ms, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_networks_never_take_less_than_nothing_besides_their_layers(seed: int) -> None:
    graph, counts = chain(), some_counts(chain(), seed)
    plain = LatencyPrice(graph, latency_ms=measured(graph, seed), step=STEP)
    sums = np.array([float(plain(one)) for one in counts])
    took_ms = sums - 0.9 * sums.min()
    found = plain.calibrated(sums, took_ms)
    assert found.constant_ms == 0.0
    # The best that a scale alone can do, by relative squares.
    best = float(np.square(found.scale * sums / took_ms - 1).sum())
    for other in (0.99, 1.01):
        assert best <= np.square(other * found.scale * sums / took_ms - 1).sum()


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 17, 64, 152])
@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_grid_rises_in_steps_to_all_channels(channels: int, step: int) -> None:
    grid = channel_grid(channels, step=step)
    assert grid[-1] == channels
    assert all(count % step == 0 for count in grid[:-1])
    assert all(low < high for low, high in itertools.pairwise(grid))
    assert grid[0] == min(step, channels)


# -- expected --------------------------------------------------------------------------


def test_what_is_expected_is_the_mean_of_what_is_drawn_in_milliseconds_too() -> None:
    row = nn.Sequential(*(own_networks.Residual(16, 16, 1) for _ in range(2)))
    network = nn.Sequential(
        own_networks.conv(3, 16), row, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    own = searched_by_tas(owned(network, resolution=SIZE, class_count=3))
    net = searched(own)
    scattered(net, 0)
    price = ExpectedPrice(net, priced(own.graph, 0))
    torch.manual_seed(0)
    found = torch.tensor([price.settled(*picked(net)) for _ in range(1500)])
    spread = float(found.std()) / math.sqrt(len(found))
    expected = float(price.expected().detach())
    assert float(found.mean()) == pytest.approx(expected, abs=4 * spread)
