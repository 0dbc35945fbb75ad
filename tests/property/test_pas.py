"""Laws of Pruning-as-Search; P1 to P9 are numbered as in the method's specification."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError, TraceError, TrainingError
from ofa_deploy.families import repvgg
from ofa_deploy.fuse import fuse
from ofa_deploy.nn.memory_format import store_channels_last
from ofa_deploy.nn.static import FusedNet, StaticNet
from ofa_deploy.plan import lower
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.shrink.channel_prices import timed_layer, timed_layers
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.coupling import trace_channels
from ofa_deploy.shrink.extract import extract_module, extract_plan
from ofa_deploy.shrink.groups import ChannelGraph, Cut
from ofa_deploy.shrink.masks import (
    BinaryMask,
    Estimator,
    MaskedInput,
    MaskedNetwork,
    insert_masks,
)
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.pas import (
    COLLAPSE_WINDOW,
    LEAST_DISTANCE,
    LEAST_OFF,
    LEAST_STRENGTH,
    MOST_PULL,
    STRENGTHENED,
    PasSettings,
    PruningAsSearch,
    settle_counts,
)
from ofa_deploy.train.optimizer import HybridOptimizer
from ofa_deploy.train.recipe import Phase, Recipe
from tests.support import own_networks
from tests.support.mac_counter import counted_macs
from tests.support.searching import pulled
from tests.support.shrinking import priced_by_macs, products
from tests.support.tiny_torch import inputs, relative_error

SHAPE = (3, 12, 12)


def branched() -> StaticNet:
    space = repvgg.small(class_count=5)
    space = replace(
        space,
        resolutions=(12,),
        stem=replace(space.stem, out_channels=8),
        stages=(repvgg.stage(16, depths=(2,)), repvgg.stage(24, depths=(1,))),
    )
    torch.manual_seed(0)
    network = own_networks.randomise(StaticNet(lower(space, space.largest())))
    assert isinstance(network, StaticNet)
    return network


def own(name: str) -> nn.Module:
    torch.manual_seed(0)
    return own_networks.randomise(own_networks.ALL[name]())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "branched": branched,
    **{name: functools.partial(own, name) for name in own_networks.ALL},
}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def masked(network: nn.Module, *, estimator: Estimator = "identity") -> MaskedNetwork:
    return insert_masks(network, channels(network), estimator=estimator)


def channels(network: nn.Module) -> ChannelGraph:
    """Of what is shrunk of a network: the groups that can go exactly."""
    return own_network(network).graph


def own_network(network: nn.Module) -> OwnNetwork:
    return OwnNetwork.of(
        network,
        resolution=SHAPE[1],
        normalisation=Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3),
        class_names=tuple("abcde"),
    )


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


@every_network
def test_masks_that_keep_everything_change_no_bit(
    build: Callable[[], nn.Module],
) -> None:
    network = build()
    x = inputs(SHAPE[1])
    assert torch.equal(run(masked(network).module.eval(), x), run(network, x))


def test_the_latent_gradient_is_the_same_for_kept_and_removed_channels() -> None:
    mask = BinaryMask(3)
    mask.latent.data = torch.tensor([1.0, 0.4, 0.7])
    everything = np.arange(3)
    cut = Cut(module="", side="in", group=0, positions=everything, channels=everything)
    layer = MaskedInput(nn.Identity(), width=3, cuts=[cut], masks=[mask])
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    g = torch.randn(2, 3, 4, 4)
    torch.autograd.backward(layer(x), g)
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
    assert mask.binary.tolist() == [0.0, 1.0]


# -- P4, P5: the price -----------------------------------------------------------------


class Pyramid(nn.Module):
    """One convolution on maps of several sizes, and once on each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x))
        x = self.shared(F.max_pool2d(x, 2)) + self.shared(F.max_pool2d(x, 2))
        return cast(Tensor, self.head(x.mean((2, 3))))


def test_a_layer_costs_what_its_maps_are_worth_whatever_their_sizes() -> None:
    graph = trace_channels(Pyramid(), input_shape=(3, 12, 12))
    price = priced_by_macs(graph, step=4)
    counts = torch.tensor([8.0], dtype=torch.float64)
    convs = 3 * 9 * 8 * 144 + 8 * 8 * (144 + 36 + 36)
    assert float(price(counts)) == pytest.approx(convs / 1e6)


