"""Laws of Pruning-as-Search; P1 to P9 are numbered as in the method's specification."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError, TraceError, TrainingError
from ofa_deploy.families import repvgg
from ofa_deploy.nn.static import FusedNet, StaticNet
from ofa_deploy.plan import lower
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.extract import extract_module, extract_plan
from ofa_deploy.shrink.groups import ChannelGraph, trace_channels
from ofa_deploy.shrink.masks import BinaryMask, MaskedNetwork, insert_masks
from ofa_deploy.shrink.pas import (
    COLLAPSE_WINDOW,
    PasSettings,
    PruningAsSearch,
    settle_counts,
)
from tests.support.tiny_torch import inputs, relative_error

SHAPE = (3, 12, 12)


class Residual(nn.Module):
    """A skip over two convolutions; with or without a projection."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.project = (
            nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
            if stride != 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + (x if self.project is None else self.project(x)))


class ResidualNet(nn.Module):
    """What a user may bring: skips, a depthwise convolution, flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            Residual(16, 16, 1), Residual(16, 24, 2), Residual(24, 24, 1)
        )
        self.depthwise = nn.Conv2d(24, 24, 3, 2, 1, groups=24)
        self.pool = nn.AvgPool2d(1)
        self.head = nn.Linear(24 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        x = F.relu(self.depthwise(x))
        return cast(Tensor, self.head(torch.flatten(self.pool(x), 1)))


def randomise(network: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    network.train()
    with torch.no_grad():
        for _ in range(10):
            network(inputs(SHAPE[1], count=16))
    return network.eval()


def branched() -> StaticNet:
    space = repvgg.small(class_count=5)
    space = replace(
        space,
        resolutions=(12,),
        stem=replace(space.stem, out_channels=8),
        stages=(repvgg.stage(16, depths=(2,)), repvgg.stage(24, depths=(1,))),
    )
    torch.manual_seed(0)
    network = randomise(StaticNet(lower(space, space.largest())))
    assert isinstance(network, StaticNet)
    return network


def residual() -> nn.Module:
    torch.manual_seed(0)
    return randomise(ResidualNet())


NETWORKS = {"branched": branched, "residual": residual}


def masked(network: nn.Module) -> MaskedNetwork:
    return insert_masks(trace_channels(network, input_shape=SHAPE))


def mask_some(masked: MaskedNetwork, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for mask in masked.masks:
        chosen = torch.rand(len(mask.latent), generator=generator) < 0.6
        chosen[0] = True
        mask.keep_only(chosen.nonzero().flatten())


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, module(x))


# -- P1 to P3: the mask ----------------------------------------------------------------


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_masks_that_keep_everything_change_no_bit(build: object) -> None:
    network = build()  # type: ignore[operator]
    x = inputs(SHAPE[1])
    assert torch.equal(run(masked(network).module.eval(), x), run(network, x))


def test_the_latent_gradient_is_the_same_for_kept_and_removed_channels() -> None:
    mask = BinaryMask(3)
    mask.latent.data = torch.tensor([1.0, 0.4, 0.7])
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    g = torch.randn(2, 3, 4, 4)
    torch.autograd.backward(mask(x), g)
    assert mask.latent.grad is not None
    assert x.grad is not None
    expected = (g * x.detach()).sum((0, 2, 3))
    torch.testing.assert_close(mask.latent.grad, expected)
    assert torch.equal(x.grad[:, 1], torch.zeros(2, 4, 4))
    assert torch.equal(x.grad[:, 0], g[:, 0])


def test_a_latent_at_the_threshold_is_removed_and_one_above_is_kept() -> None:
    mask = BinaryMask(2)
    mask.latent.data = torch.tensor([0.5, 0.5 + 1e-6])
    assert mask.kept().tolist() == [1]


# -- P4, P5: the price -----------------------------------------------------------------


def brute_force_macs(network: nn.Module, x: Tensor) -> int:
    """Of convolutions and linear layers, counted as they run."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = cast(Tensor, module.weight)
        total += weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

    handles = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    run(network, x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_the_price_is_the_macs_of_the_narrowed_network(build: object) -> None:
    network = build()  # type: ignore[operator]
    net = masked(network)
    mask_some(net)
    counts = net.counts
    assert torch.equal(counts, counts.round())
    (gradient,) = torch.autograd.grad(net.masks[0].count, net.masks[0].latent)
    assert torch.equal(gradient, torch.ones_like(gradient))
    found = 1e6 * float(MacPrice(net.graph)(counts.detach()))
    narrow = narrowed(network, net)
    assert found == pytest.approx(brute_force_macs(narrow, inputs(12, count=1)))


def narrowed(network: nn.Module, net: MaskedNetwork) -> nn.Module:
    if isinstance(network, StaticNet):
        fused = extract_plan(network, net.graph, net.kept(), name="x")
        return FusedNet(fused.plan, fused.weights).eval()
    return extract_module(network, net.graph, net.kept()).eval()


def test_the_pull_on_a_channel_is_that_of_its_two_layers() -> None:
    network = branched()
    net = masked(network)
    search = PruningAsSearch(
        net, price=MacPrice(net.graph), settings=PasSettings(target_share=0.5)
    )
    (gradient,) = torch.autograd.grad(search.loss(), net.masks[1].latent)
    layers = [c for c in net.graph.consumers if not c.is_linear]
    full = search.full_price
    read, write = layers[1], layers[2]
    assert (read.out_group, write.in_group) == (1, 1)
    slope = read.macs_per_pair * read.in_channels
    slope += write.macs_per_pair * write.out_channels
    expected = 2 * search.strength * (1 - 0.5) * slope / 1e6 / full
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected))


