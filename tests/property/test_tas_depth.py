"""Laws of TAS on deep networks, on bottlenecks, and where no width can be searched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.shrink.channel_prices import timed_layers
from ofa_deploy.shrink.cost import MacPrice
from ofa_deploy.shrink.coupling import trace_channels
from ofa_deploy.shrink.device_prices import fit_prices, timed_forms
from ofa_deploy.shrink.extract import extract_module
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.stages import find_stages, shallower
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.tas_network import SearchedNetwork
from ofa_deploy.shrink.tas_price import NARROWEST_SHARE, ExpectedPrice
from tests.support import own_networks, tiny
from tests.support.mac_counter import counted_macs
from tests.support.searching import (
    chosen,
    drawn,
    owned,
    picked,
    resnet,
    scattered,
    searched,
    shape_of,
)
from tests.support.shrinking import made_up_prices, priced_by_macs, products

SIZE = own_networks.SIZE


@lru_cache(maxsize=1)
def deep() -> OwnNetwork:
    return resnet(32)


# -- deep networks ---------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "blocks"), [(32, 5), (56, 9), (110, 18)])
def test_every_stage_of_a_deep_network_is_searched(depth: int, blocks: int) -> None:
    own = resnet(depth)
    assert len(own.graph.groups) == depth - 1
    stages = find_stages(own.module, own.graph, own.image)
    assert [stage.blocks for stage in stages] == [blocks] * 3
    assert len({group for stage in stages for group in stage.groups}) == 3 * blocks


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_settled_price_counts_what_is_left_where_depths_are_left_out(
    data: st.DataObject,
) -> None:
    net = searched(deep())
    assert {one.choices for one in net.depth_distributions} == {(1, 3, 5)}
    widths, depths = chosen(data, net)
    price = ExpectedPrice(net, MacPrice(net.graph))
    shape = shape_of(widths, depths)
    assert price.settled(widths, depths) == pytest.approx(shape.mac_count / 1e6)
    assert counted_macs(CifarResNet(shape), 32) == shape.mac_count


def test_the_expected_price_is_the_mean_where_depths_are_left_out() -> None:
    net = searched(deep())
    scattered(net, 0)
    price = ExpectedPrice(net, MacPrice(net.graph))
    torch.manual_seed(0)
    found = [shape_of(*picked(net)).mac_count / 1e6 for _ in range(2000)]
    spread = float(torch.tensor(found).std()) / math.sqrt(len(found))
    mean = sum(found) / len(found)
    assert mean == pytest.approx(float(price.expected().detach()), abs=4 * spread)


def narrowest(net: SearchedNetwork) -> list[int]:
    return [one.choices[0] for one in net.width_distributions]


# Of what the narrowest widths cost at the likeliest depths.
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 1.3))
def test_blocks_go_only_where_they_leave_widths_too_little(
    seed: int, room: float
) -> None:
    net = searched(deep())
    scattered(net, seed)
    price = ExpectedPrice(net, MacPrice(net.graph))
    likely = net.depths()

    def cost(depths: Sequence[int]) -> float:
        return price.settled(narrowest(net), depths)

    most = room * cost(likely)
    kept = price.depths_within(most)
    assert all(few <= many for few, many in zip(kept, likely, strict=True))
    if room >= 1.2 or set(likely) == {1}:
        assert kept == likely
    elif room <= 1.0:
        assert kept != likely
    if kept != (1, 1, 1):  # there is room for widths
        assert cost(kept) < most
    if kept != likely:  # with the last ones that went there was too little
        choices = [one.choices for one in net.depth_distributions]
        with_more = [
            [*kept[:place], each[each.index(kept[place]) + 1], *kept[place + 1 :]]
            for place, each in enumerate(choices)
            if kept[place] < likely[place]
        ]
        assert max(map(cost, with_more)) > NARROWEST_SHARE * most


def test_the_blocks_that_go_first_are_the_least_likely_for_their_price() -> None:
    net = searched(resnet(20), step=1)
    for one in net.width_distributions:
        one.prefer(one.choices[-1])
    unsure, *sure = net.depth_distributions
    unsure.logits.data = torch.tensor([0.0, 0.1, 0.2])
    for one in sure:
        one.logits.data = torch.tensor([0.0, 0.0, 9.0])
    price = ExpectedPrice(net, MacPrice(net.graph))
    for depths in ((3, 3, 3), (2, 3, 3), (1, 3, 3)):
        most = price.settled(narrowest(net), depths) / NARROWEST_SHARE
        assert price.depths_within((1 + 1e-9) * most) == depths


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 1.0))
def test_what_all_widths_leave_over_goes_to_blocks(seed: int, share: float) -> None:
    tolerance = 0.05
    net = searched(deep())
    scattered(net, seed)
    price = ExpectedPrice(net, MacPrice(net.graph))
    widest = [one.choices[-1] for one in net.width_distributions]
    most = max(share * price.full, price.least / NARROWEST_SHARE)
    before = price.depths_within(most)
    found = price.depths_near(most, tolerance=tolerance)
    assert all(few <= many for few, many in zip(before, found, strict=True))
    enough = (1 - tolerance) * most
    if price.settled(widest, before) >= enough:
        assert found == before
    elif price.settled(widest, found) < enough:  # not one more has room
        choices = [one.choices for one in net.depth_distributions]
        more = [
            [*found[:place], each[each.index(found[place]) + 1], *found[place + 1 :]]
            for place, each in enumerate(choices)
            if found[place] < each[-1]
        ]
        costs = [price.settled(narrowest(net), one) for one in more]
        assert min(costs, default=math.inf) > NARROWEST_SHARE * most
    if found != before:
        assert price.settled(narrowest(net), found) <= NARROWEST_SHARE * most


def test_the_block_that_comes_back_is_the_likeliest() -> None:
    net = searched(resnet(20), step=1)
    first, second, third = net.depth_distributions
    first.logits.data = torch.tensor([9.0, 0.0, 0.0])
    second.logits.data = torch.tensor([2.0, 1.0, 0.0])
    third.logits.data = torch.tensor([9.0, 0.0, 0.0])
    price = ExpectedPrice(net, MacPrice(net.graph))
    widest = [one.choices[-1] for one in net.width_distributions]
    most = price.settled(widest, (1, 2, 1))
    assert price.depths_within(most) == (1, 1, 1)
    assert price.depths_near(most, tolerance=0.05) == (1, 2, 1)


def test_where_blocks_may_go_prices_are_fitted_to_forms_without_them() -> None:
    own = resnet(20)
    layers = priced_by_macs(own.graph, step=4)
    forms = timed_forms(own, step=4)
    shallow = {name: form for name, form in forms.items() if name.startswith("d")}
    assert list(shallow) == ["d1.3.3", "d3.1.3", "d3.3.1", "d1.1.1"]
    image = torch.zeros(1, 3, 32, 32)
    for form in shallow.values():
        millions = float(MacPrice(form.own.graph)(form.counts))
        assert form.priced_by(layers) == pytest.approx(millions, rel=1e-3)
        assert form.own.module(image).shape == (1, 10)
    sums_ms = np.array([form.priced_by(layers) for form in forms.values()])
    networks = {
        name: tiny.measurement(name, 0.7 * ms + 0.2)
        for name, ms in zip(forms, sums_ms, strict=True)
    }
    blocks = {
        key: tiny.measurement(key, products(layer) / 1e6)
        for key, layer in timed_layers(own.graph, step=4).items()
    }
    table = replace(made_up_prices(own).table, networks=networks, blocks=blocks)
    found = fit_prices(own, table, forms=forms, step=4)
    assert found.price.scale == pytest.approx(0.7)
    assert found.price.constant_ms == pytest.approx(0.2)
    assert found.residual_ratio == pytest.approx(0, abs=1e-6)


# -- bottlenecks -----------------------------------------------------------------------

EXPANSION = 4


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut, as the deepest published networks have."""

    def __init__(self, channels: int, middle: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * middle
        self.first = nn.Conv2d(channels, middle, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.second = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.third = nn.Conv2d(middle, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out)
        point = nn.Conv2d(channels, out, 1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.AvgPool2d(2), point)
        elif channels != out:
            self.shortcut = nn.Sequential(point, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        y = F.relu(self.norm2(self.second(y)))
        return F.relu(self.norm3(self.third(y)) + self.shortcut(x))


def bottlenecks(blocks: int) -> nn.Module:
    """A residual network of depth 9 · blocks + 2."""
    stages, channels = [], 16
    for middle, stride in ((16, 1), (32, 2), (64, 2)):
        row = []
        for place in range(blocks):
            row.append(Bottleneck(channels, middle, 1 if place else stride))
            channels = EXPANSION * middle
        stages.append(nn.Sequential(*row))
    return nn.Sequential(
        own_networks.conv(3, 16), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(channels, 10),
    )  # fmt: skip


# Widths of ResNet-164 for CIFAR-10 that were published with the method's code, the
# stem's first; then three a block, those of blocks that are not kept included.
R164 = (
    "16 8 16 64 6 16 64 14 16 64 8 16 64 4 16 64 6 16 64 6 16 64 11 11 64 4 14 64 4 4 "
    "57 4 16 64 9 12 57 4 16 64 4 8 57 6 6 51 6 4 44 6 4 57 6 6 19 32 32 128 32 32 "
    "128 32 32 128 9 32 128 32 32 128 25 28 115 12 32 128 32 32 128 32 32 128 32 32 "
    "102 28 32 128 16 32 128 28 19 128 32 9 51 16 12 102 12 22 115 9 12 51 12 16 38 "
    "64 64 256 64 64 256 64 64 256 64 64 256 64 64 256 64 64 256 64 64 256 64 64 256 "
    "64 64 256 64 64 256 64 57 204 64 25 179 19 25 204 44 19 153 38 25 76 19 32 128 "
    "19 51 76 57 32 76"
)


def test_the_published_bottlenecks_count_what_was_published() -> None:
    network = bottlenecks(18)
    assert counted_macs(network, 32) == 247_646_720
    own = searched_by_tas(owned(network, resolution=32, class_count=10))
    net = searched(own)
    assert [one.choices[-1] for one in net.depth_distributions] == [18, 18, 18]
    widths = [int(width) for width in R164.split()]
    assert [group.name for group in own.graph.groups] == [
        "0.0", *(f"{stage}.{block}.{conv}" for stage in (1, 2, 3)
                 for block in range(18) for conv in ("first", "second", "third")),
    ]  # fmt: skip
    price = ExpectedPrice(net, MacPrice(own.graph))
    assert price.settled(widths, [13, 15, 13]) == pytest.approx(178.071224, abs=1e-9)


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_what_is_left_of_bottlenecks_costs_what_it_is_priced_at(
    data: st.DataObject,
) -> None:
    net = searched(few_bottlenecks())
    assert_priced_as_left(few_bottlenecks(), data)
    assert net.module.train()(drawn(0, 2, 3, 32, 32)).shape == (2, 10)


@lru_cache(maxsize=1)
def few_bottlenecks() -> OwnNetwork:
    torch.manual_seed(0)
    return searched_by_tas(owned(bottlenecks(2), resolution=32, class_count=10))


def assert_priced_as_left(
    own: OwnNetwork, data: st.DataObject, *, step: int = 1
) -> None:
    """Any structure's price is the count of what remains as a network of its own."""
    net = searched(own, step=step)
    widths, depths = chosen(data, net)
    left = own.left_of(shallower(own.module, net.stages, depths))
    by_name = dict(zip([g.name for g in own.graph.groups], widths, strict=True))
    kept = [torch.arange(by_name[group.name]) for group in left.graph.groups]
    narrow = extract_module(left.module, left.graph, kept)
    counted = counted_macs(narrow, own.resolution) / 1e6
    price = ExpectedPrice(net, MacPrice(own.graph))
    assert price.settled(widths, depths) == pytest.approx(counted)


# -- depth where no width can be searched ----------------------------------------------


class Rows(nn.Module):
    """Rows of residual blocks; shortcuts hand on zeros for new channels, or project."""

    def __init__(self, *, project: bool) -> None:
        super().__init__()
        block = own_networks.Residual
        self.stem = own_networks.conv(3, 16)
        self.blocks = nn.Sequential(
            *(block(16, 16, 1) for _ in range(3)),
            block(16, 32, 2, project=project),
            block(32, 32, 1),
            block(32, 32, 1),
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.blocks(self.stem(x)).mean((2, 3))))


class Grouped(nn.Module):
    """A skip over a grouped convolution, whose channels all stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, 1, 1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def grouped_rows() -> nn.Module:
    conv = own_networks.conv
    return nn.Sequential(
        conv(3, 16), nn.Sequential(*(Grouped() for _ in range(3))), conv(16, 24),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


CASES = {"padded": 1, "narrow": 16, "grouped": 1}


@lru_cache(maxsize=3)
def fixed_trunk(case: str) -> OwnNetwork:
    torch.manual_seed(0)
    network = grouped_rows() if case == "grouped" else Rows(project=case == "narrow")
    own = owned(network, resolution=SIZE, class_count=3)
    return searched_by_tas(own, step=CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_depth_is_searched_where_the_width_of_what_is_handed_on_is_not(
    case: str,
) -> None:
    own = fixed_trunk(case)
    net = searched(own, step=CASES[case])
    assert net.stages[0].groups == ()
    found = [stage.blocks for stage in net.stages]
    assert found == ([3] if case == "grouped" else [3, 3])
    for one in net.module.distributions:
        one.prefer(one.choices[-1])
    x = drawn(0, 4, 3, SIZE, SIZE)
    torch.testing.assert_close(
        net.module.eval()(x), own.module.eval()(x), rtol=1e-4, atol=1e-5
    )
    logits = [one.logits for one in net.depth_distributions]
    gradients = torch.autograd.grad(net.module.train()(x).square().sum(), logits)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_where_it_is_not_a_settled_price_is_what_is_left_too(
    case: str, data: st.DataObject
) -> None:
    assert_priced_as_left(fixed_trunk(case), data, step=CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_blocks_whose_widths_stay_are_worth_their_latency(case: str) -> None:
    own, step = fixed_trunk(case), CASES[case]
    net = searched(own, step=step)
    price = priced_by_macs(own.graph, step=step, constant_ms=0.1)
    widths = [group.channels for group in own.graph.groups]
    most = [stage.blocks for stage in net.stages]
    expected = ExpectedPrice(net, price)
    macs = ExpectedPrice(net, MacPrice(own.graph))
    whole = expected.settled(widths, most)
    assert whole == pytest.approx(float(price(torch.tensor(widths).double())))
    for fewest in ([1, *most[1:]], [1] * len(most)):
        saved = macs.full - macs.settled(widths, fewest)
        assert whole - expected.settled(widths, fewest) == pytest.approx(saved)
        left = own.left_of(shallower(own.module, net.stages, fewest))
        counts = torch.tensor([group.channels for group in left.graph.groups])
        assert float(price.of_graph(left.graph)(counts.double())) == pytest.approx(
            whole - saved
        )


def test_what_always_stays_is_not_timed() -> None:
    own = fixed_trunk("grouped")
    stays = trace_channels(own.module, input_shape=(3, SIZE, SIZE)).only([])
    assert timed_layers(stays, step=1) == {}
    assert len(timed_layers(own.graph, step=1)) > 0
