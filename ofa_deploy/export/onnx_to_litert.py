"""An ONNX graph of a convolutional network as .tflite, operator by operator.

For networks that have no plan, in the form that torch's exporter gives them: one image,
all sizes known. Maps `(N, C, H, W)` there are `(N, H, W, C)` here, as the runtime's
kernels want them: each value of four axes is stored channels last, all others as they
are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from ofa_deploy.errors import ModelRejected
from ofa_deploy.export.litert import LiteRTGraph, channels_last, same_pads
from ofa_deploy.layers import Pair, Window

Array = NDArray[Any]
Floats = NDArray[np.float32]
Shape = tuple[int, ...]
Attributes = Mapping[str, Any]

# The first whose operators have what they are set to as inputs.
LEAST_OPSET = 13
# Where a map's axes are stored, which is also the way back; and the way there.
_STORED_AXIS = (0, 3, 1, 2)
_TO_LAST = (0, 2, 3, 1)
# Slope of the hard sigmoid that is relu6(x + 3) / 6.
_SIXTH = 1 / 6


class UnwrittenOperator(ModelRejected):
    """An operator, or one of its settings, that is not written as .tflite here."""


def convert_onnx(model: onnx.ModelProto) -> bytes:
    """A network as .tflite.

    Args:
        model: Of one input `(1, C, H, W)` and one output, of known sizes.

    Returns:
        The model, in float32, with an input `image` `(1, H, W, C)` and an output
        `logits` in the signature `serving_default`.

    Raises:
        UnwrittenOperator: Names the operator.
        MissingDependency: `ai-edge-litert` is not installed.
    """
    opset = next((o.version for o in model.opset_import if not o.domain), 0)
    if opset < LEAST_OPSET:
        raise UnwrittenOperator(
            f"its operators are of opset {opset}; those from {LEAST_OPSET} are written"
        )
    return _Conversion(shape_inference.infer_shapes(model).graph).run()


class _Conversion:
    """Values of a graph that are written already, and what writes the others."""

    def __init__(self, source: onnx.GraphProto) -> None:
        self._source = source
        self._graph = LiteRTGraph({})
        self._kinds = self._graph.schema.ActivationFunctionType
        self._constants: dict[str, Array] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in source.initializer
        }
        self._shapes: dict[str, Shape] = {
            value.name: tuple(
                axis.dim_value for axis in value.type.tensor_type.shape.dim
            )
            for value in (*source.input, *source.value_info, *source.output)
        }
        self._readers = Counter(name for node in source.node for name in node.input)
        self._readers.update(value.name for value in source.output)
        # Tensors by the names of values; rows of features that are stored in another
        # order by the shape `(C, H, W)` of the maps that they were.
        self._tensors: dict[str, int] = {}
        self._unordered: dict[str, Shape] = {}
        self._kept: dict[str, int] = {}
        self._not_negative: set[int] = set()

    def run(self) -> bytes:
        entered, left = self._ends()
        shape = _stored(self._shapes[entered])
        self._tensors[entered] = self._graph.add_tensor(entered, shape)
        for node in self._source.node:
            self._write(node)
        if left not in self._tensors:
            raise UnwrittenOperator(f"its output {left!r} does not depend on the image")
        return self._graph.serialise(self._tensors[entered], self._tensors[left])

    def _ends(self) -> tuple[str, str]:
        """Names of the image and of the logits."""
        entered = [v for v in self._source.input if v.name not in self._constants]
        ends = [*entered, *self._source.output]
        if len(entered) != 1 or len(ends) != 2:
            raise UnwrittenOperator(
                f"it has {len(entered)} inputs and {len(ends) - len(entered)} outputs; "
                "one of each is written"
            )
        kinds = {value.type.tensor_type.elem_type for value in ends}
        shape = self._shapes[ends[0].name]
        if kinds != {onnx.TensorProto.FLOAT} or shape[:1] != (1,) or 0 in shape:
            raise UnwrittenOperator(
                f"its input is of shape {shape}; one image in float32, of a known "
                "size, is written"
            )
        return ends[0].name, ends[1].name

    def _write(self, node: onnx.NodeProto) -> None:
        kind, read = node.op_type, [name for name in node.input if name]
        if all(name in self._constants for name in read):
            self._constants.update(_evaluated(node, self._constants))
            return
        writer = _WRITERS.get(kind)
        if writer is None or node.domain not in ("", "ai.onnx"):
            raise _unwritten(node, "no such operator is written")
        if any(not (s := self._shapes.get(o)) or 0 in s for o in node.output if o):
            raise _unwritten(node, "its sizes are not known")
        if node.input[0] in self._constants and kind not in _TAKE_CONSTANTS:
            raise _unwritten(node, "what it reads first is no part of the image")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        found = writer(self, node, attributes)
        if found is not None:
            self._tensors[node.output[0]] = found

    # -- values ------------------------------------------------------------------------

    def _constant(self, node: onnx.NodeProto, place: int) -> Array:
        """An input that must be known."""
        name = node.input[place]
        if name not in self._constants:
            raise _unwritten(node, f"its input {name!r} depends on the image")
        return self._constants[name]

    def _optional(self, node: onnx.NodeProto, place: int) -> Array | None:
        """An input that may be left out."""
        if place >= len(node.input) or not node.input[place]:
            return None
        return self._constant(node, place)

    def _out_shape(self, node: onnx.NodeProto) -> Shape:
        return _stored(self._shapes[node.output[0]])

    def _keep(self, name: str, array: Array) -> int:
        """A constant; of one name there is one, such as of a layer called twice."""
        if name not in self._kept:
            array = np.ascontiguousarray(array).reshape(array.shape)
            self._kept[name] = self._graph.add_tensor(name, array.shape, array)
        return self._kept[name]

    def _first(self, name: str) -> int:
        """A value in the order that ONNX has it."""
        tensor, shape = self._tensors[name], self._shapes[name]
        if len(shape) != 4 or _orders_agree(shape):
            return tensor
        return self._transposed(tensor, f"{name}.first", _STORED_AXIS, shape)

    def _transposed(
        self, tensor: int, name: str, order: Sequence[int], shape: Shape
    ) -> int:
        axes = self._keep(f"{name}.order", np.array(order, dtype=np.int32))
        return self._graph.add("Transpose", [tensor, axes], name, shape)

    def _reshaped(self, tensor: int, name: str, shape: Shape) -> int:
        sizes = np.array(shape, dtype=np.int32)
        inputs = [tensor, self._keep(f"{name}.sizes", sizes)]
        return self._graph.add("Reshape", inputs, name, shape, newShape=sizes)

    # -- convolutions and products -----------------------------------------------------

    def _conv(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        weight = self._constant(node, 1)
        if weight.ndim != 4:
            raise _unwritten(node, "its maps have no height and width")
        window = _window(node, {"kernel_shape": weight.shape[2:], **attributes})
        groups = attributes.get("group", 1)
        depthwise = 1 < groups == self._shapes[node.input[0]][1]
        name, form = node.output[0], "depthwise" if depthwise else "dense"
        inputs = [
            self._tensors[node.input[0]],
            self._keep(
                f"{node.input[1]}.{form}", channels_last(weight, depthwise=depthwise)
            ),
        ]
        bias = self._optional(node, 2)
        if bias is not None:
            inputs.append(self._keep(node.input[2], bias))
        return self._graph.add_window(
            window,
            inputs,
            name,
            multiplier=len(weight) // groups if depthwise else None,
            fused=self._kinds.NONE,
        )

    def _gemm(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        factor = attributes.get("alpha", 1.0)
        weight = self._constant(node, 1) * np.float32(factor)
        if attributes.get("transA", 0):
            raise _unwritten(node, "it transposes what it reads")
        if not attributes.get("transB", 0):
            weight = weight.T
        bias = self._optional(node, 2)
        if bias is not None:
            if bias.ndim == 2 and len(bias) != 1:
                raise _unwritten(node, "its rows have biases of their own")
            bias = bias * np.float32(attributes.get("beta", 1.0))
            bias = np.broadcast_to(bias.reshape(-1), (len(weight),))
        return self._dense(node, weight, bias)

    def _matmul(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        weight = self._constant(node, 1)
        if weight.ndim != 2 or len(self._shapes[node.input[0]]) == 4:
            raise _unwritten(node, "it is more than a layer on rows of features")
        return self._dense(node, weight.T, None)

    def _dense(self, node: onnx.NodeProto, weight: Floats, bias: Floats | None) -> int:
        name, read = node.output[0], node.input[0]
        maps = self._unordered.get(read)
        if maps is not None:  # features of a place are stored beside each other
            moved = weight.reshape(len(weight), *maps).transpose(_TO_LAST)
            weight = moved.reshape(len(weight), -1)
        inputs = [self._tensors[read], self._keep(f"{name}.weight", weight)]
        if bias is not None:
            inputs.append(self._keep(f"{name}.bias", bias))
        shape = self._out_shape(node)
        options = {"keepNumDims": len(shape) > 2}
        return self._graph.add("FullyConnected", inputs, name, shape, **options)

    def _norm(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        if attributes.get("training_mode", 0):
            raise _unwritten(node, "it normalises by the image")
        gamma, beta, mean, variance = (
            self._constant(node, place).astype(np.float64) for place in range(1, 5)
        )
        scale = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        shift = beta - mean * scale
        name, shape = node.output[0], self._out_shape(node)
        if len(shape) not in (2, 4):
            raise _unwritten(node, "its channels are not the last axis")
        value = self._tensors[node.input[0]]
        for kind, part, values in (("Mul", "scaled", scale), ("Add", "out", shift)):
            constant = self._keep(f"{name}.{part}.by", values.astype(np.float32))
            value = self._graph.add(kind, [value, constant], f"{name}.{part}", shape)
        return value

    # -- elementwise -------------------------------------------------------------------

    def _binary(
        self, node: onnx.NodeProto, attributes: Attributes, *, kind: str
    ) -> int:
        rank = len(self._shapes[node.output[0]])
        inputs = []
        for place, name in enumerate(node.input):
            if name in self._constants:
                array = _spread(self._constants[name], rank)
                inputs.append(self._keep(f"{node.output[0]}.{place}", array))
            elif len(self._shapes[name]) == rank:
                inputs.append(self._tensors[name])
            else:
                raise _unwritten(node, "it spreads one value over another's axes")
        return self._graph.add(kind, inputs, node.output[0], self._out_shape(node))

    def _unary(self, node: onnx.NodeProto, attributes: Attributes, *, kind: str) -> int:
        value = self._tensors[node.input[0]]
        return self._graph.add(kind, [value], node.output[0], self._out_shape(node))

    def _elu(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        if attributes.get("alpha", 1.0) != 1.0:
            raise _unwritten(node, "its alpha is not 1")
        return self._unary(node, attributes, kind="Elu")

    def _leaky(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        value = self._tensors[node.input[0]]
        return self._graph.add(
            "LeakyRelu",
            [value],
            node.output[0],
            self._out_shape(node),
            alpha=attributes.get("alpha", 0.01),
        )

    def _prelu(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        shape = self._out_shape(node)
        slope = _spread(self._constant(node, 1), len(shape))
        if slope.size not in (1, *slope.shape[-1:]):
            raise _unwritten(node, "its slopes are not of channels")
        wide = np.broadcast_to(slope.reshape(-1), shape[-1:]).reshape(
            *[1] * (len(shape) - 2), -1
        )
        name = node.output[0]
        inputs = [self._tensors[node.input[0]], self._keep(f"{name}.slope", wide)]
        return self._graph.add("Prelu", inputs, name, shape)

    def _relu(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        return self._activated(node, self._kinds.RELU, "Relu")

    def _clip(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        least, most = self._optional(node, 1), self._optional(node, 2)
        low = -math.inf if least is None else least.item()
        high = math.inf if most is None else most.item()
        if (low, high) == (-math.inf, math.inf):
            return self._same(node, attributes)
        known = {
            (0.0, math.inf): (self._kinds.RELU, "Relu"),
            (0.0, 6.0): (self._kinds.RELU6, "Relu6"),
        }
        if (low, high) in known:
            return self._activated(node, *known[low, high])
        value, name = self._tensors[node.input[0]], node.output[0]
        for kind, bound in (("Maximum", low), ("Minimum", high)):
            if math.isfinite(bound):
                constant = np.array(bound, dtype=np.float32)
                inputs = [value, self._keep(f"{name}.{kind}.by", constant)]
                shape = self._out_shape(node)
                value = self._graph.add(kind, inputs, f"{name}.{kind}", shape)
        return value

    def _activated(self, node: onnx.NodeProto, activation: int, kind: str) -> int:
        """In the operator before, where nobody else reads what that gives."""
        (name, *_) = node.input
        value = self._tensors[name]
        alone = self._readers[name] == 1
        if not (alone and self._graph.fuse_activation(value, activation)):
            shape = self._out_shape(node)
            value = self._graph.add(kind, [value], node.output[0], shape)
        self._not_negative.add(value)
        return value

    def _hard_sigmoid(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
        if not (math.isclose(alpha, _SIXTH, rel_tol=1e-6) and beta == 0.5):
            raise _unwritten(node, f"its slope is {alpha:g}, and not a sixth")
        name, shape = node.output[0], self._out_shape(node)
        three = self._keep(f"{name}.three", np.array(3, dtype=np.float32))
        sixth = self._keep(f"{name}.sixth", np.array(_SIXTH, dtype=np.float32))
        value = self._graph.add(
            "Add",
            [self._tensors[node.input[0]], three],
            f"{name}.shifted",
            shape,
            fusedActivationFunction=self._kinds.RELU6,
        )
        return self._graph.add("Mul", [value, sixth], name, shape)

    def _softmax(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        rank = len(self._shapes[node.output[0]])
        axis = attributes.get("axis", -1) % rank
        if _stored_axis(axis, rank) != rank - 1:
            raise _unwritten(node, "it is not over the last axis")
        value = self._tensors[node.input[0]]
        shape = self._out_shape(node)
        return self._graph.add("Softmax", [value], node.output[0], shape, beta=1.0)

    # -- maps --------------------------------------------------------------------------

    def _max_pool(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        return self._pool(node, attributes, "MaxPool2D")

    def _average_pool(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        return self._pool(node, attributes, "AveragePool2D")

    def _pool(self, node: onnx.NodeProto, attributes: Attributes, kind: str) -> int:
        in_shape = self._shapes[node.input[0]]
        if len(in_shape) != 4 or len(node.output) > 1:
            raise _unwritten(node, "it reads no maps, or tells places")
        in_size = in_shape[2], in_shape[3]
        window = _window(node, attributes)
        name, shape = node.output[0], self._out_shape(node)
        if window.dilation != (1, 1) or window.out_size(in_size) != shape[1:3]:
            raise _unwritten(node, "it is dilated, or rounds sizes up")
        value, padding = self._pool_padding(node, attributes, window, in_size)
        return self._graph.add(
            kind,
            [value],
            name,
            shape,
            padding=padding,
            strideH=window.stride[0],
            strideW=window.stride[1],
            filterHeight=window.kernel[0],
            filterWidth=window.kernel[1],
        )

    def _pool_padding(
        self,
        node: onnx.NodeProto,
        attributes: Attributes,
        window: Window,
        in_size: Pair,
    ) -> tuple[int, int]:
        """What a pool reads, and how it pads that: with nothing, which does not count.

        Zeros count: in averages that are to have them, and not for the most of what is
        never below them.
        """
        value, padding = self._tensors[node.input[0]], self._graph.schema.Padding
        if not any(window.pads):
            return value, padding.VALID
        averages = node.op_type == "AveragePool"
        zeros_do = value in self._not_negative
        if averages:
            zeros_do = bool(attributes.get("count_include_pad", 0))
        if window.pads == same_pads(window, in_size) and not (averages and zeros_do):
            return value, padding.SAME
        if not zeros_do:
            raise _unwritten(node, "what it pads with is no part of the format")
        return self._graph.padded(
            window.pads, value, name=node.output[0]
        ), padding.VALID

    def _global_pool(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        if len(self._shapes[node.input[0]]) != 4:
            raise _unwritten(node, "it reads no maps")
        return self._mean(node, (2, 3), keeps=True)

    def _reduce_mean(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        axes = self._optional(node, 1)
        if axes is None:  # where they were until opset 18
            axes = attributes.get("axes")
        if axes is None:
            raise _unwritten(node, "it is over all axes")
        rank = len(self._shapes[node.input[0]])
        keeps = bool(attributes.get("keepdims", 1))
        return self._mean(node, [int(axis) % rank for axis in axes], keeps=keeps)

    def _mean(self, node: onnx.NodeProto, axes: Sequence[int], *, keeps: bool) -> int:
        in_shape = self._shapes[node.input[0]]
        maps = 4 in (len(in_shape), len(self._shapes[node.output[0]]))
        if maps and not keeps and (len(in_shape), {*axes}) != (4, {2, 3}):
            raise _unwritten(node, "what it leaves is no row of features")
        name, shape = node.output[0], self._out_shape(node)
        stored = sorted(_stored_axis(axis, len(in_shape)) for axis in axes)
        inputs = [
            self._tensors[node.input[0]],
            self._keep(f"{name}.axes", np.array(stored, dtype=np.int32)),
        ]
        return self._graph.add("Mean", inputs, name, shape, keepDims=keeps)

    def _pad(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        fill, axes = self._optional(node, 2), self._optional(node, 3)
        if attributes.get("mode", b"constant") != b"constant" or (
            fill is not None and fill.item() != 0
        ):
            raise _unwritten(node, "it pads with something else than zeros")
        rank = len(self._shapes[node.input[0]])
        both = self._constant(node, 1).reshape(2, -1)
        if (both < 0).any():
            raise _unwritten(node, "it takes away")
        amounts = np.zeros((rank, 2), dtype=np.int32)
        places = range(rank) if axes is None else [int(axis) % rank for axis in axes]
        for place, axis in enumerate(places):
            amounts[_stored_axis(axis, rank)] = both[:, place]
        name = node.output[0]
        inputs = [self._tensors[node.input[0]], self._keep(f"{name}.amounts", amounts)]
        return self._graph.add("Pad", inputs, name, self._out_shape(node))

    def _concat(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        rank = len(self._shapes[node.output[0]])
        axis = _stored_axis(attributes["axis"] % rank, rank)
        values = [
            self._keep(f"{name}.stored", _last(self._constants[name]))
            if name in self._constants
            else self._tensors[name]
            for name in node.input
        ]
        shape = self._out_shape(node)
        return self._graph.add(
            "Concatenation", values, node.output[0], shape, axis=axis
        )

    def _slice(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        in_shape = self._shapes[node.input[0]]
        starts, ends = self._constant(node, 1), self._constant(node, 2)
        axes, steps = self._optional(node, 3), self._optional(node, 4)
        places = range(len(starts)) if axes is None else axes
        strides = [1] * len(starts) if steps is None else steps
        spans = [(0, size, 1) for size in in_shape]
        for start, end, axis, step in zip(starts, ends, places, strides, strict=True):
            if step < 1:
                raise _unwritten(node, "it goes backwards")
            place = int(axis) % len(in_shape)
            first, last, _ = slice(int(start), int(end)).indices(in_shape[place])
            spans[place] = (first, last, int(step))
        if len(in_shape) == 4 and _skips(spans, in_shape):
            return self._skipped(node, (spans[2][2], spans[3][2]))
        return self._taken(node.input[0], node.output[0], spans)

    def _skipped(self, node: onnx.NodeProto, stride: Pair) -> int:
        """Every other place of a map, filtered by ones: XNNPACK has no such slices."""
        channels, name = self._shapes[node.input[0]][1], node.output[0]
        ones = self._keep(f"{name}.ones", np.ones((1, 1, 1, channels), np.float32))
        return self._graph.add_window(
            Window(kernel=(1, 1), stride=stride),
            [self._tensors[node.input[0]], ones],
            name,
            multiplier=1,
            fused=self._kinds.NONE,
        )

    def _split(self, node: onnx.NodeProto, attributes: Attributes) -> None:
        in_shape = self._shapes[node.input[0]]
        axis = attributes.get("axis", 0) % len(in_shape)
        first = 0
        for name in node.output:
            last = first + self._shapes[name][axis]
            spans = [(0, size, 1) for size in in_shape]
            spans[axis] = (first, last, 1)
            self._tensors[name] = self._taken(node.input[0], name, spans)
            first = last

    def _taken(
        self, source: str, name: str, spans: Sequence[tuple[int, int, int]]
    ) -> int:
        """Part of a value: first, last and step of each of its axes."""
        ordered = [spans[axis] for axis in _TO_LAST] if len(spans) == 4 else spans
        columns = np.array(ordered, dtype=np.int32).T
        inputs = [
            self._tensors[source],
            *(
                self._keep(f"{name}.{part}", column)
                for part, column in zip(("first", "last", "step"), columns, strict=True)
            ),
        ]
        shape = _stored(self._shapes[name])
        return self._graph.add("StridedSlice", inputs, name, shape)

    # -- other shapes ------------------------------------------------------------------

    def _reshape(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        (source, *_), name = node.input, node.output[0]
        in_shape, shape = self._shapes[source], self._shapes[name]
        if in_shape == shape:
            return self._same(node, attributes)
        if self._becomes_features(source, name):
            self._unordered[name] = in_shape[1:]
            return self._reshaped(self._tensors[source], name, shape)
        value = self._first(source)
        if len(shape) != 4 or _orders_agree(shape):
            return self._reshaped(value, name, _stored(shape))
        value = self._reshaped(value, f"{name}.first", shape)
        return self._transposed(value, name, _TO_LAST, _stored(shape))

    def _becomes_features(self, source: str, name: str) -> bool:
        """Whether maps become a row that only layers with weights read."""
        in_shape, shape = self._shapes[source], self._shapes[name]
        readers = [node for node in self._source.node if name in node.input]
        return (
            len(in_shape) == 4
            and shape == (in_shape[0], math.prod(in_shape[1:]))
            and len(readers) == self._readers[name]
            and all(
                node.op_type in ("Gemm", "MatMul")
                and node.input[0] == name
                and node.input[1] in self._constants
                for node in readers
            )
        )

    def _transpose(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        name, shape = node.output[0], self._out_shape(node)
        order = tuple(attributes.get("perm", reversed(range(len(shape)))))
        if len(order) == 4:
            # An axis of what is written is one of what is read, both as stored.
            order = tuple(_STORED_AXIS[order[axis]] for axis in _TO_LAST)
        value = self._tensors[node.input[0]]
        return self._transposed(value, name, order, shape)

    def _same(self, node: onnx.NodeProto, attributes: Attributes) -> int:
        # Whoever else reads it reads this.
        self._readers[node.output[0]] += self._readers[node.input[0]] - 1
        return self._tensors[node.input[0]]


Writer = Callable[[_Conversion, onnx.NodeProto, Attributes], int | None]


def _elementwise(kind: str) -> Writer:
    return partial(_Conversion._unary, kind=kind)


def _arithmetic(kind: str) -> Writer:
    return partial(_Conversion._binary, kind=kind)


_WRITERS: dict[str, Writer] = {
    "Add": _arithmetic("Add"),
    "AveragePool": _Conversion._average_pool,
    "BatchNormalization": _Conversion._norm,
    "Clip": _Conversion._clip,
    "Concat": _Conversion._concat,
    "Conv": _Conversion._conv,
    "Div": _arithmetic("Div"),
    "Dropout": _Conversion._same,
    "Elu": _Conversion._elu,
    "Flatten": _Conversion._reshape,
    "Gemm": _Conversion._gemm,
    "GlobalAveragePool": _Conversion._global_pool,
    "HardSigmoid": _Conversion._hard_sigmoid,
    "HardSwish": _elementwise("HardSwish"),
    "Identity": _Conversion._same,
    "LeakyRelu": _Conversion._leaky,
    "MatMul": _Conversion._matmul,
    "MaxPool": _Conversion._max_pool,
    "Mul": _arithmetic("Mul"),
    "PRelu": _Conversion._prelu,
    "Pad": _Conversion._pad,
    "ReduceMean": _Conversion._reduce_mean,
    "Relu": _Conversion._relu,
    "Reshape": _Conversion._reshape,
    "Sigmoid": _elementwise("Logistic"),
    "Slice": _Conversion._slice,
    "Softmax": _Conversion._softmax,
    "Split": _Conversion._split,
    "Squeeze": _Conversion._reshape,
    "Sub": _arithmetic("Sub"),
    "Tanh": _elementwise("Tanh"),
    "Transpose": _Conversion._transpose,
    "Unsqueeze": _Conversion._reshape,
}


_TAKE_CONSTANTS = {"Add", "Concat", "Div", "Mul", "Sub"}


def _evaluated(
    node: onnx.NodeProto, constants: Mapping[str, Array]
) -> dict[str, Array]:
    """What an operator gives that reads nothing of the image."""
    read = {name: constants[name] for name in node.input if name}
    try:
        found = ReferenceEvaluator(node).run(None, read)
    except Exception as error:  # whatever onnx's own code does not expect
        raise _unwritten(node, f"its constants give nothing: {error}") from error
    return {
        name: np.asarray(value) for name, value in zip(node.output, found, strict=True)
    }


def _window(node: onnx.NodeProto, attributes: Attributes) -> Window:
    """How a convolution or a pool goes over maps."""
    window = Window(
        kernel=_pair(attributes["kernel_shape"]),
        stride=_pair(attributes.get("strides", (1, 1))),
        dilation=_pair(attributes.get("dilations", (1, 1))),
        pads=tuple(attributes.get("pads", (0, 0, 0, 0))),
    )
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise _unwritten(node, f"it pads as {attributes['auto_pad'].decode()}")
    return window


def _pair(sizes: Sequence[int]) -> Pair:
    height, width = sizes
    return height, width


def _stored(shape: Shape) -> Shape:
    """As a value of such a shape is stored."""
    return tuple(shape[axis] for axis in _TO_LAST) if len(shape) == 4 else shape


def _stored_axis(axis: int, rank: int) -> int:
    return _STORED_AXIS[axis] if rank == 4 else axis


def _orders_agree(shape: Shape) -> bool:
    """Whether maps are in the same order either way."""
    _, channels, height, width = shape
    return channels == 1 or height * width == 1


def _skips(spans: Sequence[tuple[int, int, int]], shape: Shape) -> bool:
    """Whether a slice of a map begins at its corner, and leaves places out."""
    whole = all(
        (first, last) == (0, size)
        for (first, last, _), size in zip(spans, shape, strict=True)
    )
    steps = [step for _, _, step in spans]
    return whole and steps[:2] == [1, 1] and steps[2:] != [1, 1]


def _last(array: Array) -> Array:
    """A constant as it is stored."""
    return array.transpose(_TO_LAST) if array.ndim == 4 else array


def _spread(array: Array, rank: int) -> Array:
    """A constant beside values of that many axes, as it is stored."""
    if array.size == 1:
        return array.reshape(())
    if rank != 4:
        return array
    return _last(array.reshape((*[1] * (4 - array.ndim), *array.shape)))


def _unwritten(node: onnx.NodeProto, why: str) -> UnwrittenOperator:
    return UnwrittenOperator(f"{node.op_type} ({node.name}): {why}")