# -- P6: removing ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_removing_masked_channels_changes_nothing(build: object, seed: int) -> None:
    network = build()  # type: ignore[operator]
    net = masked(network)
    mask_some(net, seed=seed)
    x = inputs(SHAPE[1], count=8)
    expected = run(net.module.eval(), x)
    assert relative_error(run(narrowed(network, net), x), expected) <= 1e-4


def test_a_skip_ties_its_two_ends_together() -> None:
    graph = trace_channels(residual(), input_shape=SHAPE)
    by_name = {side.name: side for side in graph.consumers}
    stem, first = by_name["stem"], by_name["blocks.0.first"]
    assert stem.out_group == by_name["blocks.0.second"].out_group == first.in_group
    assert first.out_group != stem.out_group
    assert by_name["blocks.1.project.0"].out_group == by_name["depthwise"].out_group
    assert by_name["head"].columns_per_channel == 9


# -- P7: a removed channel can come back -----------------------------------------------


def test_a_channel_that_comes_back_contributes_what_it_did() -> None:
    network = branched()
    net = masked(network)
    before = run(net.module.eval(), inputs(12))
    latent = net.masks[1].latent
    latent.data[3] = 0.2
    weight = network.get_submodule("blocks.1.layers.0.dense.conv").weight
    logits = net.module(inputs(12))
    torch.autograd.backward(logits.square().sum())
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    assert not weight.grad[3].any()
    assert latent.grad is not None
    assert latent.grad[3] != 0
    latent.data[3] = 0.9
    assert torch.equal(run(net.module, inputs(12)), before)


# -- P8, P9: the regulariser alone -----------------------------------------------------