@every_network
def test_the_price_is_the_macs_of_the_narrowed_network(
    build: Callable[[], nn.Module],
) -> None:
    network = build()
    net = masked(network)
    mask_some(net)
    counts = net.counts
    assert torch.equal(counts, counts.round())
    (gradient,) = torch.autograd.grad(net.masks[0].count, net.masks[0].latent)
    assert torch.equal(gradient, torch.ones_like(gradient))
    found = 1e6 * float(MacPrice(net.graph)(counts.detach()))
    narrow = narrowed(network, net)
    assert found == pytest.approx(counted_macs(narrow, SHAPE[1]))


def narrowed(network: nn.Module, net: MaskedNetwork) -> nn.Module:
    if isinstance(network, StaticNet):
        fused = extract_plan(network, net.graph, net.kept(), name="x")
        return FusedNet(fused.plan, fused.weights).eval()
    return extract_module(network, net.graph, net.kept()).eval()


def test_the_pull_on_a_channel_is_that_of_its_two_layers() -> None:
    network = branched()
    net = masked(network)
    search = pulled(
        net, price=MacPrice(net.graph), settings=PasSettings(target_share=0.5)
    )
    (gradient,) = torch.autograd.grad(search.loss(), net.masks[1].latent)
    full = search.full_price
    writer, reader = net.graph.layers[1], net.graph.layers[2]
    assert [cut.group for cut in net.graph.cuts_at(writer.name, "out")] == [1]
    assert [cut.group for cut in net.graph.cuts_at(reader.name, "in")] == [1]
    slope = writer.macs_per_pair * writer.in_channels
    slope += reader.macs_per_pair * reader.out_channels
    expected = 2 * search.strength * (1 - 0.5) * slope / 1e6 / full
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected))


# -- P6: removing ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@every_network
def test_removing_masked_channels_changes_nothing(
    build: Callable[[], nn.Module], seed: int
) -> None:
    network = build()
    net = masked(network)
    mask_some(net, seed=seed)
    x = inputs(SHAPE[1], count=8)
    expected = run(net.module.eval(), x)
    assert relative_error(run(narrowed(network, net), x), expected) <= 1e-4


@pytest.mark.parametrize("name", own_networks.ALL)
def test_what_removing_changes_is_rounding(name: str) -> None:
    network = own(name)
    net = masked(network)
    mask_some(net)
    for module in (network, net.module):
        module.double()
    x = inputs(SHAPE[1], count=8).double()
    expected = run(net.module.eval(), x)
    assert relative_error(run(narrowed(network, net), x), expected) <= 1e-13


def cuts(graph: ChannelGraph, group: int) -> dict[tuple[str, str], list[int]]:
    """Positions of a group on the sides of modules."""
    return {
        (cut.module, cut.side): cut.positions.tolist()
        for cut in graph.cuts
        if cut.group == group
    }


def test_a_skip_ties_its_two_ends_together() -> None:
    graph = channels(own("residual"))
    names = [group.name for group in graph.groups]
    stem = cuts(graph, names.index("stem"))
    everything = list(range(16))
    assert stem["stem", "out"] == stem["blocks.0.second", "out"] == everything
    assert stem["blocks.0.first", "in"] == everything
    assert ("blocks.0.first", "out") not in stem
    last = cuts(graph, names.index("blocks.1.second"))
    assert last["blocks.1.project.0", "out"] == last["depthwise", "out"]
    assert len(last["head", "in"]) == 9 * 24


def test_padded_channels_move_up_and_those_of_zeros_stay() -> None:
    graph = channels(own("padded"))
    assert [group.channels for group in graph.groups] == [8, 8, 16, 16, 32]
    stem = cuts(graph, 0)
    assert stem["stem.0", "out"] == list(range(8))
    assert stem["blocks.1.second", "out"] == list(range(4, 12))
    assert stem["head", "in"] == list(range(12, 20))


def test_concatenated_channels_are_read_where_they_are() -> None:
    graph = channels(own("dense"))
    names = [group.name for group in graph.groups]
    second = cuts(graph, names.index("layers.1.2"))
    assert (
        second["layers.2.2", "in"] == second["transition.0", "in"] == [12, 13, 14, 15]
    )
    assert second["layers.1.2", "out"] == [0, 1, 2, 3]


def test_a_group_whose_width_stands_in_the_code_is_left_whole() -> None:
    names = [group.name for group in channels(own("vgg")).groups]
    assert names == ["features.0", "features.4", "classifier.0"]


