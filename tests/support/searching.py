"""Networks that TAS searches, and structures to choose in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.families.cifar_resnet import ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.shrink.cost import Price
from ofa_deploy.shrink.masks import MaskedNetwork
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.pas import PasSettings, PruningAsSearch
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.tas_network import SearchedNetwork, insert_distributions

LATENT_RATE = 0.02


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def owned(network: nn.Module, *, resolution: int, class_count: int) -> OwnNetwork:
    """Traced, for images that are not normalised."""
    return OwnNetwork.of(
        network,
        resolution=resolution,
        normalisation=Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3),
        class_names=tuple(f"{index}" for index in range(class_count)),
    )


def pulled(
    net: MaskedNetwork,
    *,
    price: Price,
    settings: PasSettings,
    latent_rates: Sequence[float] | None = None,
    steps: int = 0,
) -> PruningAsSearch:
    """The price's pull on a network's masks, at one rate unless others are given."""
    return PruningAsSearch(
        net,
        price=price,
        settings=settings,
        latent_rates=latent_rates or [LATENT_RATE] * len(net.masks),
        steps=steps,
    )


@lru_cache(maxsize=3)
def resnet(depth: int, *, projects: bool = True) -> OwnNetwork:
    """The published network, with what tas can search."""
    torch.manual_seed(0)
    network = CifarResNet(ResNetShape.dense(depth))
    own = owned(network, resolution=32, class_count=10)
    return searched_by_tas(own, projects=projects)


def searched(
    network: OwnNetwork, *, step: int = 1, fresh: bool = False
) -> SearchedNetwork:
    """With distributions; the same every time."""
    torch.manual_seed(0)
    return insert_distributions(
        network.module,
        network.graph,
        image=network.image,
        step=step,
        searches_depth=True,
        fresh=fresh,
    )


def scattered(net: SearchedNetwork, seed: int, *, spread: float = 2.0) -> None:
    """Let some choices be likelier than others."""
    for index, one in enumerate(net.module.distributions):
        one.logits.data = spread * drawn(seed + index, len(one.choices))


def chosen(data: st.DataObject, net: SearchedNetwork) -> tuple[list[int], list[int]]:
    """Any widths and depths."""
    widths = [data.draw(st.sampled_from(d.choices)) for d in net.width_distributions]
    depths = [data.draw(st.sampled_from(d.choices)) for d in net.depth_distributions]
    return widths, depths


def picked(net: SearchedNetwork) -> tuple[list[int], list[int]]:
    """Widths and depths, each drawn by its probabilities."""
    found = [
        one.choices[int(torch.multinomial(one.probabilities.detach(), 1))]
        for one in net.module.distributions
    ]
    groups = len(net.graph.groups)
    return found[:groups], found[groups:]


def shape_of(widths: list[int], depths: list[int]) -> ResNetShape:
    """Of a residual network with these widths and depths."""
    first, second, third = depths
    return ResNetShape(widths=tuple(widths), kept_blocks=(first, second, third))