class Chain(nn.Sequential):
    """Four layers of 16 channels."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for channels in (3, 16, 16, 16):
            layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        )


def regularised(
    *, jitter: float, steps: int = 3000, floor: int = 1
) -> tuple[PruningAsSearch, list[Tensor]]:
    """Latents pulled by the regulariser alone; also what they were after each step."""
    torch.manual_seed(0)
    net = masked(Chain())
    for mask in net.masks:
        mask.latent.data += jitter * torch.randn(16)
    settings = PasSettings(target_share=0.5, floor=floor, step=1, steps_to_flip=200)
    search = PruningAsSearch(net, price=MacPrice(net.graph), settings=settings)
    optimizer = torch.optim.SGD(
        [mask.latent for mask in net.masks], lr=settings.latent_rate, momentum=0.9
    )
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(search.loss())
        optimizer.step()
        seen.append(torch.stack([mask.latent.detach().clone() for mask in net.masks]))
    return search, seen


def test_without_a_task_the_channels_of_a_layer_fall_together() -> None:
    _, seen = regularised(jitter=0.0, steps=600)
    assert all(torch.equal(row, row[0].expand(16)) for step in seen for row in step)
    assert any((step <= 0.5).all(1).any() for step in seen)


def test_latents_that_differ_settle_at_the_target() -> None:
    search, _ = regularised(jitter=0.2)
    assert abs(search.current_share() - 0.5) < 0.02


def test_a_layer_between_two_empty_ones_feels_no_pull() -> None:
    net = masked(Chain())
    search = PruningAsSearch(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=0.5, floor=1, step=1),
    )
    for index in (0, 2):
        net.masks[index].latent.data.fill_(0.0)
    gradients = torch.autograd.grad(search.loss(), [m.latent for m in net.masks])
    assert not gradients[1].any()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


# -- floors and collapse ---------------------------------------------------------------


def test_a_layer_keeps_its_floor() -> None:
    net = masked(Chain())
    search = PruningAsSearch(
        net, price=MacPrice(net.graph), settings=PasSettings(target_share=0.7, floor=8)
    )
    net.masks[2].latent.data = torch.linspace(0.0, 0.45, 16)
    search.after_step()
    assert net.masks[2].kept().tolist() == list(range(8, 16))


def test_a_collapsed_layer_is_opened_again_and_told_of() -> None:
    net = masked(Chain())
    search = PruningAsSearch(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=0.5, floor=8, step=4),
    )
    strength = search.strength
    net.masks[1].latent.data = torch.linspace(0.1, 0.4, 16)
    for _ in range(COLLAPSE_WINDOW):
        search.after_step()
    assert search.collapses == [net.graph.groups[1].name]
    assert "collapsed and was opened again" in search.remarks()[0]
    assert len(net.masks[1].kept()) == 16
    order = net.masks[1].latent.detach().argsort()
    assert order.tolist() == list(range(16))
    assert search.strength == strength / 2


def test_several_layers_that_collapse_at_once_halve_the_pull_once() -> None:
    net = masked(Chain())
    search = PruningAsSearch(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=0.5, floor=8, step=4),
    )
    strength = search.strength
    for index in (0, 2):
        net.masks[index].latent.data = torch.linspace(0.1, 0.4, 16)
    for _ in range(COLLAPSE_WINDOW):
        search.after_step()
    assert len(search.collapses) == 2
    assert search.strength == strength / 2


def held(*, target: float, removed: int) -> tuple[float, PruningAsSearch]:
    """A search whose strength was halved, long after; and its strength before."""
    net = masked(Chain())
    search = PruningAsSearch(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=target, floor=1, step=1),
    )
    first = search.strength
    search.strength /= 2
    for mask in net.masks:
        mask.latent.data[:removed] = 0.0
    for _ in range(40 * COLLAPSE_WINDOW):
        search.after_step()
    assert not search.collapses
    return first, search


def test_the_pull_is_held_while_the_target_is_not_reached() -> None:
    """Its strength rises to what pulls as hard as at first, and no further."""
    first, search = held(target=0.5, removed=3)
    excess = search.current_share() - 0.5
    assert excess > 0.02
    assert search.strength == pytest.approx(first * 0.5 / excess)


def test_nothing_pulls_harder_once_the_target_is_reached() -> None:
    first, search = held(target=0.95, removed=1)
    assert search.current_share() < 0.95
    assert search.strength == first / 2


def test_a_search_of_other_settings_is_not_continued() -> None:
    net = masked(Chain())
    searches = [
        PruningAsSearch(
            net,
            price=MacPrice(net.graph),
            settings=PasSettings(target_share=share, floor=1, step=1),
        )
        for share in (0.5, 0.6)
    ]
    searches[0].restore(searches[0].state())
    with pytest.raises(TrainingError, match="was another one"):
        searches[1].restore(searches[0].state())


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_a_target_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(SpaceError, match="above 0 and at most 1"):
        PasSettings(target_share=share)


def test_a_target_below_the_floors_is_refused() -> None:
    net = masked(Chain())
    with pytest.raises(SpaceError, match="the network still costs"):
        PruningAsSearch(
            net,
            price=MacPrice(net.graph),
            settings=PasSettings(target_share=0.05, floor=8),
        )


# -- settling --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_settled_counts_are_aligned_and_fit_as_tightly_as_steps_allow(
    share: float, seed: int
) -> None:
    graph = trace_channels(branched(), input_shape=SHAPE)
    price = MacPrice(graph)
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.rand(g.channels, generator=generator) for g in graph.groups]
    most = share * float(price(full_counts(graph)))
    floors = [4] * len(latents)
    counts = settle_counts(latents, price=price, most=most, step=4, floors=floors)
    assert all(count % 4 == 0 and count >= 4 for count in counts)
    assert price_of(price, counts) <= most
    for index, group in enumerate(graph.groups):
        wider = [c + 4 * (i == index) for i, c in enumerate(counts)]
        if wider[index] <= group.channels:
            assert price_of(price, wider) > most


def price_of(price: MacPrice, counts: list[int]) -> float:
    return float(price(torch.tensor(counts, dtype=torch.float64)))


# -- networks that cannot be pruned ----------------------------------------------------


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x], 1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class DropsOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(self.conv(x)))


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.upsample = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.upsample(x.repeat(1, 4, 1, 1)))


def flattened(*between: nn.Module) -> nn.Module:
    """A chain with something between its flattened maps and its linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), *between, nn.Linear(4 * 144, 5)
    )


def test_what_keeps_zeros_may_come_after_flattening() -> None:
    network = randomise(flattened(nn.Dropout(0.5), nn.ReLU()))
    net = masked(network)
    net.masks[0].keep_only(torch.tensor([1, 3]))
    narrow = extract_module(network, net.graph, net.kept()).eval()
    x = inputs(SHAPE[1])
    assert relative_error(run(narrow, x), run(net.module.eval(), x)) < 1e-6


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (flattened(nn.Sigmoid()), "^2 comes after maps were flattened"),
        (Concatenated(), "cat"),
        (Branching(), "Branching"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), Branching()), "^1 cannot be traced"),
        (Custom(), "repeat"),
        (DropsOut(), "use nn.Dropout"),
        (Twice(), "conv is used more than once"),
    ],
    ids=["sigmoid", "cat", "branching", "nested", "custom", "dropout", "twice"],
)
def test_a_layer_that_cannot_be_told_is_named(network: nn.Module, named: str) -> None:
    with pytest.raises(TraceError, match=named):
        trace_channels(network, input_shape=SHAPE)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(
        TraceError, match=r"does not run on images of shape \(1, 12, 12"
    ):
        trace_channels(residual(), input_shape=(1, 12, 12))


def test_channels_of_grouped_convolutions_stay() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    graph: ChannelGraph = trace_channels(network, input_shape=SHAPE)
    assert graph.groups == ()
    assert np.all([side.in_group is None for side in graph.consumers])