def test_features_between_linear_layers_can_go_and_outputs_stay() -> None:
    for last in (nn.Linear(40, 5), nn.Conv2d(40, 5, 1)):
        first = (
            nn.Linear(12, 40) if isinstance(last, nn.Linear) else nn.Conv2d(12, 40, 1)
        )
        network = nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            *([nn.Flatten()] if isinstance(last, nn.Linear) else []),
            first,
            nn.ReLU(),
            last,
            *([nn.Flatten()] if isinstance(last, nn.Conv2d) else []),
        )
        graph = trace_channels(network, input_shape=(3, 8, 8))
        assert [group.channels for group in graph.groups] == [12, 40]


def test_only_linear_layers_that_take_time_are_timed() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, 5),
    )
    graph = trace_channels(network, input_shape=(3, 8, 8))
    timed = [block.name for block in timed_layers(graph, step=8).values()]
    assert set(timed) == {"0", "3"}
    widths = {
        (b.in_channels, b.out_channels)
        for b in timed_layers(graph, step=8).values()
        if b.name == "3"
    }
    assert (1024, 128) in widths
    assert (8, 8) in widths


class MapLinear(nn.Module):
    """Linear layers that are called at every place of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.inner, self.outer = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = self.outer(F.relu(self.inner(x))).mean((1, 2))
        found: Tensor = self.head(x)
        return found


def test_linear_layers_on_maps_are_timed_at_all_places() -> None:
    graph = trace_channels(MapLinear(), input_shape=SHAPE)
    timed = {block.name for block in timed_layers(graph, step=8).values()}
    assert timed == {"stem", "inner", "outer"}
    of_inner = timed_layer(graph.layers[1], read=64, written=128)
    assert of_inner.window is None
    assert of_inner.in_size == (SHAPE[1] * SHAPE[2], 1)
    assert products(of_inner) == 64 * 128 * SHAPE[1] * SHAPE[2]


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


@pytest.mark.parametrize("name", ["residual", "dense", "shared", "branched"])
def test_what_is_removed_stays_as_it_was_while_the_rest_is_trained(name: str) -> None:
    network = branched() if name == "branched" else own(name)
    store_channels_last(network)
    net = masked(network)
    search = pulled(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=0.9, floor=1, step=1),
    )
    phase = Phase(name="any", epochs=1, peak_learning_rate=0.1, distill=False)
    recipe = Recipe(phases=(phase,))
    optimizer = HybridOptimizer(net.module, recipe, rates=search.rates)
    optimizer.set_learning_rate(0.1)
    size = own_networks.SIZE

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            logits = net.module.train()(torch.randn(4, 3, size, size))
            torch.autograd.backward(logits.square().mean())
            optimizer.step()
            search.after_step()

    train(2)  # what was stepped has momentum
    group = len(net.masks) // 2
    net.masks[group].latent.data[:3] = -10.0
    search.after_step()
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    train(3)
    moved = {k: p.detach() != before[k] for k, p in network.named_parameters()}
    for cut in net.graph.cuts:
        if cut.group != group:
            continue
        places = cut.positions[cut.channels < 3]
        for path, changed in moved.items():
            if not path.startswith(f"{cut.module}."):
                continue
            if cut.side == "out":
                assert not changed[places[places < len(changed)]].any()
            elif changed.ndim > 1 and changed.shape[1] > 1:
                assert not changed[:, places].any()
    assert sum(int(changed.sum()) for changed in moved.values()) > 1000


@every_network
def test_layers_without_a_channel_make_no_number_infinite(
    build: Callable[[], nn.Module],
) -> None:
    net = masked(build())
    x = torch.randn(4, *SHAPE)
    for emptied in (*net.masks, None):
        for mask in net.masks:
            mask.latent.data.fill_(0.0 if mask is emptied or emptied is None else 1.0)
        logits = net.module.train()(x)
        torch.autograd.backward(logits.square().sum())
        assert torch.isfinite(logits).all()
        for parameter in net.module.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()


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
    *, jitter: float, steps: int = 3000, floor: int = 1, watched: bool = False
) -> tuple[PruningAsSearch, list[Tensor]]:
    """Latents pulled by the regulariser alone; also what they were after each step.

    Args:
        jitter: Standard deviation of the latents at first.
        steps: Of the optimiser.
        floor: Of the layers.
        watched: Whether floors are kept, and collapses looked for.
    """
    torch.manual_seed(0)
    net = masked(Chain())
    for mask in net.masks:
        mask.latent.data += jitter * torch.randn(16)
    settings = PasSettings(target_share=0.5, floor=floor, step=1, steps_to_flip=200)
    search = pulled(net, price=MacPrice(net.graph), settings=settings)
    optimizer = torch.optim.SGD(
        search.latents, lr=search.latent_rates[0], momentum=search.momentum
    )
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(search.loss())
        optimizer.step()
        if watched:
            search.after_step()
        seen.append(torch.stack([mask.latent.detach().clone() for mask in net.masks]))
    return search, seen


def test_without_a_task_the_channels_of_a_layer_fall_together() -> None:
    _, seen = regularised(jitter=0.0, steps=600)
    assert all(torch.equal(row, row[0].expand(16)) for step in seen for row in step)
    assert any((step <= 0.5).all(1).any() for step in seen)


@pytest.mark.parametrize("rates", [(0.02,) * 4, (0.3, 0.02, 0.005, 0.02)])
@pytest.mark.parametrize("estimator", ["identity", "leaky_relu", "softplus"])
def test_the_price_alone_takes_a_channel_in_the_steps_that_are_set(
    estimator: Estimator, rates: tuple[float, ...]
) -> None:
    """The fastest layer's; so does whatever slope its indicator is given."""
    torch.manual_seed(0)
    net = masked(Chain(), estimator=estimator)
    settings = PasSettings(target_share=0.5, floor=1, step=1, steps_to_flip=200)
    search = pulled(
        net, price=MacPrice(net.graph), settings=settings, latent_rates=rates
    )
    optimizer = torch.optim.SGD(
        [
            {"params": [latent], "lr": rate}
            for latent, rate in zip(search.latents, search.latent_rates, strict=True)
        ],
        momentum=search.momentum,
    )
    steps = 0
    while bool(search.flags().all()):
        optimizer.zero_grad()
        torch.autograd.backward(search.loss())
        optimizer.step()
        steps += 1
        assert steps < 1000
    assert steps == pytest.approx(200, rel=0.15)


