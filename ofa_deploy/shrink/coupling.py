"""Which channels of any network can only be removed together.

torch-pruning follows the gradients (G. Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023). What it finds is cut here into groups whose channels are alike:
sums, products, concatenations and shared layers bind some channels of a layer and not
others.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ofa_deploy.errors import MissingDependency, TraceError
from ofa_deploy.layers import Pair, Window
from ofa_deploy.nn.projection import projection_paths
from ofa_deploy.nn.silence import silence
from ofa_deploy.shrink.groups import (
    ChannelGraph,
    ChannelGroup,
    Cut,
    Side,
    TracedLayer,
)
from ofa_deploy.shrink.user_module import require_logits


def trace_channels(
    network: nn.Module, *, input_shape: tuple[int, int, int]
) -> ChannelGraph:
    """Run a network, and group its channels.

    Args:
        network: From images `(N, *input_shape)` to logits `(N, classes)`.
        input_shape: Channels, height and width.

    Raises:
        TraceError: Names the module that cannot be traced.
        MissingDependency: torch-pruning is not installed.
    """
    probe = _probe(network)
    image = torch.zeros(1, *input_shape)
    with _telling_module(probe, image, cure="Give a network that takes such images"):
        layers = called_layers(probe, image)
    atoms = _Atoms(probe, image)
    groups, cuts = atoms.grouped([layer.name for layer in layers])
    return ChannelGraph(groups=groups, cuts=cuts, layers=layers)


def operations_of(network: nn.Module, *, input_shape: tuple[int, int, int]) -> str:
    """A network's operations as text: always the same ones, whatever is in the images.

    Takes much longer than `trace_channels`.

    Args:
        network: From images `(N, *input_shape)` to logits `(N, classes)`.
        input_shape: Channels, height and width.

    Raises:
        TraceError: Names the module whose operations depend on values.
    """
    probe = _probe(network)
    image = torch.zeros(1, *input_shape)
    cure = "Its forward must not branch on the values of tensors"
    with torch.no_grad(), silence(), _telling_module(probe, image, cure=cure):
        exported = torch.export.export(probe, (image,), strict=False)
    return str(exported.graph_module.code)


def _probe(network: nn.Module) -> nn.Module:
    """A copy in eval mode, all of which has gradients: they are what is followed."""
    probe = copy.deepcopy(network)
    probe.eval()
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return probe


@contextmanager
def _telling_module(network: nn.Module, image: Tensor, *, cure: str) -> Iterator[None]:
    """Turns what is raised while the network runs into an error that says where."""
    entered: list[str] = []
    handles = [
        handle
        for name, module in network.named_modules()
        for handle in (
            module.register_forward_pre_hook(
                lambda *_, name=name: entered.append(name)
            ),
            module.register_forward_hook(lambda *_: _drop_last(entered)),
        )
    ]
    try:
        yield
    except TraceError:
        raise
    except Exception as error:  # whatever the network's own code raises
        path = entered[-1] if entered else ""
        told = str(error).strip().partition("\n")[0]
        raise TraceError(
            f"{path or type(network).__name__} cannot be traced on images of shape "
            f"{tuple(image.shape[1:])}: {told}. {cure}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _drop_last(entered: list[str]) -> None:
    entered.pop()


def read_by(args: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """What one of torch's layers reads in a call."""
    return args[0] if args else named["input"]


def called_layers(network: nn.Module, image: Tensor) -> tuple[TracedLayer, ...]:
    """Convolutions and linear layers in the order of their first calls."""
    found: dict[str, TracedLayer] = {}

    def note(name: str, module: nn.Module, read: Tensor, written: Tensor) -> None:
        called = _traced_layer(name, module, read, written)
        before = found.get(name)
        if before is None:
            found[name] = called
            return
        largest = max(before, called, key=lambda layer: max(layer.call_places))
        calls = before.call_places + called.call_places
        found[name] = replace(largest, call_places=calls)

    handles = [
        module.register_forward_hook(
            lambda module, args, named, output, name=name: note(
                name, module, read_by(args, named), output
            ),
            with_kwargs=True,
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.no_grad():
            require_logits(network, network(image))
    finally:
        for handle in handles:
            handle.remove()
    projections = set(projection_paths(network))
    return tuple(
        replace(layer, is_projection=layer.name.rpartition(".")[0] in projections)
        for layer in found.values()
    )


def _traced_layer(
    name: str, module: nn.Module, read: Tensor, written: Tensor
) -> TracedLayer:
    # Of one image is all that is read, parts of it that are in the batch's place, too.
    if isinstance(module, nn.Linear):
        places = written.numel() // module.out_features
        return TracedLayer(
            name=name,
            window=None,
            groups=1,
            in_channels=module.in_features,
            out_channels=module.out_features,
            in_size=(places, 1),
            call_places=(places,),
        )
    assert isinstance(module, nn.Conv2d)
    in_size, window = _window(module, read=_map_size(read), written=_map_size(written))
    return TracedLayer(
        name=name,
        window=window,
        groups=module.groups,
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        in_size=in_size,
        call_places=(written[0, 0].numel(),) * len(written),
    )


def _map_size(values: Tensor) -> Pair:
    height, width = values.shape[2:]
    return int(height), int(width)


def _window(conv: nn.Conv2d, *, read: Pair, written: Pair) -> tuple[Pair, Window]:
    """The map that a convolution reads, and how it goes over it.

    Args:
        conv: A convolution, which may pad in a forward of its own.
        read: Height and width of what it is called with.
        written: Height and width of what it gives.
    """
    window = Window(
        kernel=_pair(conv.kernel_size),
        stride=_pair(conv.stride),
        dilation=_pair(conv.dilation),
    )
    pads = conv.padding
    if isinstance(pads, str):  # "same" pads behind where it cannot pad alike
        height, width = window.extent if pads == "same" else (1, 1)
        above, left = (height - 1) // 2, (width - 1) // 2
        around = (above, left, height - 1 - above, width - 1 - left)
    else:
        around = (*_pair(pads), *_pair(pads))
    told = replace(window, pads=around)
    if told.out_size(read) == written:
        return read, told
    # The map without pads of which it computes as many places.
    height, width = (
        (count - 1) * stride + extent
        for count, stride, extent in zip(
            written, window.stride, window.extent, strict=True
        )
    )
    return (height, width), window


def _pair(sizes: int | tuple[int, ...]) -> Pair:
    """As torch takes them where they are set on a layer that is there."""
    height, width = (sizes, sizes) if isinstance(sizes, int) else sizes
    return height, width


# A channel of one side of one module.
Spot = tuple[str, Side, int]
# Of these, a channel is nobody's but its own.
_CHANNELWISE = (nn.Conv2d, nn.Linear, nn.PReLU, nn.modules.batchnorm._BatchNorm)


@dataclass(slots=True)
class _Atoms:
    """Sets of spots of which none goes without the others.

    `parent` is a forest (R. Tarjan, "Efficiency of a good but not linear set union
    algorithm", 1975).
    """

    network: nn.Module
    image: Tensor
    parent: dict[Spot, Spot] = field(default_factory=dict)
    fixed: set[Spot] = field(default_factory=set)

    def grouped(
        self, order: Sequence[str]
    ) -> tuple[tuple[ChannelGroup, ...], tuple[Cut, ...]]:
        """Channels that are on the same sides of the same modules, as groups.

        Args:
            order: Of the layers' calls.
        """
        self._join_all()
        rank = {name: place for place, name in enumerate(order)}
        alike: dict[object, list[list[Spot]]] = defaultdict(list)
        for spots in self._free():
            # What layers write can go; whoever else writes only goes with it.
            spots.sort(key=lambda spot: (rank.get(spot[0], len(rank)), spot))
            sides = Counter((module, side) for module, side, _ in spots)
            alike[frozenset(sides.items())].append(spots)
        found = sorted(
            (sorted(atoms, key=_first_written) for atoms in alike.values()),
            key=lambda atoms: (
                rank[_first_written(atoms[0])[0]],
                _first_written(atoms[0])[1],
            ),
        )
        names = _names([[_first_written(spots) for spots in atoms] for atoms in found])
        groups = tuple(
            ChannelGroup(name=name, channels=len(atoms))
            for name, atoms in zip(names, found, strict=True)
        )
        return groups, tuple(_cuts(found))

    def _free(self) -> Iterable[list[Spot]]:
        """Sets that nothing fixes, and that a layer writes."""
        sets: dict[Spot, list[Spot]] = defaultdict(list)
        for spot in self.parent:
            sets[self._root(spot)].append(spot)
        fixed = {self._root(spot) for spot in self.fixed}
        return [
            spots
            for root, spots in sets.items()
            if root not in fixed and any(side == "out" for _, side, _ in spots)
        ]

    def _join_all(self) -> None:
        graph = _dependencies(self.network, self.image)
        names = {module: name for name, module in self.network.named_modules()}
        for module in list(graph.module2node):
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            channels = range(_width(graph, module, writes=True))
            if all((names[module], "out", k) in self.parent for k in channels):
                continue
            group = graph.get_pruning_group(
                module,
                graph.get_pruner_of_module(module).prune_out_channels,
                list(channels),
            )
            for item in group.items:
                pairs = zip(item.idxs, item.root_idxs, strict=True)
                self._join(names[module], item.dep, pairs, names, graph)
        for module, node in graph.module2node.items():
            # What it writes are the outputs.
            if module in names and not node.outputs and not _is_elementwise(module):
                written = _width(graph, module, writes=True)
                for channel in range(written):
                    spot: Spot = (names[module], "out", channel)
                    if spot in self.parent:
                        self.fixed.add(spot)

    def _join(
        self,
        root: str,
        dependency: Any,
        indices: Iterable[tuple[int, int]],
        names: Mapping[nn.Module, str],
        graph: Any,
    ) -> None:
        """Bind what one module has of a root's channels to these.

        Args:
            root: The module that writes them.
            dependency: torch-pruning's, on the other module.
            indices: Of channels there, and at the root.
            names: Of the modules.
            graph: torch-pruning's.
        """
        module = dependency.target.module
        is_output = type(module).__name__ == "_OutputOp"
        known = module in names and not _is_elementwise(module)
        if not (is_output or known):
            return  # an operation without channels of its own
        mixes = known and (not isinstance(module, _CHANNELWISE) or _is_grouped(module))
        writes = graph.is_out_channel_pruning_fn(dependency.handler)
        width = None if is_output or mixes else _width(graph, module, writes=writes)
        for position, channel in indices:
            first: Spot = (root, "out", channel)
            self.parent.setdefault(first, first)
            if width is None:
                self.fixed.add(first)
                continue
            if position >= width:
                continue  # of zeros that were padded
            spot: Spot = (names[module], "out" if writes else "in", position)
            self.parent.setdefault(spot, spot)
            self.parent[self._root(spot)] = self._root(first)

    def _root(self, spot: Spot) -> Spot:
        while self.parent[spot] != spot:
            self.parent[spot] = self.parent[self.parent[spot]]
            spot = self.parent[spot]
        return spot


def _width(graph: Any, module: nn.Module, *, writes: bool) -> int:
    """Channels on one side of a module."""
    pruner = graph.get_pruner_of_module(module)
    get = pruner.get_out_channels if writes else pruner.get_in_channels
    return int(get(module))


def _is_elementwise(module: nn.Module) -> bool:
    """Whether a module has one slope for all channels, and none of its own."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _is_grouped(module: nn.Module) -> bool:
    """Whether which channel a filter reads depends on how many there are."""
    return isinstance(module, nn.Conv2d) and not (
        module.groups == 1 or module.groups == module.in_channels == module.out_channels
    )


def _first_written(spots: Sequence[Spot]) -> tuple[str, int]:
    return next((module, place) for module, side, place in spots if side == "out")


def _names(writers: Sequence[Sequence[tuple[str, int]]]) -> list[str]:
    """Of the groups, by their first writers; with a range where these have several."""
    times = Counter(group[0][0] for group in writers)
    return [
        name if times[name] == 1 else f"{name}[{group[0][1]}:{group[-1][1] + 1}]"
        for group in writers
        for name in (group[0][0],)
    ]


def _cuts(groups: Sequence[Sequence[Sequence[Spot]]]) -> Iterable[Cut]:
    for index, atoms in enumerate(groups):
        sides: dict[tuple[str, Side], list[tuple[int, int]]] = defaultdict(list)
        for channel, spots in enumerate(atoms):
            for module, side, position in spots:
                sides[module, side].append((position, channel))
        for (module, side), pairs in sides.items():
            positions, channels = np.array(sorted(pairs), dtype=np.intp).T
            yield Cut(
                module=module,
                side=side,
                group=index,
                positions=positions,
                channels=channels,
            )


def _dependencies(network: nn.Module, image: Tensor) -> Any:
    """torch-pruning's graph of the network."""
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependency("torch-pruning", extra="shrink") from error
    try:
        with silence(), _widths_unknown_not_zero(), torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                network,
                image,
                # Its own way tries the image without its batch first.
                forward_fn=lambda module, inputs: module(inputs),
                verbose=False,
            )
    except Exception as error:  # whatever its tracing does not expect
        raise TraceError(
            f"which channels of {type(network).__name__} go together cannot be told: "
            f"{type(error).__name__}: {error}. Rewrite it with convolutions, linear "
            "layers, norms, activations, pools, sums, products and concatenations"
        ) from error
    for node in graph.module2node.values():
        _map_padding(node)
    return graph


@contextmanager
def _widths_unknown_not_zero() -> Iterator[None]:
    """torch-pruning divides by widths of 0, which it finds where channels are shuffled.

    (In 1.6, of ShuffleNetV2.) What is unknown, it leaves alone.
    """
    from torch_pruning.dependency import shape_infer

    inferred = shape_infer.infer_in_channels_recursively

    def unknown_not_zero(*args: Any, **kwargs: Any) -> int | None:
        return inferred(*args, **kwargs) or None

    shape_infer.infer_in_channels_recursively = unknown_not_zero
    try:
        yield
    finally:
        shape_infer.infer_in_channels_recursively = inferred


def _map_padding(node: Any) -> None:
    """Channels that are padded with zeros move up; torch-pruning leaves them in place.

    The shortcut without parameters of residual networks for CIFAR is such a one.
    """
    if type(node.grad_fn).__name__ != "ConstantPadNdBackward0":
        return
    padding = node.grad_fn._saved_pad
    if len(padding) < 6 or not padding[4]:
        return
    offset = int(padding[4])
    for source in node.inputs:
        for dependency in source.dependencies:
            if dependency.target is node:
                dependency.index_mapping[1] = _moved(offset)
    for dependency in node.dependencies:
        if any(dependency.target is source for source in node.inputs):
            dependency.index_mapping[0] = _moved(-offset)


def _moved(offset: int) -> Callable[[Sequence[Any]], list[Any]]:
    """A mapping of torch-pruning's indices."""

    def mapping(indices: Sequence[Any]) -> list[Any]:
        return [
            type(index)(idx=index.idx + offset, root_idx=index.root_idx)
            for index in indices
            if index.idx + offset >= 0
        ]

    return mapping
