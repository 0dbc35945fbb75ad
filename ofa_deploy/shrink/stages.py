"""What a search may choose in a network: groups of channels, and rows of blocks."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa_deploy.layers import Pair
from ofa_deploy.report.shrunk import BLOCKS
from ofa_deploy.shrink.coupling import read_by, trace_channels
from ofa_deploy.shrink.groups import ChannelGraph, TracedLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks of one shape in a row, of which the last ones may go.

    Args:
        container: Path of the `nn.Sequential` that they are in.
        first: Index of the first one in it.
        layers: Names of the convolutions of each block.
        groups: Index of the group that each block writes; none where the width of what
            they write is not searched.
    """

    container: str
    first: int
    layers: tuple[tuple[str, ...], ...]
    groups: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """How many."""
        return len(self.layers)

    def has(self, layer: str) -> bool:
        """Whether a layer is in one of them."""
        return any(layer in names for names in self.layers)

    @property
    def name(self) -> str:
        """For people."""
        last = self.first + self.blocks - 1
        return f"{self.container or 'network'}[{self.first}:{last + 1}]{BLOCKS}"


def stage_read(stages: Sequence[Stage], layer: str, group: int) -> int | None:
    """The stage whose end a layer behind it reads: any of the stage's groups may be it.

    Args:
        stages: Of the network.
        layer: Name of the layer.
        group: That it reads in the whole network.
    """
    for index, stage in enumerate(stages):
        if group in stage.groups[-1:] and not stage.has(layer):
            return index
    return None


def run_hooked(
    network: nn.Module, image: Tensor, handles: Iterable[RemovableHandle]
) -> None:
    """Run a network once in eval mode, and take its hooks away.

    Args:
        network: Its mode is left as it was.
        image: Its input.
        handles: Of the hooks.
    """
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()


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
                    lambda module, args, named, name=name: note_input(
                        name, read_by(args, named)
                    ),
                    with_kwargs=True,
                )
            )
    run_hooked(network, image, handles)
    return found


def _layers_of_tokens(network: nn.Module, image: Tensor) -> set[str]:
    """Linear layers that write more than `(N, channels)`: of tokens, or of maps."""
    return {
        name
        for name, calls in _calls(network, image).items()
        if isinstance(network.get_submodule(name), nn.Linear)
        and any(call.written is None or len(call.written) != 2 for call in calls)
    }


def searchable_groups(
    network: nn.Module, graph: ChannelGraph, image: Tensor
) -> list[int]:
    """Groups whose channels pass batch norms right where they are written, or none.

    What is written without one, as some shortcuts are, is mixed as it is.

    Args:
        network: Traced.
        graph: Its channels.
        image: `(1, 3, H, W)`.
    """
    norm_of = normed_layers(network, image)
    behind, of_tokens = set(norm_of.values()), _layers_of_tokens(network, image)
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
            and any(not layers[name].is_projection for name in convs)
            and of_tokens.isdisjoint(convs)
            and all(name in behind for name in norms)
        ):
            found.append(index)
    return found