def test_latents_of_each_layer_are_stepped_at_their_own_rate() -> None:
    net = masked(Chain())
    rates = (0.3, 0.02, 0.005, 0.1)
    settings = PasSettings(target_share=0.5, floor=1, step=1)
    search = pulled(
        net, price=MacPrice(net.graph), settings=settings, latent_rates=rates
    )
    phase = Phase(name="any", epochs=1, peak_learning_rate=0.1, distill=False)
    optimizer = HybridOptimizer(
        net.module, Recipe(phases=(phase,), momentum=0.0), rates=search.rates
    )
    optimizer.set_learning_rate(0.1)
    before = net.latents()
    for mask in net.masks:
        mask.latent.grad = torch.ones_like(mask.latent)
    optimizer.step()
    for rate, old, new in zip(rates, before, net.latents(), strict=True):
        torch.testing.assert_close(new, old - rate)


def test_a_layer_at_its_floor_does_not_set_the_strength() -> None:
    def strength(rate: float, *, floor: int) -> float:
        net = masked(Chain())
        settings = PasSettings(target_share=0.9, floor=floor, step=1)
        rates = [0.02, 0.02, 0.02, rate]
        graph = replace(
            net.graph,
            groups=tuple(
                replace(group, channels=12 if index == 3 else group.channels)
                for index, group in enumerate(net.graph.groups)
            ),
        )
        net = replace(net, graph=graph)
        price = MacPrice(graph)
        return pulled(net, price=price, settings=settings, latent_rates=rates).strength

    assert strength(9.0, floor=12) == strength(0.0, floor=12)
    assert strength(9.0, floor=11) < strength(0.0, floor=11)


def test_latents_that_differ_settle_at_the_target() -> None:
    search, _ = regularised(jitter=0.2)
    assert abs(search.current_share() - 0.5) < 0.02


@pytest.mark.parametrize("jitter", [0.0, 0.005, 0.05, 0.2])
def test_what_is_watched_settles_at_the_target_too(jitter: float) -> None:
    search, seen = regularised(jitter=jitter, floor=4, watched=True)
    assert abs(search.current_share() - 0.5) < 0.02
    assert all((step > 0.5).sum(1).min() >= 4 for step in seen)


