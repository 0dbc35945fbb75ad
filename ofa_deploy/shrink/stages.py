"""What a search may choose in a network: groups of channels, and rows of blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ofa_deploy.shrink.groups import ChannelGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks of one shape in a row, of which the last ones may go.

    Args:
        container: Path of the `nn.Sequential` that they are in.
        first: Index of the first one in it.
        blocks: How many.
        layers: Names of the convolutions of each block.
    """

    container: str
    first: int
    blocks: int
    layers: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """For people."""
        last = self.first + self.blocks - 1
        return f"{self.container or 'network'}[{self.first}:{last + 1}], blocks"


def normed_layers(network: nn.Module, image: Tensor) -> dict[str, str]:
    """Convolutions whose output is what a batch norm reads, and that norm, by name."""
    writer_of: dict[int, str] = {}
    found: dict[str, str] = {}
    alive: list[Tensor] = []  # so that no two outputs share an address

    def note_output(name: str, output: Tensor) -> None:
        alive.append(output)
        writer_of[id(output)] = name

    def note_input(name: str, read: Tensor) -> None:
        if id(read) in writer_of:
            found[writer_of[id(read)]] = name

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, output, name=name: note_output(name, output)
                )
            )
        if isinstance(module, nn.BatchNorm2d):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, name=name: note_input(name, args[0])
                )
            )
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


def searchable_groups(
    network: nn.Module, graph: ChannelGraph, image: Tensor
) -> list[int]:
    """Groups whose channels pass batch norms right where they are written.

    A convolution without one, as some shortcuts are, may write to them, too.

    Args:
        network: Traced.
        graph: Its channels.
        image: `(1, 3, H, W)`.
    """
    norm_of = normed_layers(network, image)
    behind = set(norm_of.values())
    layers = {layer.name: layer for layer in graph.layers}
    shared = [cut.module for cut in graph.cuts if cut.side == "out"]
    found = []
    for index, group in enumerate(graph.groups):
        written = [c for c in graph.cuts if c.group == index and c.side == "out"]
        # Norms whose channels are of several groups, or of none, cannot be cut short.
        whole = all(
            len(cut.positions) == group.channels and shared.count(cut.module) == 1
            for cut in written
        ) and all(
            layers[cut.module].out_channels == group.channels
            for cut in written
            if cut.module in layers
        )
        convs = [cut.module for cut in written if cut.module in layers]
        norms = [cut.module for cut in written if cut.module not in layers]
        if (
            whole
            and any(name in norm_of for name in convs)
            and all(name in behind for name in norms)
        ):
            found.append(index)
    return found


def find_stages(network: nn.Module, graph: ChannelGraph) -> tuple[Stage, ...]:
    """Runs of blocks in `nn.Sequential`s that write one group, and read it.

    The first one of a run may read another; it is always kept.
    """
    names = [layer.name for layer in graph.layers]
    stages = []
    for container, module in network.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        prefix = f"{container}." if container else ""
        inside = [
            tuple(name for name in names if name.startswith(f"{prefix}{child}."))
            for child, _ in module.named_children()
        ]
        run: list[int] = []
        for place, layers in enumerate(inside):
            if run and layers and _goes_on(graph, inside[run[-1]], layers):
                run.append(place)
                continue
            stages += _stage(container, run, inside)
            run = [place] if layers else []
        stages += _stage(container, run, inside)
    return tuple(stages)


def _stage(
    container: str, run: Sequence[int], inside: Sequence[tuple[str, ...]]
) -> list[Stage]:
    if len(run) < 2:
        return []
    layers = tuple(inside[place] for place in run)
    return [Stage(container=container, first=run[0], blocks=len(run), layers=layers)]


def _written(graph: ChannelGraph, layers: Sequence[str]) -> int | None:
    """The group that a block's last convolution writes; None of no single one."""
    groups = {cut.group for cut in graph.cuts_at(layers[-1], "out")}
    return groups.pop() if len(groups) == 1 else None


def _goes_on(graph: ChannelGraph, before: Sequence[str], layers: Sequence[str]) -> bool:
    """Whether a block reads and writes the group that the one before it writes."""
    written = _written(graph, layers)
    read = {cut.group for name in layers for cut in graph.cuts_at(name, "in")}
    return (
        written is not None and written in read and written == _written(graph, before)
    )


def shallower(
    network: nn.Module, stages: Sequence[Stage], depths: Sequence[int]
) -> nn.Module:
    """A copy of a network with nothing in place of the last blocks of its stages.

    All others keep their paths.

    Args:
        network: Stays as it is.
        stages: Of it.
        depths: Blocks of each that are kept.
    """
    result = copy.deepcopy(network)
    for stage, depth in zip(stages, depths, strict=True):
        sequence = result.get_submodule(stage.container)
        assert isinstance(sequence, nn.Sequential)
        for place in range(stage.first + depth, stage.first + stage.blocks):
            sequence[place] = nn.Identity()
    return result