def find_stages(
    network: nn.Module, graph: ChannelGraph, image: Tensor
) -> tuple[Stage, ...]:
    """Runs of alike blocks in `nn.Sequential`s whose outputs are like their inputs.

    The network calls them once each. Where its forward loops over their blocks itself,
    it may do more than call one after the other, so that none of them may go.
    The first one of a run may change the shape; it is always kept. What has such a run
    in it is no block of another. Blocks may go even if no width of them is searched.

    Args:
        network: Any.
        graph: Those of its channels that are searched.
        image: Of the size of its inputs, `(1, 3, H, W)`.
    """
    _, depth, height, width = image.shape
    whole = trace_channels(network, input_shape=(depth, height, width))
    searched = {group.name: index for index, group in enumerate(graph.groups)}
    group_of = [searched.get(group.name) for group in whole.groups]
    rank = {layer.name: place for place, layer in enumerate(whole.layers)}
    calls = _calls(network, image)
    stages: list[Stage] = []
    for container, module in reversed(list(network.named_modules())):  # innermost first
        if (
            type(module).forward is not nn.Sequential.forward
            or len(calls.get(container, [])) != 1
        ):
            continue
        blocks: list[_Block | None] = []
        for child, block in module._modules.items():
            path = f"{container}.{child}".removeprefix(".")
            within = any(_is_in(f"{stage.container}.", path) for stage in stages)
            found = _Block.of(
                whole,
                path,
                type(block),
                group_of,
                keeps_shape=_keep_shape(calls.get(path, [])),
            )
            blocks.append(None if within else found)
        stages += [
            Stage(
                container=container,
                first=first,
                layers=tuple(
                    tuple(layer.name for layer in block.layers) for block in run
                ),
                groups=tuple(b.group for b in run if b.group is not None),
            )
            for first, run in _runs(blocks)
        ]
    return tuple(sorted(stages, key=lambda stage: rank[stage.layers[0][0]]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Of a module: shapes of the tensor that it read, and wrote; None of others."""

    read: torch.Size | None
    written: torch.Size | None


def _calls(network: nn.Module, image: Tensor) -> dict[str, list[_Call]]:
    """Of each module that is called, its calls."""
    found: dict[str, list[_Call]] = defaultdict(list)

    def note(name: str, args: tuple[object, ...], output: object) -> None:
        read = _shape(args[0]) if len(args) == 1 else None
        found[name].append(_Call(read=read, written=_shape(output)))

    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: note(name, args, output)
        )
        for name, module in network.named_modules()
    ]
    run_hooked(network, image, handles)
    return found


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _keep_shape(calls: Sequence[_Call]) -> bool:
    """Whether there are any, and each wrote a tensor of the shape that it read."""
    return bool(calls) and all(
        call.read is not None and call.read == call.written for call in calls
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """What is one child of a container.

    Args:
        kind: Its class.
        layers: In it.
        read: Groups that these read.
        written: Groups that they write and others read.
        group: The one of these whose width is searched, by its index among such.
        writes_alone: Whether it writes any, and nobody else writes or normalises them.
        keeps_shape: Whether its output is of the shape of its input.
    """

    kind: type
    layers: tuple[TracedLayer, ...]
    read: frozenset[int]
    written: frozenset[int]
    group: int | None
    writes_alone: bool
    keeps_shape: bool

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        path: str,
        kind: type,
        group_of: Sequence[int | None],
        *,
        keeps_shape: bool,
    ) -> _Block | None:
        """None of what writes several searched groups, or is called several times."""
        layers = [layer for layer in graph.layers if _is_in(layer.name, path)]
        if not layers or any(len(layer.call_places) > 1 for layer in layers):
            return None
        cuts = [cut for cut in graph.cuts if _is_in(cut.module, path)]
        others = [cut for cut in graph.cuts if not _is_in(cut.module, path)]
        written = frozenset(cut.group for cut in cuts if cut.side == "out") & {
            cut.group for cut in others if cut.side == "in"
        }
        searched = [index for one in written if (index := group_of[one]) is not None]
        if len(searched) > 1:
            return None
        return cls(
            kind=kind,
            layers=tuple(layers),
            read=frozenset(cut.group for cut in cuts if cut.side == "in"),
            written=written,
            group=searched[0] if searched else None,
            writes_alone=bool(written)
            and not any(cut.group in written and cut.side == "out" for cut in others),
            keeps_shape=keeps_shape,
        )

    def goes_on(self, before: _Block) -> bool:
        """Whether it may be left out behind another: what follows reads that one.

        What it writes is of the same groups, or of ones that end with it; or none of
        it can go, before it and behind.
        """
        return (
            self.kind is before.kind
            and not self._operations - before._operations
            and before.written <= self.read
            and self.keeps_shape
            and (self.group is None) == (before.group is None)
            and (self.written == before.written or self.writes_alone)
        )

    @property
    def _operations(self) -> Counter[tuple[Pair, bool]]:
        return Counter(
            (layer.kernel, layer.depthwise)
            for layer in self.layers
            if not layer.is_projection
        )


def _is_in(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")


def _runs(blocks: Sequence[_Block | None]) -> list[tuple[int, list[_Block]]]:
    """Where blocks that go on begin, and these; of two at least."""
    found: list[tuple[int, list[_Block]]] = []
    for place, block in enumerate(blocks):
        if block is None:
            continue
        first, run = found[-1] if found else (0, [])
        if run and first + len(run) == place and block.goes_on(run[-1]):
            run.append(block)
        else:
            found.append((place, [block]))
    return [(first, run) for first, run in found if len(run) > 1]


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