def test_what_falls_together_is_opened_again_by_whom_watches() -> None:
    search, seen = regularised(jitter=0.0, steps=600, watched=True)
    assert search.collapses
    assert all((step > 0.5).any(1).all() for step in seen)


def test_a_layer_between_two_empty_ones_feels_no_pull() -> None:
    net = masked(Chain())
    search = pulled(
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


def halving(net: MaskedNetwork, *, step: int = 4, steps: int = 0) -> PruningAsSearch:
    """A search for half of the MACs, with a floor of eight channels."""
    settings = PasSettings(target_share=0.5, floor=8, step=step)
    return pulled(net, price=MacPrice(net.graph), settings=settings, steps=steps)


def test_a_layer_keeps_its_floor() -> None:
    net = masked(Chain())
    search = pulled(
        net, price=MacPrice(net.graph), settings=PasSettings(target_share=0.7, floor=8)
    )
    net.masks[2].latent.data = torch.linspace(0.0, 0.45, 16)
    search.after_step()
    assert net.masks[2].kept().tolist() == list(range(8, 16))


def test_a_collapsed_layer_is_opened_again_and_told_of() -> None:
    net = masked(Chain())
    search = halving(net)
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


def test_a_layer_that_collapses_in_a_searchs_last_steps_is_opened_again() -> None:
    net = masked(Chain())
    search = halving(net, steps=COLLAPSE_WINDOW + 3)
    for _ in range(COLLAPSE_WINDOW):
        search.after_step()
    net.masks[1].latent.data = torch.linspace(0.1, 0.4, 16)
    for _ in range(3):
        search.after_step()
    assert search.collapses == [net.graph.groups[1].name]
    assert len(net.masks[1].kept()) == 16


class FlatAtTheTop(MacPrice):
    """Of a runtime that pads the last channels of every layer."""

    def __call__(self, counts: Tensor) -> Tensor:
        return super().__call__(counts.clamp(max=13))


def test_a_price_that_is_flat_at_the_top_pulls_further_down() -> None:
    """What a channel does not cost there, it costs below: the strength is of that."""
    net = masked(Chain())
    settings = PasSettings(target_share=0.3, floor=1, step=1)
    padded = pulled(net, price=FlatAtTheTop(net.graph), settings=settings)
    assert padded.strength > 0
    net = masked(Chain())
    for mask in net.masks:
        mask.latent.data[:4] = 0.0
    below = pulled(net, price=FlatAtTheTop(net.graph), settings=settings)
    gradients = torch.autograd.grad(below.loss(), [m.latent for m in net.masks])
    assert all((gradient > 0).all() for gradient in gradients)


@pytest.mark.parametrize("step", [4, 8, 16])
def test_a_narrow_layer_that_falls_to_nothing_has_collapsed(step: int) -> None:
    net = masked(Chain())
    search = halving(net, step=step)
    net.masks[1].latent.data = torch.linspace(0.1, 0.4, 16)
    net.masks[2].latent.data = torch.linspace(0.4, 0.9, 16)  # most stay
    for _ in range(COLLAPSE_WINDOW):
        search.after_step()
    assert search.collapses == [net.graph.groups[1].name]
    assert len(net.masks[1].kept()) == 16
    assert len(net.masks[2].kept()) == 12


def test_several_layers_that_collapse_at_once_halve_the_pull_once() -> None:
    net = masked(Chain())
    search = halving(net)
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
    search = pulled(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=target, floor=1, step=1),
    )
    first = search.strength
    search.strength /= 2
    for mask in net.masks:
        mask.latent.data[:removed] = 0.0
    for _ in range(80 * COLLAPSE_WINDOW):
        search.after_step()
    assert not search.collapses
    return first, search


def test_the_pull_grows_while_the_target_is_not_reached() -> None:
    """Its strength rises to what pulls so much harder than at first, and no further."""
    first, search = held(target=0.5, removed=3)
    excess = search.current_share() - 0.5
    assert excess > 0.02
    bound = MOST_PULL * first * 0.5 / max(excess, LEAST_OFF)
    assert search.strength == pytest.approx(bound)


