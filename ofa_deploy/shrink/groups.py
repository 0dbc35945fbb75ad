"""Which channels of a network can only be removed together, and who reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.layers import LinearLayer, Pair, RepConvLayer, Window
from ofa_deploy.nn.static import PlannedNet

Side = Literal["in", "out"]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Channels that are alike, each of which is kept or removed everywhere.

    Args:
        name: Of the first layer that writes them.
        channels: How many.
    """

    name: str
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """Where a group's channels are on one side of a module.

    Args:
        module: Its path.
        side: What it reads, or what it writes.
        group: Index of the group.
        positions: Indices among the module's channels, or features.
        channels: For each position, the index among the group's channels.
    """

    module: str
    side: Side
    group: int
    positions: Indices
    channels: Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedLayer:
    """A convolution or a linear layer, and what it works on.

    Args:
        name: Path of the module.
        window: How it goes over its input; None of a linear layer.
        groups: Of the convolution.
        in_channels: Of the whole network.
        out_channels: Of the whole network.
        in_size: Height and width of its input, of the largest call, if it has several;
            of one that pads itself, of a map of as many places; of a linear layer the
            places that it is called at, and 1.
        call_places: Places of its output at which it computes, of each call.
        is_projection: Whether it is left out where it reads as many channels as it
            writes.
    """

    name: str
    window: Window | None
    groups: int
    in_channels: int
    out_channels: int
    in_size: Pair
    call_places: tuple[int, ...]
    is_projection: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        return self.window is None

    @property
    def kernel(self) -> Pair:
        """Height and width; 1 and 1 of a linear layer."""
        return self.window.kernel if self.window else (1, 1)

    @property
    def depthwise(self) -> bool:
        """Whether each channel is filtered alone."""
        return 1 < self.groups == self.in_channels == self.out_channels

    @property
    def places(self) -> int:
        """Places of its output at which it computes, all calls together."""
        return sum(self.call_places)

    @property
    def repeats(self) -> float:
        """What all its calls are, as a multiple of the largest."""
        return self.places / max(self.call_places)

    @property
    def macs_per_pair(self) -> float:
        """Multiply-accumulates of one pair of channels, read and written.

        Of a depthwise convolution, of one channel.
        """
        height, width = self.kernel
        products = height * width * self.places
        return products / (1 if self.depthwise else self.groups)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelGraph:
    """Channels of a network that can be removed.

    Args:
        groups: In the order in which they are written.
        cuts: Where they are.
        layers: In the order in which they are called.
        removable: Names of layers that may go with all that they are in.
    """

    groups: tuple[ChannelGroup, ...]
    cuts: tuple[Cut, ...]
    layers: tuple[TracedLayer, ...]
    removable: frozenset[str] = frozenset()

    def cuts_at(self, module: str, side: Side) -> tuple[Cut, ...]:
        """Of all groups, on one side of a module."""
        return tuple(c for c in self.cuts if c.module == module and c.side == side)

    def readers(self) -> dict[str, tuple[Cut, ...]]:
        """Layers that read channels which can go, and these."""
        read = {
            layer.name: self.cuts_at(layer.name, "in")
            for layer in self.layers
            if not layer.depthwise
        }
        return {name: cuts for name, cuts in read.items() if cuts}

    def only(self, groups: Sequence[int]) -> ChannelGraph:
        """The same with all other groups left whole."""
        place = {group: index for index, group in enumerate(groups)}
        return replace(
            self,
            groups=tuple(self.groups[group] for group in groups),
            cuts=tuple(
                replace(cut, group=place[cut.group])
                for cut in self.cuts
                if cut.group in place
            ),
        )


def planned_channels(network: PlannedNet) -> ChannelGraph:
    """A chain of branched convolutions: each one's output is a group."""
    groups: list[ChannelGroup] = []
    cuts: list[Cut] = []
    layers = []
    for place, block in enumerate(network.plan.blocks):
        for index, layer in enumerate(block.layers):
            path = f"blocks.{place}.layers.{index}"
            if not isinstance(layer, RepConvLayer | LinearLayer):
                continue
            if groups:
                cuts.append(_whole_cut(path, "in", len(groups) - 1, groups[-1]))
            is_linear = isinstance(layer, LinearLayer)
            conv = None if isinstance(layer, LinearLayer) else layer.merged
            layers.append(
                TracedLayer(
                    name=path,
                    window=None if conv is None else conv.window,
                    groups=1,
                    in_channels=layer.in_channels,
                    out_channels=layer.out_channels,
                    in_size=(1, 1) if conv is None else (conv.in_size, conv.in_size),
                    call_places=(1 if conv is None else conv.out_size**2,),
                )
            )
            if not is_linear:
                groups.append(
                    ChannelGroup(name=layer.name, channels=layer.out_channels)
                )
                cuts.append(_whole_cut(path, "out", len(groups) - 1, groups[-1]))
    return ChannelGraph(
        groups=tuple(groups),
        cuts=tuple(cuts),
        layers=tuple(layers),
    )


def _whole_cut(module: str, side: Side, index: int, group: ChannelGroup) -> Cut:
    everything = np.arange(group.channels)
    return Cut(
        module=module,
        side=side,
        group=index,
        positions=everything,
        channels=everything,
    )
