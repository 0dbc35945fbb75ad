"""A user's networks, and calls to shrink them on devices of made-up prices."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.constraints import Constraints
from ofa_deploy.dataset import ImageSet
from ofa_deploy.export.lone_layer import LoneLayer
from ofa_deploy.exporting import ExportedNetwork
from ofa_deploy.families import repvgg
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.plan import lower
from ofa_deploy.reporting import Silent
from ofa_deploy.shrink import device_prices, fitting
from ofa_deploy.shrink.channel_prices import LatencyPrice, timed_layers
from ofa_deploy.shrink.cost import full_counts
from ofa_deploy.shrink.device_prices import DevicePrices, measure_prices
from ofa_deploy.shrink.fitting import Fitting
from ofa_deploy.shrink.groups import ChannelGraph
from ofa_deploy.shrink.legr import LegrSettings
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import Method, ShrinkRecipe, default_shrink_recipe
from ofa_deploy.shrink.shrinking import Shrinking
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.target import Target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import TrainingLoop
from ofa_deploy.train.recipe import Phase, Recipe
from profilers.backends import get_backend
from profilers.fresh import FreshMeasurement
from tests.support import tiny, tiny_session
from tests.support.quick import QUICK

SIZE = tiny.IMAGE_SIZE


QUICK_LEGR = LegrSettings(
    evaluations=8,
    population=4,
    samples=2,
    training_count=36,
    validation_count=12,
)


def time_quickly(patch: pytest.MonkeyPatch) -> None:
    """Few runs: for tests that do not ask how precise the timing is."""
    patch.setattr(device_prices, "PROFILE_SETTINGS", QUICK)
    patch.setattr(device_prices, "STEP_SETTINGS", QUICK)
    patch.setattr(device_prices, "CERTIFY_SETTINGS", QUICK)
    patch.setattr(device_prices, "CERTIFY_PROCESSES", 1)
    patch.setattr(device_prices, "RANDOM_NETWORKS", 2)
    # So few runs scatter; that something near the budget is found is not asked.
    patch.setattr(fitting, "NEAR_BUDGET", (0.5, 1.0))
    # What misses by chance is followed by something that is far below.
    patch.setattr(fitting, "AIMED_SHARE", 0.75)


def data() -> ImageSet:
    return tiny.images(per_class=40, seed=11)


def recipe(**changes: Any) -> ShrinkRecipe:
    found = default_shrink_recipe(search_epochs=6, finetune_epochs=4, batch_size=18)
    found = replace(
        found,
        search=replace(found.search, crop_padding=1),
        finetune=replace(found.finetune, crop_padding=1),
        floor=4,
        step=4,
        legr=QUICK_LEGR,
    )
    return replace(found, **changes)


def branched() -> StaticNet:
    space = repvgg.small(class_count=3)
    space = replace(
        space,
        resolutions=(SIZE,),
        stem=replace(space.stem, out_channels=16),
        stages=(repvgg.stage(32, depths=(1,)), repvgg.stage(48, depths=(1,))),
    )
    torch.manual_seed(0)
    return StaticNet(lower(space, space.largest()))


class ResidualNet(nn.Module):
    """A user's network with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 48, 3, 1, 1, bias=False)
        self.inner_norm = nn.BatchNorm2d(48)
        self.outer = nn.Conv2d(48, 32, 3, 1, 1, bias=False)
        self.outer_norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x)))))
        return cast(Tensor, self.head(F.relu(x + y).mean((2, 3))))


def train(network: nn.Module, *, epochs: int = 6) -> nn.Module:
    phase = Phase(name="dense", epochs=epochs, peak_learning_rate=0.05, distill=False)
    settings = Recipe(phases=(phase,), batch_size=18, crop_padding=1)
    TrainingLoop(
        network,
        images=TrainingImages(data(), settings),
        recipe=settings,
        resolution=SIZE,
        folder=None,
        bf16=False,
    ).run()
    return network.eval()


def trained_chain() -> StaticNet:
    network = train(branched())
    assert isinstance(network, StaticNet)
    return network


def products(layer: LoneLayer) -> int:
    """Multiply-accumulates of a layer that is timed by itself."""
    return math.prod((*layer.weight_shape, *layer.out_size))


def measured_prices(
    own: OwnNetwork, caches: Path, *, backend: str = "onnxruntime-cpu"
) -> DevicePrices:
    """Of a network on a device, in channels by the four."""
    return measure_prices(
        own,
        target=Target(backend=backend, threads=1),
        backend=get_backend(backend),
        step=4,
        folder=caches,
        reporter=Silent(),
    )


def priced_ms(
    own: OwnNetwork, caches: Path, *, backend: str = "onnxruntime-cpu"
) -> float:
    """A whole network's price on a device."""
    prices = measured_prices(own, caches, backend=backend)
    return float(prices.price(full_counts(own.graph)))


def own_network(network: nn.Module, *, narrowed: bool = True) -> OwnNetwork:
    return OwnNetwork.of(
        network,
        resolution=SIZE,
        normalisation=tiny.NORMALISATION,
        class_names=tiny.CLASS_NAMES,
        narrowed=narrowed,
    )


def call_of(
    network: nn.Module,
    work: Path,
    *,
    budget_share: float,
    method: Method = "pas",
    **limits: Any,
) -> tuple[Shrinking, DevicePrices]:
    """A call, with a share of what a network is priced at as its budget."""
    own = own_network(network)
    if method == "tas":
        own = searched_by_tas(own, step=4)
    prices = made_up_prices(own)
    full_ms = float(prices.price(full_counts(own.graph)))
    settings = recipe()
    call = Shrinking(
        own=own,
        method=method,
        target=Target(backend="onnxruntime-cpu", threads=1),
        constraints=Constraints(latency_ms=budget_share * full_ms, **limits),
        recipe=settings,
        images=TrainingImages(data(), settings.search),
        ranked_on=data(),
        evaluation=data(),
        work=work,
        reporter=Silent(),
    )
    return call, prices


def measured_as(monkeypatch: pytest.MonkeyPatch, *, factor: float) -> None:
    """Let the device take `factor` times what it is priced at."""

    def measure(self: Fitting, exported: ExportedNetwork) -> FreshMeasurement:
        return tiny_session.fresh(factor * exported.facts.cost.mac_count / 1e6)

    monkeypatch.setattr(Fitting, "measure", measure)


def priced_by_macs(
    graph: ChannelGraph, *, step: int, constant_ms: float = 0.0
) -> LatencyPrice:
    """As if a million multiply-accumulates took a millisecond."""
    layers = timed_layers(graph, step=step)
    return LatencyPrice(
        graph,
        latency_ms={key: products(layer) / 1e6 for key, layer in layers.items()},
        step=step,
        constant_ms=constant_ms,
    )


def made_up_prices(own: OwnNetwork) -> DevicePrices:
    price = priced_by_macs(own.graph, step=4)
    table = tiny.latency_table(
        tiny.SPACE, networks=[], network_ms=lambda config: 1.0, origin="measured"
    )
    runtime = get_backend("onnxruntime-cpu").runtime(threads=1)
    table = replace(table, runtime=runtime)
    return DevicePrices(price=price, table=table, step=4, residual_ratio=0.01)