def test_the_price_is_led_down_a_path() -> None:
    """What is above it is pulled at harder and harder, what is below less and less."""
    settings = PasSettings(target_share=0.5, floor=1, step=1, steps_to_flip=200)
    paths, factors = [], []
    for removed in (0, 2):
        net = masked(Chain())
        search = pulled(net, price=MacPrice(net.graph), settings=settings, steps=1000)
        for mask in net.masks:
            mask.latent.data[:removed] = 0.0
        share, strengths = search.current_share(), [search.strength]
        for _ in range(1000 // COLLAPSE_WINDOW):
            for _ in range(COLLAPSE_WINDOW):
                search.after_step()
            paths.append(search.path)
            strengths.append(search.strength)
            factors.append((share, search.path, strengths[-1] / strengths[-2]))
    assert paths[:10] == [1.0] * 10  # until the first channels fall
    assert paths[25] == pytest.approx(0.5 + 0.5 * (800 - 520) / 600)
    assert paths[39] == paths[49] == pytest.approx(0.5)
    above = [factor for share, path, factor in factors if share > 1.011 * path]
    below = [factor for share, path, factor in factors if share < path / 1.011]
    assert min(above) > 1 - 1e-9  # but for the bound, which pulls no harder
    assert sum(one == pytest.approx(STRENGTHENED) for one in above) > 10
    assert max(below) < 1 + 1e-9  # but for that of the strength, which fades no further
    assert sum(one == pytest.approx(1 / STRENGTHENED) for one in below) > 10


def test_the_strength_does_not_fade_for_good() -> None:
    settings = PasSettings(target_share=0.5, floor=1, step=1, steps_to_flip=800)
    net = masked(Chain())
    search = pulled(net, price=MacPrice(net.graph), settings=settings, steps=1000)
    first = search.strength
    for mask in net.masks:
        mask.latent.data[:2] = 0.0
    for _ in range(700):
        search.after_step()
    assert search.current_share() < 0.9 * search.path
    assert search.strength == pytest.approx(LEAST_STRENGTH * first)


@pytest.mark.parametrize("removed", [0, 1, 7])
def test_what_pulls_is_bounded(removed: int) -> None:
    """On either side of the target, whatever the strength was raised to before."""
    net = masked(Chain())
    settings = PasSettings(target_share=0.5, floor=1, step=1)
    search = pulled(net, price=MacPrice(net.graph), settings=settings)
    most = MOST_PULL * search.strength * 0.5
    for mask in net.masks:
        mask.latent.data[:removed] = 0.0
    search.strength *= 100
    for _ in range(COLLAPSE_WINDOW):
        search.after_step()
    off = abs(search.current_share() - 0.5)
    assert not search.collapses
    assert (search.current_share() < 0.5) == (removed == 7)
    assert search.strength * off <= most * (1 + 1e-9)


def test_the_pull_grows_while_the_price_stays_below_its_target() -> None:
    first, search = held(target=0.95, removed=3)
    off = 0.95 - search.current_share()
    assert off > 0.02
    bound = MOST_PULL * first * LEAST_DISTANCE / max(off, LEAST_OFF)
    assert search.strength == pytest.approx(bound)


def test_the_pull_eases_once_the_price_comes_back() -> None:
    net = masked(Chain())
    search = halving(net)
    for mask in net.masks:
        mask.latent.data[:7] = 0.0
    shares, strengths = [search.current_share()], [search.strength]
    for channels in (6, 5):
        for mask in net.masks:
            mask.latent.data[channels] = 1.0
        for _ in range(COLLAPSE_WINDOW):
            search.after_step()
        shares.append(search.current_share())
        strengths.append(search.strength)
    assert shares == sorted(shares)
    assert shares[1] < 0.49
    assert strengths[2] < strengths[1]


def test_a_search_of_other_settings_is_not_continued() -> None:
    net = masked(Chain())
    first, *others = [
        pulled(
            net,
            price=MacPrice(net.graph),
            settings=PasSettings(target_share=share, floor=1, step=1),
            latent_rates=rates,
        )
        for share, rates in (
            (0.5, (0.02,) * 4),
            (0.6, (0.02,) * 4),
            (0.5, (0.03,) * 4),
            (0.5, (0.02, 0.03, 0.02, 0.02)),
        )
    ]
    first.restore(first.state())
    for other in others:
        with pytest.raises(TrainingError, match="was another one"):
            other.restore(first.state())


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_a_target_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(SpaceError, match="above 0 and at most 1"):
        PasSettings(target_share=share)


def test_a_target_below_the_floors_is_refused() -> None:
    net = masked(Chain())
    with pytest.raises(SpaceError, match="the network still costs"):
        pulled(
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
    graph = channels(branched())
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


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class MeansOverChannels(nn.Module):
    """Its maps are as high as they are many: a mean over channels looks like one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.conv(x).mean(1).mean(2)))


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (pooled(nn.Conv2d(3, 5, 1), Branching()), "^1 cannot be traced"),
        (pooled(nn.Conv2d(3, 5, 1)), "Sequential has no channels"),
        (MeansOverChannels(), "channels of conv are removed"),
    ],
    ids=["branching", "outputs", "means"],
)
def test_a_layer_that_cannot_be_told_is_named(network: nn.Module, named: str) -> None:
    with pytest.raises(TraceError, match=named):
        own_network(network)


def test_layers_may_be_called_by_name() -> None:
    own = own_network(own_networks.CalledByName(nn.ReLU()))
    assert [group.name for group in own.graph.groups] == ["conv", "last"]


def test_networks_of_other_activations_are_other_operations() -> None:
    """What is alike in layers and widths may still take another time."""
    kinds = (nn.ReLU(), nn.SiLU(), nn.ReLU())
    networks = [own_network(own_networks.CalledByName(kind)) for kind in kinds]
    first, other, same = (network.operations() for network in networks)
    assert first == same != other


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(TraceError, match=r"stem cannot be traced on images of shape"):
        trace_channels(own("residual"), input_shape=(1, 12, 12))


def test_channels_of_grouped_convolutions_stay() -> None:
    names = [group.name for group in channels(own("gated")).groups]
    assert names == ["stem.0", "gate.reduce", "last.0"]


class Normed(nn.Module):
    """A norm over several channels behind a convolution."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), norm
        self.last, self.head = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(F.relu(self.norm(self.stem(x)))))
        return cast(Tensor, self.head(x.mean((2, 3))))


class Mixing(nn.Module):
    """Channels that are parted, multiplied, and handed on in another order."""

    def __init__(self, *, shuffles: bool) -> None:
        super().__init__()
        self.stem, self.shuffles = nn.Conv2d(3, 16, 3, padding=1), shuffles
        self.last = nn.Conv2d(16 if shuffles else 8, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if self.shuffles:
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        else:
            one, other = x.chunk(2, dim=1)
            x = one * torch.sigmoid(other)
        return cast(Tensor, self.head(F.relu(self.last(x)).mean((2, 3))))


MIXED: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: Normed(nn.GroupNorm(4, 16)),
    "layer norm": lambda: Normed(nn.GroupNorm(1, 16)),
    "instance norm": lambda: Normed(nn.InstanceNorm2d(16, affine=True)),
    "parted": lambda: Mixing(shuffles=False),
    "shuffled": lambda: Mixing(shuffles=True),
}


@pytest.mark.parametrize("name", MIXED)
def test_channels_that_are_mixed_stay_whole_or_go_exactly(name: str) -> None:
    torch.manual_seed(0)
    brought = OwnNetwork.of(
        MIXED[name]().eval(),
        resolution=12,
        normalisation=Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        class_names=tuple("abcde"),
    )
    groups = brought.graph.groups
    assert groups[-1].name == "last"
    if name in ("group norm", "layer norm", "shuffled"):
        assert len(groups) == 1
    masked = brought.masked()
    kept = [torch.arange(0, group.channels, 2) for group in groups]
    for mask, indices in zip(masked.masks, kept, strict=True):
        mask.keep_only(indices)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = masked.module.eval()(x)
        found = brought.remainder(masked, kept).eval()(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -- what was fused already ------------------------------------------------------------


def test_a_fused_network_has_channels_to_remove_like_any_other() -> None:
    """It has no branches left, whatever its plan says of them."""
    network = branched()
    fused = FusedNet(network.plan, fuse(network.weights(), network.plan)).eval()
    brought = OwnNetwork.of(
        fused,
        resolution=12,
        normalisation=Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        class_names=tuple("abcde"),
    )
    assert not brought.is_chain
    masked = brought.masked()
    kept = [torch.arange(0, group.channels, 2) for group in brought.graph.groups]
    for mask, indices in zip(masked.masks, kept, strict=True):
        mask.keep_only(indices)
    x = torch.randn(2, 3, 12, 12)
    narrow = brought.remainder(masked, kept).eval()
    with torch.no_grad():
        expected, found = masked.module.eval()(x), narrow(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
