"""Which channels of a network can only be removed together, and who reads them.

The network is traced as a graph. Convolutions begin a group of channels; activations,
norms and pools hand it on; a sum makes two groups one. What torch-pruning finds by
following gradients is found here along the data, because a mask has to stand behind the
last operation of a group before somebody reads it: removing what is masked then changes
nothing, whatever the operations between do to zeros.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ofa_deploy.errors import TraceError
from ofa_deploy.nn.static import StaticRepConv

_PASSING_MODULES = (
    *(nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
_PASSING_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.elu, F.hardswish),
        *(F.hardsigmoid, F.sigmoid, F.tanh, F.max_pool2d, F.avg_pool2d),
        *(F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
        *(torch.relu, torch.sigmoid, torch.tanh, torch.flatten, torch.mean),
    }
)
_PASSING_METHODS = frozenset(
    {"relu", "relu_", "sigmoid", "tanh", "flatten", "view", "reshape", "mean"}
    | {"contiguous", "clone"}
)
_JOINING_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub}
    | {torch.add, torch.mul, torch.sub}
)
# Of these, what makes something of zeros.
_FILLING_MODULES = (nn.BatchNorm2d, nn.Sigmoid, nn.Hardsigmoid)
_FILLING: frozenset[Any] = frozenset(
    {F.sigmoid, F.hardsigmoid, torch.sigmoid, "sigmoid"}
)
_JOINING_METHODS = frozenset({"add", "add_", "mul", "mul_"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Channels that are kept or removed together.

    Args:
        name: Of the first convolution that writes them.
        channels: How many.
        masked: Graph nodes behind which a mask stands.
    """

    name: str
    channels: int
    masked: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A convolution, or a linear layer, and the channels it reads and writes.

    Args:
        name: Of the module.
        in_group: Index of the group it reads; None if these channels stay.
        out_group: Index of the group it writes; None if these channels stay.
        in_channels: Of the whole network.
        out_channels: Of the whole network.
        kernel: Height and width; 1 of a linear layer.
        stride: 1 or more.
        depthwise: Whether each channel is filtered alone.
        groups: Of the convolution.
        in_size: Height and width of its input.
        out_size: Height and width of its output.
        is_linear: Whether it is a linear layer.
        columns_per_channel: Inputs of a linear layer that one channel feeds.
    """

    name: str
    in_group: int | None
    out_group: int | None
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    depthwise: bool
    groups: int
    in_size: int
    out_size: int
    is_linear: bool = False
    columns_per_channel: int = 1

    @property
    def macs_per_pair(self) -> int:
        """Multiply-accumulates of one pair of channels, read and written.

        Of a depthwise convolution, of one channel.
        """
        return self.kernel**2 * self.out_size**2 * self.columns_per_channel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelGraph:
    """A traced network.

    Args:
        module: Computes what the network computes, and shares its parameters.
        groups: In the order of the data.
        consumers: Likewise.
        norms: Batch norms by the index of the group whose channels they scale.
    """

    module: fx.GraphModule
    groups: tuple[ChannelGroup, ...]
    consumers: tuple[Consumer, ...]
    norms: Mapping[str, int]


class _Tracer(fx.Tracer):
    """Looks into everything but torch's own layers and what is merged as a whole.

    `last_module` is the path of the module whose forward is traced: where it failed.
    """

    last_module = ""

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """See `torch.fx.Tracer`."""
        outer, self.last_module = self.last_module, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.last_module = outer
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `torch.fx.Tracer`."""
        return isinstance(m, StaticRepConv) or super().is_leaf_module(
            m, module_qualified_name
        )


def trace_channels(
    network: nn.Module, *, input_shape: tuple[int, int, int]
) -> ChannelGraph:
    """Trace a network, and group its channels.

    Args:
        network: From images `(N, *input_shape)` to logits `(N, classes)`.
        input_shape: Channels, height and width.

    Raises:
        TraceError: Names the layer that cannot be traced, or whose channels cannot be
            told.
    """
    training = network.training
    network.eval()
    try:
        module = _traced(network, input_shape=input_shape)
    finally:
        network.train(training)
    module.train(training)
    return _Grouping(module).result()


