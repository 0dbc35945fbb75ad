"""What a network costs as a function of the channels that are kept: MACs, or ms.

Every price is a differentiable function of a vector of channel counts, so that methods
that learn widths by gradient, and those that search, read the same one.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ofa_deploy.shrink.groups import ChannelGraph, Side


class Price(Protocol):
    """A cost by channel counts.

    Attributes:
        unit: Such as `MMACs` or `ms`.
    """

    unit: str

    def __call__(self, counts: Tensor) -> Tensor:
        """The cost of a network, a scalar.

        Args:
            counts: Channels of each group, `(groups,)`.
        """


class LayerPrices(Price, Protocol):
    """A price that is a sum over layers."""

    @property
    def constant(self) -> float:
        """What every network costs besides its layers."""

    def of_graph(self, graph: ChannelGraph) -> LayerPrices:
        """The same of a part of the network."""

    def of_layer(self, place: int, read: float, written: float) -> float:
        """What one layer costs.

        Args:
            place: Index of the layer.
            read: Channels that it reads.
            written: Channels that it writes.
        """


class Counts:
    """Channel counts of layers, as a linear function of the groups' counts.

    Args:
        graph: Whose layers.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._read = _Side(graph, "in")
        self._written = _Side(graph, "out")

    def of_layers(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Channels read and written by each layer, `(layers,)` each, in float64."""
        counts = counts.double()
        return self._read.of_layers(counts), self._written.of_layers(counts)


class _Side:
    """What layers have on one side: `always`, and so much of each group's channels."""

    def __init__(self, graph: ChannelGraph, side: Side) -> None:
        shares = np.zeros((len(graph.layers), len(graph.groups)))
        always = np.zeros(len(graph.layers))
        for place, layer in enumerate(graph.layers):
            # A depthwise convolution reads what it writes.
            one = "out" if layer.depthwise else side
            cuts = graph.cuts_at(layer.name, one)
            for cut in cuts:
                channels = graph.groups[cut.group].channels
                shares[place, cut.group] += len(cut.positions) / channels
            width = layer.in_channels if one == "in" else layer.out_channels
            always[place] = width - sum(len(cut.positions) for cut in cuts)
        self._shares, self._always = torch.from_numpy(shares), torch.from_numpy(always)

    def of_layers(self, counts: Tensor) -> Tensor:
        return self._shares @ counts + self._always


class MacPrice:
    """Million multiply-accumulates of one image.

    Args:
        graph: Of the network.
    """

    unit = "MMACs"

    def __init__(self, graph: ChannelGraph) -> None:
        self._counts = Counts(graph)
        self._macs = torch.tensor(
            [layer.macs_per_pair for layer in graph.layers], dtype=torch.float64
        )
        self._alone = torch.tensor([layer.depthwise for layer in graph.layers])
        self._projects = torch.tensor([layer.is_projection for layer in graph.layers])

    def __call__(self, counts: Tensor) -> Tensor:
        """See `Price`."""
        read, written = self._counts.of_layers(counts)
        left_out = self._projects & (read == written)
        read = torch.where(self._alone, torch.ones_like(read), read)
        macs = self._macs * read * written
        return torch.where(left_out, torch.zeros_like(macs), macs).sum() / 1e6

    @property
    def constant(self) -> float:
        """See `LayerPrices`."""
        return 0.0

    def of_graph(self, graph: ChannelGraph) -> MacPrice:
        """See `LayerPrices`."""
        return MacPrice(graph)

    def of_layer(self, place: int, read: float, written: float) -> float:
        """See `LayerPrices`."""
        if self._projects[place] and read == written:
            return 0.0
        read = 1.0 if self._alone[place] else read
        return float(self._macs[place]) * read * written / 1e6


def full_counts(graph: ChannelGraph) -> Tensor:
    """Channel counts of the whole network, `(groups,)`."""
    counts = [float(group.channels) for group in graph.groups]
    return torch.tensor(counts, dtype=torch.float64)


def rounded_up(value: float) -> float:
    """To four digits, never below: what is asked for by it is allowed."""
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit
