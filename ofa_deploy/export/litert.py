"""A plan with its weights as .tflite, written operator by operator.

The flatbuffer is put together over the schema that `ai-edge-litert` ships: milliseconds
for a network, where a converter takes seconds and a second framework. Tensors are NHWC,
as the runtime's kernels want them, so that no TRANSPOSE is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import MissingDependency
from ofa_deploy.export.emitter import Emitter
from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME, random_weights
from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    LayerActivation,
    LinearLayer,
    Pair,
    PoolLayer,
    SqueezeExciteLayer,
    Window,
)
from ofa_deploy.materialise import Weights
from ofa_deploy.plan import IMAGE_CHANNELS, NetworkPlan

SCHEMA_VERSION = 3
FILE_IDENTIFIER = b"TFL3"
SIGNATURE = "serving_default"
# The schema asks for it, and Python's builder does not do it by itself.
BUFFER_ALIGNMENT = 16
_NO_TENSOR = -1
_HEIGHT_AND_WIDTH = np.array([1, 2], dtype=np.int32)

Floats = NDArray[np.float32]
Constant = NDArray[np.float32] | NDArray[np.int32] | NDArray[np.int8]


def emit_network(plan: NetworkPlan, weights: Weights) -> bytes:
    """The network as a serialised .tflite model.

    Args:
        plan: The network.
        weights: Fused ones.

    Returns:
        Input `image` `(1, resolution, resolution, 3)`, output `logits`
        `(1, class_count)`, with these names in the signature `serving_default`.

    Raises:
        MissingDependency: `ai-edge-litert` is not installed.
    """
    graph = LiteRTGraph(weights)
    size = plan.resolution
    value = graph.add_tensor(INPUT_NAME, (1, size, size, IMAGE_CHANNELS))
    entered = value
    for block in plan.blocks:
        value = graph.add_block(block, value)
    return graph.serialise(entered, value)


def emit_block(block: BlockPlan, *, rng: np.random.Generator) -> bytes:
    """One block as a model of its own, with random fused weights, to be timed.

    Args:
        block: The block; its layers fix all sizes.
        rng: Source of the weights.
    """
    graph = LiteRTGraph(random_weights(block.layers, rng=rng))
    return serialise_block(graph, block)


def serialise_block(graph: LiteRTGraph, block: BlockPlan) -> bytes:
    """A graph with nothing but one block."""
    size = block.in_size
    entered = graph.add_tensor(INPUT_NAME, (1, size, size, block.in_channels))
    return graph.serialise(entered, graph.add_block(block, entered))


def named_alike(model: bytes) -> bytes:
    """A converter's model of one input and one output, under the names used here.

    Args:
        model: With one signature.

    Returns:
        The same, with an input `image` and an output `logits` in `serving_default`.
    """
    schema = _import_schema()
    content = schema.ModelT.InitFromPackedBuf(model, 0)
    (signature,) = content.signatureDefs
    graph = content.subgraphs[signature.subgraphIndex]
    (entered,), (value,) = signature.inputs, signature.outputs
    signature.signatureKey = SIGNATURE
    for entry, name in ((entered, INPUT_NAME), (value, OUTPUT_NAME)):
        entry.name = graph.tensors[entry.tensorIndex].name = name
    return _pack(content)


class LiteRTGraph(Emitter[int]):
    """Tensors and operators of a model under construction."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.schema = _import_schema()
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        # Buffer 0 is the empty one that tensors without constant data share.
        self._buffers: list[Any] = [self.schema.BufferT()]
        self._codes: dict[int, int] = {}
        self._constants: dict[str, int] = {}

    def add_tensor(
        self, name: str, shape: tuple[int, ...], data: Constant | None = None
    ) -> int:
        """Add a tensor, constant if it has data, and return its index."""
        tensor = self.schema.TensorT()
        tensor.name = name
        tensor.shape = list(shape)
        tensor.type, tensor.quantization, data = self.encode(name, data)
        tensor.buffer = 0
        if data is not None:
            tensor.buffer = len(self._buffers)
            self._buffers.append(_aligned_buffer(self.schema, data))
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def encode(
        self, name: str, data: Constant | None
    ) -> tuple[int, Any, Constant | None]:
        """Element type, quantisation parameters, and data as they are stored."""
        types = self.schema.TensorType
        integers = data is not None and data.dtype == np.int32
        return types.INT32 if integers else types.FLOAT32, None, data

    def add_sum(self, block: BlockPlan, value: int, entered: int) -> int:
        """See `Emitter`."""
        name = f"{block.name}.sum"
        return self.add("Add", [value, entered], name, self._shape(value))

    def add_pool(self, layer: PoolLayer, value: int) -> int:
        """See `Emitter`."""
        return self._add_mean(f"{layer.name}.out", value, keep_dims=False)

    def add_linear(self, layer: LinearLayer, value: int) -> int:
        """See `Emitter`."""
        return self._add_dense(layer, value, activation="none")

    def add_conv(self, layer: ConvLayer, value: int) -> int:
        """See `Emitter`."""
        if len(self._shape(value)) == 2:  # after the pool
            return self._add_dense(layer, value, activation=layer.activation)
        weight = self._weights[f"{layer.name}.weight"]
        inputs = [
            value,
            self._constant(
                f"{layer.name}.weight",
                channels_last(weight, depthwise=layer.depthwise),
            ),
        ]
        if layer.batch_norm:
            inputs.append(self._stored(f"{layer.name}.bias"))
        value = self.add_window(
            layer.window,
            inputs,
            f"{layer.name}.conv",
            multiplier=1 if layer.depthwise else None,
            fused=self._fused(layer.activation),
        )
        return self._add_activation(layer.name, layer.activation, value)

    def add_window(
        self,
        window: Window,
        inputs: list[int],
        output: str,
        *,
        multiplier: int | None,
        fused: int,
    ) -> int:
        """Add a convolution, and return the output's index.

        Args:
            window: How it goes over the map.
            inputs: The map, the weight, channels last, and the bias if there is one.
            output: Name of what it writes.
            multiplier: Channels written for each one read, of a depthwise convolution;
                None for any other.
            fused: The schema's activation.
        """
        value, padding = self._pad(window, inputs[0], name=output)
        options = {} if multiplier is None else {"depthMultiplier": multiplier}
        channels = self._shape(inputs[1])[0 if multiplier is None else 3]
        if len(inputs) == 2:  # some kernels take none without a bias
            zeros = np.zeros(channels, dtype=np.float32)
            inputs = [*inputs, self.add_tensor(f"{output}.bias", zeros.shape, zeros)]
        batch, rows, columns, _ = self._shape(inputs[0])
        height, width = window.out_size((rows, columns))
        return self.add(
            "Conv2D" if multiplier is None else "DepthwiseConv2D",
            [value, *inputs[1:]],
            output,
            (batch, height, width, channels),
            padding=padding,
            strideH=window.stride[0],
            strideW=window.stride[1],
            dilationHFactor=window.dilation[0],
            dilationWFactor=window.dilation[1],
            fusedActivationFunction=fused,
            **options,
        )

    def _pad(self, window: Window, value: int, *, name: str) -> tuple[int, int]:
        """The value to convolve, and the padding to do it with.

        SAME pads as much as gives every stride a place, and of that the smaller half
        above and left; other pads take an operator of their own.
        """
        _, height, width, _ = self._shape(value)
        if window.pads == same_pads(window, (height, width)):
            return value, self.schema.Padding.SAME
        return self.padded(window.pads, value, name=name), self.schema.Padding.VALID

    def padded(self, pads: tuple[int, int, int, int], value: int, *, name: str) -> int:
        """A map with zeros around it; itself where there are none.

        Args:
            pads: Above, left, below, right.
            value: The map.
            name: Of what reads it.
        """
        if not any(pads):
            return value
        batch, height, width, channels = self._shape(value)
        above, left, below, right = pads
        amounts = np.array(
            [[0, 0], [above, below], [left, right], [0, 0]], dtype=np.int32
        )
        label = "pad" + ".".join(map(str, pads))
        return self.add(
            "Pad",
            [value, self._constant(label, amounts)],
            f"{name}.padded",
            (batch, height + above + below, width + left + right, channels),
        )

    def fuse_activation(self, value: int, activation: int) -> bool:
        """Have what writes a value apply an activation to it; whether it can.

        Args:
            value: That nobody has read yet.
            activation: The schema's.
        """
        writer = next((o for o in self._operators if o.outputs == [value]), None)
        options: Any = None if writer is None else writer.builtinOptions
        fuses = type(options).__name__ in _FUSING
        none = self.schema.ActivationFunctionType.NONE
        if not fuses or options.fusedActivationFunction != none:
            return False
        options.fusedActivationFunction = activation
        return True

    def _add_dense(
        self,
        layer: ConvLayer | LinearLayer,
        value: int,
        *,
        activation: LayerActivation,
    ) -> int:
        """A layer on `(1, channels)`: fully connected."""
        name = layer.name
        shape = (layer.out_channels, layer.in_channels)
        weight = self._weights[f"{name}.weight"].reshape(shape)
        biased = f"{name}.bias" in self._weights
        bias = self._stored(f"{name}.bias") if biased else _NO_TENSOR
        value = self.add(
            "FullyConnected",
            [value, self._constant(f"{name}.weight", weight), bias],
            f"{name}.out",
            (1, layer.out_channels),
            fusedActivationFunction=self._fused(activation),
        )
        return self._add_activation(name, activation, value)

    def add_gate(self, layer: SqueezeExciteLayer, value: int) -> int:
        """See `Emitter`."""
        name = layer.name
        kinds = self.schema.ActivationFunctionType
        gate = self._add_mean(f"{name}.mean", value, keep_dims=True)
        gate = self._add_gate_conv(
            f"{name}.reduce",
            gate,
            bias=self._weights[f"{name}.reduce.bias"],
            fused=kinds.RELU,
        )
        # relu6(x + 3) / 6, the sum in the bias
        gate = self._add_gate_conv(
            f"{name}.expand",
            gate,
            bias=self._weights[f"{name}.expand.bias"] + np.float32(3),
            fused=kinds.RELU6,
        )
        sixth = self._constant("sixth", np.array([1 / 6], dtype=np.float32))
        gate = self.add("Mul", [gate, sixth], f"{name}.gate", self._shape(gate))
        return self.add("Mul", [value, gate], f"{name}.scaled", self._shape(value))

    def _add_gate_conv(
        self, name: str, value: int, *, bias: NDArray[np.float32], fused: int
    ) -> int:
        weight = channels_last(self._weights[f"{name}.weight"], depthwise=False)
        constants = [
            self._constant(f"{name}.weight", weight),
            self._constant(f"{name}.bias", bias),
        ]
        window = Window(kernel=(1, 1))
        return self.add_window(
            window, [value, *constants], name, multiplier=None, fused=fused
        )

    def _add_mean(self, name: str, value: int, *, keep_dims: bool) -> int:
        batch, _, _, channels = self._shape(value)
        shape = (batch, 1, 1, channels) if keep_dims else (batch, channels)
        axes = self._constant("height_and_width", _HEIGHT_AND_WIDTH)
        return self.add("Mean", [value, axes], name, shape, keepDims=keep_dims)

    def _add_activation(
        self, name: str, activation: LayerActivation, value: int
    ) -> int:
        if activation != "hswish":
            return value  # fused into the operator before
        return self.add("HardSwish", [value], f"{name}.act", self._shape(value))

    def _fused(self, activation: LayerActivation) -> int:
        kinds = self.schema.ActivationFunctionType
        kind: int = kinds.RELU if activation == "relu" else kinds.NONE
        return kind

    def _stored(self, name: str) -> int:
        return self._constant(name, self._weights[name])

    def _constant(self, name: str, data: Constant) -> int:
        if name not in self._constants:
            self._constants[name] = self.add_tensor(name, data.shape, data)
        return self._constants[name]

    def _shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(self._tensors[tensor].shape)

    def add(
        self,
        kind: str,
        inputs: list[int],
        output: str,
        shape: tuple[int, ...],
        **options: float | NDArray[np.int32],
    ) -> int:
        """Add an operator with one output, and return the output's index."""
        builtin, table = _OPERATORS[kind]
        code = getattr(self.schema.BuiltinOperator, builtin)
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._codes.setdefault(code, len(self._codes))
        operator.inputs = inputs
        if table is not None:
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            operator.builtinOptions = getattr(self.schema, f"{table}T")()
        for name, value in options.items():
            setattr(operator.builtinOptions, name, value)
        index = self.add_tensor(output, shape)
        operator.outputs = [index]
        self._operators.append(operator)
        return index

    def serialise(self, entered: int, value: int) -> bytes:
        """The finished model, from one tensor to another."""
        schema = self.schema
        self._tensors[value].name = OUTPUT_NAME
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs, graph.outputs = [entered], [value]
        model = schema.ModelT()
        model.version = SCHEMA_VERSION
        model.description = "ofa-deploy"
        model.subgraphs, model.buffers = [graph], self._buffers
        model.operatorCodes = [_operator_code(schema, code) for code in self._codes]
        model.signatureDefs = [_signature(schema, entered, value)]
        return _pack(model)