def _traced(network: nn.Module, *, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """A network in eval mode as a graph that knows the shapes of all values."""
    tracer = _Tracer()
    try:
        graph = tracer.trace(network)
    except Exception as error:  # whatever the network's own code raises
        where = tracer.last_module or type(network).__name__
        raise TraceError(
            f"{where} cannot be traced: {error}. Its forward must not branch on the "
            "values or shapes of tensors"
        ) from error
    module = fx.GraphModule(network, graph)
    module.eval()
    try:
        with torch.no_grad():
            ShapeProp(module).propagate(torch.zeros(1, *input_shape))
    except Exception as error:
        raise TraceError(
            f"{type(network).__name__} does not run on images of shape {input_shape}: "
            f"{error}"
        ) from error
    return module


@dataclass(slots=True)
class _Grouping:
    """Groups under construction: sets of nodes with the same channels, joined as found.

    `parent` is a forest (R. Tarjan, "Efficiency of a good but not linear set union
    algorithm", 1975); its roots, each the first node of its group, are the groups.
    """

    module: fx.GraphModule
    parent: dict[fx.Node, fx.Node] = field(default_factory=dict)
    place: dict[fx.Node, int] = field(default_factory=dict)
    fixed: set[fx.Node] = field(default_factory=set)
    called: set[str] = field(default_factory=set)

    def result(self) -> ChannelGraph:
        """The finished grouping."""
        for node in self.module.graph.nodes:
            self._visit(node)
        roots = self._prunable_roots()
        index = {root: place for place, root in enumerate(roots)}
        groups = tuple(
            ChannelGroup(
                name=str(root.target),
                channels=_channels(root),
                masked=tuple(node.name for node in self._last_nodes(root)),
            )
            for root in roots
        )
        return ChannelGraph(
            module=self.module,
            groups=groups,
            consumers=tuple(self._consumers(index)),
            norms={
                str(node.target): index[root]
                for node in self.module.graph.nodes
                if node.op == "call_module"
                and isinstance(self._submodule(node), nn.BatchNorm2d)
                and (root := self._root(node)) in index
            },
        )

    # -- groups ------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if not _has_channels(node) and node.op != "output":
            return
        inputs = [n for n in node.all_input_nodes if _has_channels(n)]
        if node.op == "output":
            for source in inputs:
                self.fixed.add(self._root(source))
            return
        self.parent[node] = node
        self.place[node] = len(self.place)
        if node.op in ("placeholder", "get_attr"):
            self.fixed.add(node)
        elif node.op == "call_module":
            self._require_once(node)
            self._visit_module(node, self._submodule(node), inputs)
        elif node.target is F.dropout:
            raise TraceError(
                f"{_place(node)}: F.dropout is traced as it is now, in training or "
                "not, and stays so; use nn.Dropout"
            )
        elif node.target in _PASSING_FUNCTIONS | _PASSING_METHODS:
            self._join(node, inputs[:1])
        elif node.target in _JOINING_FUNCTIONS | _JOINING_METHODS:
            self._join(node, inputs)
        else:
            self._refuse(node)

    def _require_once(self, node: fx.Node) -> None:
        """Refuse layers with weights that are used in two places."""
        target = str(node.target)
        if target in self.called and any(
            True for _ in self._submodule(node).parameters()
        ):
            raise TraceError(
                f"{target} is used more than once; the channels of its two places "
                "cannot be told apart. Give each place a layer of its own"
            )
        self.called.add(target)

    def _visit_module(
        self, node: fx.Node, module: nn.Module, inputs: Sequence[fx.Node]
    ) -> None:
        if isinstance(module, nn.Conv2d):
            if _is_depthwise(module):
                self._join(node, inputs)
            elif module.groups > 1:
                # Which channel a filter reads depends on how many there are.
                self.fixed |= {node, *map(self._root, inputs)}
        elif isinstance(module, nn.Linear):
            self.fixed.add(node)
        elif isinstance(module, _PASSING_MODULES):
            self._join(node, inputs)
        elif not isinstance(module, StaticRepConv):
            self._refuse(node)

    def _join(self, node: fx.Node, inputs: Sequence[fx.Node]) -> None:
        for source in inputs:
            if _channels(source) != _channels(node) and not _is_flattening(
                source, node
            ):
                self._refuse(node)
            first, second = self._root(source), self._root(node)
            if first is second:
                continue
            if self.place[second] < self.place[first]:
                first, second = second, first
            self.parent[second] = first
            if second in self.fixed:
                self.fixed.add(first)

    def _root(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _prunable_roots(self) -> list[fx.Node]:
        fixed = {self._root(node) for node in self.fixed}
        return [
            node
            for node in self.parent
            if self._root(node) is node and node not in fixed
        ]

    def _last_nodes(self, root: fx.Node) -> Iterable[fx.Node]:
        """Nodes of a group that are read by a layer of another one.

        Of rows of features, the maps that they were.
        """
        found: dict[fx.Node, None] = {}
        for node in self.parent:
            if self._root(node) is root and any(map(self._is_consumer, node.users)):
                while _channels(node) != _channels(root):
                    node = self._before_flattening(node)
                found[node] = None
        return found

    def _before_flattening(self, node: fx.Node) -> fx.Node:
        """What a row of features was made from, if that keeps zeros zero.

        The mask stands before it: what comes between must not fill zeros again.
        """
        sources = [n for n in node.all_input_nodes if _has_channels(n)]
        if node.op == "call_module":
            keeps = not isinstance(self._submodule(node), _FILLING_MODULES)
        else:
            keeps = node.target not in _FILLING
        if len(sources) != 1 or not keeps:
            raise TraceError(
                f"{_place(node)} comes after maps were flattened, and makes something "
                "of zeros; put it before the flattening"
            )
        return sources[0]

    def _is_consumer(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self._submodule(node)
        if isinstance(module, nn.Conv2d):
            return not _is_depthwise(module)
        return isinstance(module, nn.Linear | StaticRepConv)

    # -- consumers ---------------------------------------------------------------------

    def _consumers(self, index: Mapping[fx.Node, int]) -> Iterable[Consumer]:
        for node in self.module.graph.nodes:
            if node.op != "call_module":
                continue
            module = self._submodule(node)
            if not isinstance(module, nn.Conv2d | nn.Linear | StaticRepConv):
                continue
            (source,) = (n for n in node.all_input_nodes if _has_channels(n))
            yield _consumer(
                node,
                module,
                source,
                in_group=index.get(self._root(source)),
                out_group=index.get(self._root(node)),
            )

    def _submodule(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _refuse(self, node: fx.Node) -> None:
        kind = ""
        if node.op == "call_module":
            kind = f" ({type(self._submodule(node)).__name__})"
        raise TraceError(
            f"{_place(node)}{kind}: it is not known which channels go through this. "
            "Convolutions, linear layers, batch norms, activations, pools, sums and "
            "products can be pruned through; rewrite it with these"
        )


def _consumer(
    node: fx.Node,
    module: nn.Conv2d | nn.Linear | StaticRepConv,
    source: fx.Node,
    *,
    in_group: int | None,
    out_group: int | None,
) -> Consumer:
    before, after = _shape(source), _shape(node)
    if isinstance(module, nn.Linear):
        channels = _channels_before_flattening(source)
        return Consumer(
            name=str(node.target),
            in_group=in_group,
            out_group=out_group,
            in_channels=channels,
            out_channels=module.out_features,
            kernel=1,
            stride=1,
            depthwise=False,
            groups=1,
            in_size=1,
            out_size=1,
            is_linear=True,
            columns_per_channel=module.in_features // channels,
        )
    conv = module.dense.conv if isinstance(module, StaticRepConv) else module
    _require_square(node, conv, before)
    return Consumer(
        name=str(node.target),
        in_group=in_group,
        out_group=out_group,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel=int(conv.kernel_size[0]),
        stride=int(conv.stride[0]),
        depthwise=_is_depthwise(conv),
        groups=conv.groups,
        in_size=before[2],
        out_size=after[2],
    )


def _require_square(node: fx.Node, conv: nn.Conv2d, before: torch.Size) -> None:
    square = (
        conv.kernel_size[0] == conv.kernel_size[1]
        and conv.stride[0] == conv.stride[1]
        and before[2] == before[3]
    )
    if not square:
        raise TraceError(
            f"{node.target}: kernel {tuple(conv.kernel_size)}, stride "
            f"{tuple(conv.stride)}, input {tuple(before[2:])}; only square ones can be "
            "priced"
        )


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return 1 < conv.groups == conv.in_channels == conv.out_channels


def _has_channels(node: fx.Node) -> bool:
    """Whether it is a tensor with channels; single values belong to none."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    if shape is None or (math.prod(shape) == 1 and node.op == "get_attr"):
        return False
    if len(shape) < 2:
        raise TraceError(
            f"{_place(node)}: a tensor of shape {tuple(shape)} has no channels; keep "
            "images first and channels second"
        )
    return True


def _place(node: fx.Node) -> str:
    """Where in the network an operation is, and what."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    inside = [str(path) for path in stack if path]
    name = node.name if node.op == "call_function" else str(node.target)
    return f"{inside[-1]}: {name}" if inside else name


def _shape(node: fx.Node) -> torch.Size:
    shape = node.meta["tensor_meta"].shape
    assert isinstance(shape, torch.Size)
    return shape


def _channels(node: fx.Node) -> int:
    return _shape(node)[1]


def _values(node: fx.Node) -> int:
    """Values of one image."""
    return math.prod(_shape(node)[1:])


def _is_flattening(source: fx.Node, node: fx.Node) -> bool:
    """Whether maps become rows of features, channel by channel."""
    before, after = _shape(source), _shape(node)
    return len(before) == 4 and len(after) == 2 and after[1] == _values(source)


def _channels_before_flattening(node: fx.Node) -> int:
    """Channels whose maps a row of features was."""
    while len(_shape(node)) == 2 and node.op != "placeholder":
        sources = [n for n in node.all_input_nodes if _has_channels(n)]
        if not sources or _values(sources[0]) != _channels(node):
            break
        node = sources[0]
    return _channels(node)
