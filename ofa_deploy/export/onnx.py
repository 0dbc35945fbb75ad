"""A plan with its weights as ONNX, written node by node.

Three forms of one network: fused (convolutions with bias), unfused (with batch norms,
the parity reference), and the statistics graph, in which each batch norm normalises by
its batch and gives the batch's mean and variance as extra outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ofa_deploy.export.emitter import Emitter
from ofa_deploy.fuse import BATCH_NORM_EPS
from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LayerActivation,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
    SqueezeExciteLayer,
    Window,
)
from ofa_deploy.materialise import Weights, fused_shapes
from ofa_deploy.plan import IMAGE_CHANNELS, NetworkPlan

# 17 is read by every runtime in use; later opsets add nothing that a plan needs.
OPSET = 17
IR_VERSION = 8
INPUT_NAME = "image"
OUTPUT_NAME = "logits"

Form = Literal["fused", "unfused", "statistics"]
Constant: TypeAlias = NDArray[np.float32 | np.int64 | np.int32 | np.int8]
Buffer: TypeAlias = bytes | memoryview
Message: TypeAlias = onnx.ModelProto | onnx.GraphProto | onnx.TensorProto


def emit_network(
    plan: NetworkPlan, weights: Weights, *, form: Form, batch: int | None = 1
) -> bytes:
    """The network as a serialised ONNX model.

    Args:
        plan: The network.
        weights: Fused ones for the form "fused", else unfused ones.
        form: Which graph.
        batch: Images per inference; None leaves it free.

    Returns:
        Input `image` `(batch, 3, resolution, resolution)`, output `logits`
        `(batch, class_count)`; in the statistics form also `{layer}.mean` and
        `{layer}.variance`, `(channels,)`, for every batch norm.
    """
    graph = OnnxGraph(weights, form)
    value = INPUT_NAME
    for block in plan.blocks:
        value = graph.add_block(block, value)
    graph.end_with(value)
    shape = [batch or "N", IMAGE_CHANNELS, plan.resolution, plan.resolution]
    return graph.serialise(
        name=plan.name,
        input_shape=shape,
        output_shape=[batch or "N", plan.class_count],
    )


def emit_block(block: BlockPlan, *, rng: np.random.Generator) -> bytes:
    """One block as a model of its own, with random fused weights, to be timed.

    Args:
        block: The block; its layers fix all sizes.
        rng: Source of the weights. Their values do not matter, but must not be zero
            or denormal, which run at other speeds.
    """
    graph = OnnxGraph(random_weights(block.layers, rng=rng), "fused")
    return serialise_block(graph, block, INPUT_NAME)


def serialise_block(graph: OnnxGraph, block: BlockPlan, value: str) -> bytes:
    """A graph with nothing but one block, which begins at `value`."""
    graph.end_with(graph.add_block(block, value))
    flat = isinstance(block.layers[-1], LinearLayer)
    spatial = [] if flat else [block.out_size, block.out_size]
    return graph.serialise(
        name=block.key,
        input_shape=[1, block.in_channels, block.in_size, block.in_size],
        output_shape=[1, block.out_channels, *spatial],
    )


def random_weights(
    layers: Iterable[Layer], *, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Fused weights of unit gain, for timing a network that is not trained."""
    weights: dict[str, NDArray[np.float32]] = {}
    for layer in layers:
        for name, shape in fused_shapes(layer).items():
            values = rng.standard_normal(shape, dtype=np.float32)
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
            weights[f"{layer.name}.{name}"] = values / np.float32(fan_in**0.5)
    return weights


