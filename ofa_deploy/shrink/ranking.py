"""One order in which a network's channels go, and the structures that it leaves.

Removing channels in one order, whatever the budget, makes a nested family: what a small
network keeps, a larger one keeps too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError
from ofa_deploy.fuse import fuse
from ofa_deploy.layers import RepConvLayer
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.shrink.cost import LayerPrices, Price
from ofa_deploy.shrink.groups import ChannelGraph, Indices

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A layer that writes channels of groups, and the norms of its filters.

    Args:
        name: Path of the module.
        norms: Squared L2 norm of each filter, `(channels,)`.
        groups: Index of the group of each channel; -1 of those that stay.
        channels: Index of each channel in its group.
    """

    name: str
    norms: Floats
    groups: Indices
    channels: Indices


def writers(
    network: nn.Module, graph: ChannelGraph, *, norm_power: int = 2
) -> list[Writer]:
    """Convolutions and linear layers that write channels which can go.

    Args:
        network: That the graph is of.
        graph: Its channels.
        norm_power: 2 for the filters' squared norms, as LeGR's code has them; 1 for
            the norms, as its text does.
    """
    found = []
    merged = _merged_kernels(network)
    for layer in graph.layers:
        cuts = graph.cuts_at(layer.name, "out")
        if not cuts:
            continue
        norms = _filter_norms(network, layer.name, merged) ** (norm_power / 2)
        groups = np.full(len(norms), -1, dtype=np.intp)
        channels = np.zeros(len(norms), dtype=np.intp)
        for cut in cuts:
            groups[cut.positions] = cut.group
            channels[cut.positions] = cut.channels
        found.append(
            Writer(name=layer.name, norms=norms, groups=groups, channels=channels)
        )
    return found


def _filter_norms(
    network: nn.Module, name: str, merged: Mapping[str, NDArray[np.float32]]
) -> Floats:
    """Squared, of a layer's filters; of a branched one's, that its branches make."""
    if name in merged:
        weight = torch.from_numpy(merged[name])
    else:
        found = network.get_submodule(name).weight
        assert isinstance(found, Tensor)
        weight = found.detach()
    norms: Floats = weight.double().flatten(1).square().sum(1).numpy()
    return norms


def _merged_kernels(network: nn.Module) -> dict[str, NDArray[np.float32]]:
    """What branches make together, by the path of their layer."""
    if not isinstance(network, StaticNet):
        return {}
    fused = fuse(network.weights(), network.plan)
    return {
        f"blocks.{place}.layers.{index}": fused[f"{layer.name}.weight"]
        for place, block in enumerate(network.plan.blocks)
        for index, layer in enumerate(block.layers)
        if isinstance(layer, RepConvLayer)
    }


def group_scores(
    graph: ChannelGraph, sources: Sequence[Writer], scores: Sequence[Floats]
) -> list[Floats]:
    """Scores of each group's channels: the sum over the layers that write them.

    Args:
        graph: Of the channels.
        sources: The layers.
        scores: Of each layer's channels, `(channels,)`.
    """
    totals = [np.zeros(group.channels) for group in graph.groups]
    for source, score in zip(sources, scores, strict=True):
        for index, total in enumerate(totals):
            mine = source.groups == index
            np.add.at(total, source.channels[mine], score[mine])
    return totals


class ChannelOrder(Protocol):
    """Which channels of a network go before which."""

    def within(self, price: LayerPrices, most: float) -> list[int]:
        """Channels of each group in the structure for a budget.

        Args:
            price: Of channel counts.
            most: Price not to exceed.

        Raises:
            SpaceError: Even the least structure costs more.
        """

    def kept(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Indices of the channels that stay, ascending, of each group."""


class RemovalOrder:
    """The order in which steps of channels go: always what scores least.

    Within a group channels go in ascending order of their scores, a step at a time; of
    all groups' next steps the one with the lowest mean goes. Each group keeps a floor.

    Args:
        scores: Of each group's channels, `(channels,)`.
        step: Counts are multiples of this, or all that a group has.
        floors: Least count of each group.
    """

    def __init__(
        self, scores: Sequence[Floats], *, step: int, floors: Sequence[int]
    ) -> None:
        self.scores = list(scores)
        self._full = np.array([len(score) for score in scores])
        groups, counts, means = [], [], []
        for index, (score, floor) in enumerate(zip(scores, floors, strict=True)):
            ascending = np.sort(score)
            count, last = len(score), -np.inf
            while count > floor:
                fewer = max(floor, (count - 1) // step * step)
                removed = ascending[len(score) - count : len(score) - fewer]
                # Rounding must not let a step come before its predecessor.
                last = max(last, float(removed.mean()))
                groups.append(index)
                counts.append(fewer)
                means.append(last)
                count = fewer
        order = np.argsort(np.array(means), kind="stable")
        self._groups = np.array(groups, dtype=np.intp)[order]
        self._counts = np.array(counts, dtype=np.intp)[order]

    def __len__(self) -> int:
        return len(self._groups)

    def counts(self, steps: int) -> list[int]:
        """Channels of each group after that many steps went."""
        found = self._full.copy()
        # A group's later steps come later: the last assignment stands.
        found[self._groups[:steps]] = self._counts[:steps]
        return [int(count) for count in found]

    def within(self, price: Price, most: float) -> list[int]:
        """See `ChannelOrder`: the first structure that costs no more.

        The price is to fall along the order; where it does not, it is the first of
        some of those that cost no more after one that does.
        """

        def cost(steps: int) -> float:
            return float(price(torch.tensor(self.counts(steps), dtype=torch.float64)))

        low, high = 0, len(self)
        if cost(0) <= most:
            return self.counts(0)
        if cost(high) > most:
            raise SpaceError(
                f"with its floors of channels the network still costs {cost(high):.4g} "
                f"{price.unit}, more than {most:.4g}; ask for at least that, or lower "
                "the floor"
            )
        while high - low > 1:  # cost(low) > most >= cost(high)
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) > most else (low, middle)
        return self.counts(high)

    def kept(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """See `ChannelOrder`: those that score most."""
        return tuple(
            torch.from_numpy(np.sort(np.argsort(-score, kind="stable")[:count]))
            for score, count in zip(self.scores, counts, strict=True)
        )


def quota_floors(graph: ChannelGraph, *, safeguard: float, step: int) -> list[int]:
    """Least channels of each group, for the group as a whole.

    LeGR's code counts quotas layer by layer, which lets skips whose layers differ in
    width lose different channels; one quota a group cannot.

    Args:
        graph: Of the channels.
        safeguard: Share that is kept in any case, 0..1.
        step: Floors are multiples of this, or all that a group has.

    Raises:
        SpaceError: The safeguard is no share.
    """
    if not 0 <= safeguard <= 1:
        raise SpaceError(f"safeguard={safeguard:g}; give a share from 0 to 1")
    least = 1 if safeguard == 0 else 2
    floors = []
    for group in graph.groups:
        floor = max(least, int(np.ceil(safeguard * group.channels)))
        floors.append(min(group.channels, -(-floor // step) * step))
    return floors