def channels_last(weight: Floats, *, depthwise: bool) -> Floats:
    """A convolution's weight `(out, in / groups, height, width)` as .tflite has it.

    `(out, height, width, in / groups)`; of a depthwise one `(1, height, width, out)`.
    """
    return weight.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))


def same_pads(window: Window, in_size: Pair) -> tuple[int, int, int, int]:
    """What the format's SAME pads: above, left, below, right."""
    totals = [
        max((-(-size // stride) - 1) * stride + extent - size, 0)
        for size, stride, extent in zip(
            in_size, window.stride, window.extent, strict=True
        )
    ]
    above, left = (total // 2 for total in totals)
    return above, left, totals[0] - above, totals[1] - left


# Operator code and options table, by the name used here.
_OPERATORS: dict[str, tuple[str, str | None]] = {
    "Add": ("ADD", "AddOptions"),
    "AveragePool2D": ("AVERAGE_POOL_2D", "Pool2DOptions"),
    "Concatenation": ("CONCATENATION", "ConcatenationOptions"),
    "Conv2D": ("CONV_2D", "Conv2DOptions"),
    "DepthwiseConv2D": ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"),
    "Div": ("DIV", "DivOptions"),
    "Elu": ("ELU", None),
    "FullyConnected": ("FULLY_CONNECTED", "FullyConnectedOptions"),
    "HardSwish": ("HARD_SWISH", "HardSwishOptions"),
    "LeakyRelu": ("LEAKY_RELU", "LeakyReluOptions"),
    "Logistic": ("LOGISTIC", None),
    "MaxPool2D": ("MAX_POOL_2D", "Pool2DOptions"),
    "Maximum": ("MAXIMUM", "MaximumMinimumOptions"),
    "Mean": ("MEAN", "ReducerOptions"),
    "Minimum": ("MINIMUM", "MaximumMinimumOptions"),
    "Mul": ("MUL", "MulOptions"),
    "Pad": ("PAD", "PadOptions"),
    "Prelu": ("PRELU", None),
    "Relu": ("RELU", None),
    "Relu6": ("RELU6", None),
    "Reshape": ("RESHAPE", "ReshapeOptions"),
    "Softmax": ("SOFTMAX", "SoftmaxOptions"),
    "StridedSlice": ("STRIDED_SLICE", "StridedSliceOptions"),
    "Sub": ("SUB", "SubOptions"),
    "Tanh": ("TANH", None),
    "Transpose": ("TRANSPOSE", "TransposeOptions"),
}
# Those that apply an activation to what they write.
_FUSING = {
    *("AddOptionsT", "Conv2DOptionsT", "DepthwiseConv2DOptionsT", "DivOptionsT"),
    *("FullyConnectedOptionsT", "MulOptionsT", "SubOptionsT"),
}


def _operator_code(schema: Any, code: int) -> Any:
    entry = schema.OperatorCodeT()
    entry.builtinCode = code
    entry.deprecatedBuiltinCode = min(code, 127)  # what readers before 2021 look at
    entry.version = 1
    return entry


def _signature(schema: Any, entered: int, value: int) -> Any:
    signature = schema.SignatureDefT()
    signature.signatureKey = SIGNATURE
    signature.subgraphIndex = 0
    signature.inputs = [_named_tensor(schema, INPUT_NAME, entered)]
    signature.outputs = [_named_tensor(schema, OUTPUT_NAME, value)]
    return signature


def _named_tensor(schema: Any, name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name = name
    entry.tensorIndex = index
    return entry


def _aligned_buffer(schema: Any, data: Constant) -> Any:
    buffer = schema.BufferT()
    buffer.data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return buffer


def _pack(model: Any) -> bytes:
    """As bytes, the data of each buffer at a multiple of `BUFFER_ALIGNMENT`."""
    import flatbuffers

    model.buffers = [_Aligned(buffer) for buffer in model.buffers]
    data_bytes = sum(buffer.nbytes for buffer in model.buffers)
    builder = flatbuffers.Builder(data_bytes + (1 << 17))
    builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
    return bytes(builder.Output())


class _Aligned:
    """A buffer whose data start at a multiple of `BUFFER_ALIGNMENT`."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.nbytes: int = 0 if buffer.data is None else buffer.data.nbytes

    def Pack(self, builder: Any) -> int:  # noqa: N802 - the generated code's name
        builder.Prep(BUFFER_ALIGNMENT, self.nbytes)
        offset: int = self._buffer.Pack(builder)
        return offset


def _import_schema() -> Any:
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise MissingDependency("LiteRT", extra="litert") from error
    return schema_py_generated
