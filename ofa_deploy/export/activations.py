"""How much of a network's activations is alive at once, read off its ONNX graph."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import onnx
from onnx import shape_inference

__all__ = ["peak_activation_count"]

# Operators that read several values for each that they write, or in another order:
# what they write cannot take the place of what they read.
NOT_IN_PLACE = frozenset(
    {
        "AveragePool",
        "Conv",
        "ConvTranspose",
        "DepthToSpace",
        "Gemm",
        "LRN",
        "MatMul",
        "MaxPool",
        "SpaceToDepth",
        "Transpose",
    }
)


def peak_activation_count(model: onnx.ModelProto) -> int:
    """Most values of activations alive at once, of one image, in the graph's order.

    What an operator computes from one value each takes the place of what it read, if
    nobody reads that afterwards but together with it, as gates are multiplied with what
    they are of. A value waits as long as somebody is to read it: a shortcut until its
    sum, what is concatenated until it is.

    Args:
        model: With fixed shapes, of one image.
    """
    graph = shape_inference.infer_shapes(model).graph
    sizes = _sizes(graph)
    home = _homes(graph, sizes)
    last_read = {
        home[name]: place
        for place, node in enumerate(graph.node)
        for name in node.input
        if name in home
    }
    for value in graph.output:
        last_read[home[value.name]] = len(graph.node)
    alive = {
        value.name: sizes[value.name] for value in graph.input if value.name in home
    }
    peak = sum(alive.values())
    for place, node in enumerate(graph.node):
        read = {home[name] for name in node.input if name in home}
        last = {name for name in read if last_read[name] <= place}
        for name in node.output:
            if home.get(name) != name:  # in the place of another, or none
                continue
            taken = None if node.op_type in NOT_IN_PLACE else _alike(name, last, sizes)
            if taken is not None:
                last.discard(taken)
                alive.pop(taken, None)
            alive[name] = sizes[name]
        peak = max(peak, sum(alive.values()))
        for name in (*last, *node.output):
            if last_read.get(name, -1) <= place:
                alive.pop(name, None)
    return peak


def _sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """Values of each tensor that is no weight, as far as its shape is known."""
    weights = {tensor.name for tensor in graph.initializer}
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in weights:
            found[value.name] = math.prod(max(1, dim.dim_value) for dim in dims)
    return found


def _homes(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> dict[str, str]:
    """The value in whose place each one is: its own, or what it is made of."""
    readers: dict[str, set[int]] = defaultdict(set)
    for place, node in enumerate(graph.node):
        for name in node.input:
            readers[name].add(place)
    home = {value.name: value.name for value in graph.input if value.name in sizes}
    for place, node in enumerate(graph.node):
        read = {name for name in node.input if name in home}
        for name in node.output:
            if name not in sizes:
                continue
            home[name] = name
            if len(read) == 1 and node.op_type not in NOT_IN_PLACE:
                (source,) = read
                later = {reader for reader in readers[source] if reader > place}
                if sizes[source] == sizes[name] and later <= readers[name]:
                    home[name] = home[source]
    return home


def _alike(name: str, read: set[str], sizes: Mapping[str, int]) -> str | None:
    """Of what is read for the last time, something of the same size."""
    return next((one for one in sorted(read) if sizes[one] == sizes[name]), None)