class OnnxGraph(Emitter[str]):
    """Nodes and initialisers of a model under construction."""

    def __init__(self, weights: Weights, form: Form) -> None:
        self._weights = weights
        self._form = form
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, Constant] = {}
        self._statistics: list[tuple[str, int]] = []

    def add(
        self,
        op: str,
        inputs: list[str],
        output: str,
        **attributes: int | float | list[int],
    ) -> str:
        """Add a node with one output, and return the output's name."""
        node = helper.make_node(op, inputs, [output])
        node.attribute.extend(
            helper.make_attribute(name, value) for name, value in attributes.items()
        )
        self._nodes.append(node)
        return output

    def end_with(self, value: str) -> None:
        """Give the model's output its name, where it is written."""
        writer = next(node for node in reversed(self._nodes) if value in node.output)
        writer.output[0] = OUTPUT_NAME

    def add_sum(self, block: BlockPlan, value: str, entered: str) -> str:
        """See `Emitter`."""
        return self.add("Add", [value, entered], f"{block.name}.sum")

    def add_pool(self, layer: PoolLayer, value: str) -> str:
        """See `Emitter`."""
        return self.add("GlobalAveragePool", [value], f"{layer.name}.out")

    def add_linear(self, layer: LinearLayer, value: str) -> str:
        """See `Emitter`."""
        flat = self.add("Flatten", [value], f"{layer.name}.flat", axis=1)
        names = [self._constant(f"{layer.name}.{n}") for n in ("weight", "bias")]
        return self.add("Gemm", [flat, *names], f"{layer.name}.out", transB=1)

    def add_conv(self, layer: ConvLayer, value: str) -> str:
        """See `Emitter`."""
        name = layer.name
        inputs = [value, self._constant(f"{name}.weight")]
        if layer.batch_norm and self._form == "fused":
            inputs.append(self._constant(f"{name}.bias"))
        value = self.add_window(
            layer.window, inputs, f"{name}.conv", groups=layer.groups
        )
        if layer.batch_norm:
            value = self._add_norm(name, layer.out_channels, value)
        return self._add_activation(name, layer.activation, value)

    def add_window(
        self, window: Window, inputs: list[str], output: str, *, groups: int
    ) -> str:
        """Add a convolution, and return the output's name.

        Args:
            window: How it goes over the map.
            inputs: Names of the map, of the weight, and of the bias if there is one.
            output: Name of what it writes.
            groups: Of channels.
        """
        dilated = {} if window.dilation == (1, 1) else {"dilations": window.dilation}
        return self.add(
            "Conv",
            inputs,
            output,
            kernel_shape=list(window.kernel),
            strides=list(window.stride),
            pads=list(window.pads),
            group=groups,
            **{name: list(value) for name, value in dilated.items()},
        )

    def add_rep_conv(self, layer: RepConvLayer, value: str) -> str:
        """See `Emitter`; unfused, every branch is there, with a norm of its own."""
        if self._form == "fused":
            return super().add_rep_conv(layer, value)
        dense, point = (self.add_conv(branch, value) for branch in layer.branches)
        total = self.add("Add", [dense, point], f"{layer.name}.branches")
        if layer.identity_channels:
            identity = self._add_identity(layer, value)
            total = self.add("Add", [total, identity], f"{layer.name}.sum")
        return self._add_activation(layer.name, layer.activation, total)

    def _add_identity(self, layer: RepConvLayer, value: str) -> str:
        """The input's own branch: the channels that both sides have, others zero."""
        name, channels = layer.identity_name, layer.identity_channels
        if layer.in_channels > channels:
            bounds = {"first": 0, "last": channels, "axis": 1}
            inputs = [
                self.add_array(f"{name}.{part}", np.array([place], dtype=np.int64))
                for part, place in bounds.items()
            ]
            value = self.add("Slice", [value, *inputs], f"{name}.prefix")
        value = self._add_norm(name, channels, value)
        if layer.out_channels > channels:
            amounts = np.zeros(8, dtype=np.int64)
            amounts[5] = layer.out_channels - channels  # behind the channels
            pads = self.add_array(f"{name}.pads", amounts)
            value = self.add("Pad", [value, pads], f"{name}.padded")
        return value

    def _add_norm(self, name: str, channels: int, value: str) -> str:
        """A batch norm, if this form has any."""
        if self._form == "unfused":
            return self._add_batch_norm(name, value)
        if self._form == "statistics":
            return self._add_batch_statistics(name, channels, value)
        return value

    def _add_activation(
        self, name: str, activation: LayerActivation, value: str
    ) -> str:
        if activation == "relu":
            return self.add("Relu", [value], f"{name}.act")
        if activation == "hswish":
            return self.add("HardSwish", [value], f"{name}.act")
        return value

    def _add_batch_norm(self, name: str, value: str) -> str:
        tensors = ("gamma", "beta", "mean", "variance")
        names = [self._constant(f"{name}.norm.{tensor}") for tensor in tensors]
        return self.add(
            "BatchNormalization",
            [value, *names],
            f"{name}.norm",
            epsilon=BATCH_NORM_EPS,
        )

    def _add_batch_statistics(self, name: str, channels: int, value: str) -> str:
        axes = [0, 2, 3]
        mean = self.add("ReduceMean", [value], f"{name}.mean4", axes=axes, keepdims=1)
        centred = self.add("Sub", [value, mean], f"{name}.centred")
        squared = self.add("Mul", [centred, centred], f"{name}.squared")
        variance = self.add(
            "ReduceMean", [squared], f"{name}.variance4", axes=axes, keepdims=1
        )
        eps = self.add_array("eps", np.array(BATCH_NORM_EPS, dtype=np.float32))
        shifted = self.add("Add", [variance, eps], f"{name}.shifted")
        spread = self.add("Sqrt", [shifted], f"{name}.spread")
        normal = self.add("Div", [centred, spread], f"{name}.normal")
        shape = (1, channels, 1, 1)
        gamma, beta = (
            self.add_array(
                f"{name}.norm.{tensor}",
                self._weights[f"{name}.norm.{tensor}"].reshape(shape),
            )
            for tensor in ("gamma", "beta")
        )
        scaled = self.add("Mul", [normal, gamma], f"{name}.scaled")
        flat = self.add_array("flat", np.array([-1], dtype=np.int64))
        self.add("Reshape", [mean, flat], f"{name}.mean")
        self.add("Reshape", [variance, flat], f"{name}.variance")
        self._statistics.append((name, channels))
        return self.add("Add", [scaled, beta], f"{name}.norm")

    def add_gate(self, layer: SqueezeExciteLayer, value: str) -> str:
        """See `Emitter`."""
        name = layer.name
        gate = self.add("GlobalAveragePool", [value], f"{name}.mean")
        for part in ("reduce", "expand"):
            names = [self._constant(f"{name}.{part}.{n}") for n in ("weight", "bias")]
            gate = self.add("Conv", [gate, *names], f"{name}.{part}")
            if part == "reduce":
                gate = self.add("Relu", [gate], f"{name}.relu")
        # relu6(x + 3) / 6
        gate = self.add(
            "HardSigmoid", [gate], f"{name}.gate", alpha=1.0 / 6.0, beta=0.5
        )
        return self.add("Mul", [value, gate], f"{name}.scaled")

    def _constant(self, name: str) -> str:
        return self.add_array(name, self._weights[name])

    def add_array(self, name: str, array: Constant) -> str:
        """Add a constant, once, and return its name."""
        self._constants.setdefault(name, array)
        return name

    def serialise(
        self,
        *,
        name: str,
        input_shape: list[int | str],
        output_shape: list[int | str],
    ) -> bytes:
        """The finished model."""

        def value(label: str, shape: list[int | str]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(label, TensorProto.FLOAT, shape)

        outputs = [value(OUTPUT_NAME, output_shape)]
        for layer, channels in self._statistics:
            outputs += [
                value(f"{layer}.{part}", [channels]) for part in ("mean", "variance")
            ]
        graph = onnx.GraphProto(name=name)
        graph.node.extend(self._nodes)
        graph.input.append(value(INPUT_NAME, input_shape))
        graph.output.extend(outputs)
        model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="ofa-deploy")
        model.opset_import.append(helper.make_opsetid("", OPSET))
        # The weights never pass through a message: that would copy them three times.
        parts: list[Buffer] = [graph.SerializeToString()]
        for label, array in self._constants.items():
            parts += _field(graph, "initializer", _tensor(label, array))
        return b"".join([model.SerializeToString(), *_field(model, "graph", parts)])


def _tensor(label: str, array: Constant) -> list[Buffer]:
    """A `TensorProto` in the wire format, its values without a copy."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    header = onnx.TensorProto(name=label, data_type=kind, dims=array.shape)
    values = array.reshape(-1).view(np.uint8).data
    return [header.SerializeToString(), *_field(header, "raw_data", [values])]


def _field(message: Message, name: str, parts: list[Buffer]) -> list[Buffer]:
    """Bytes of one field of a message, to follow those of its other fields.

    Source: Protocol Buffers documentation, "Encoding", length-delimited records.
    """
    number = message.DESCRIPTOR.fields_by_name[name].number
    length = sum(len(part) for part in parts)
    return [_varint(number << 3 | 2) + _varint(length), *parts]


def _varint(value: int) -> bytes:
    """Seven bits a byte, least significant first; the top bit says that more follow."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
