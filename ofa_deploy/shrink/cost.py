"""What a network costs as a function of the channels that are kept: MACs, or ms.

Every price is a differentiable function of a vector of channel counts, so that methods
that learn widths by gradient, and those that search, read the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ofa_deploy.shrink.groups import ChannelGraph, Consumer


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


class Counts:
    """Where each layer's channel counts stand in a vector of groups' counts.

    Args:
        graph: Whose layers.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._fixed: list[float] = []
        group_count = len(graph.groups)
        self._in = self._places(
            [(c.in_group, c.in_channels) for c in graph.consumers], group_count
        )
        self._out = self._places(
            [(c.out_group, c.out_channels) for c in graph.consumers], group_count
        )

    def _places(
        self, sides: Sequence[tuple[int | None, int]], group_count: int
    ) -> Tensor:
        places = []
        for group, channels in sides:
            if group is None:
                group = group_count + len(self._fixed)
                self._fixed.append(float(channels))
            places.append(group)
        return torch.tensor(places, dtype=torch.long)

    def of_layers(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Channels read and written by each layer, `(layers,)` each, in float64."""
        every = torch.cat(
            [counts.double(), torch.tensor(self._fixed, dtype=torch.float64)]
        )
        return every[self._in], every[self._out]


class MacPrice:
    """Million multiply-accumulates of one image.

    Args:
        graph: Of the network.
    """

    unit = "MMACs"

    def __init__(self, graph: ChannelGraph) -> None:
        self._counts = Counts(graph)
        consumers = graph.consumers
        self._macs = torch.tensor(
            [_macs_per_pair(c) for c in consumers], dtype=torch.float64
        )
        self._alone = torch.tensor([c.depthwise for c in consumers])

    def __call__(self, counts: Tensor) -> Tensor:
        """See `Price`."""
        read, written = self._counts.of_layers(counts)
        read = torch.where(self._alone, torch.ones_like(read), read)
        return (self._macs * read * written).sum() / 1e6


def _macs_per_pair(layer: Consumer) -> float:
    return layer.macs_per_pair / (1 if layer.depthwise else layer.groups)


def full_counts(graph: ChannelGraph) -> Tensor:
    """Channel counts of the whole network, `(groups,)`."""
    counts = [float(group.channels) for group in graph.groups]
    return torch.tensor(counts, dtype=torch.float64)
