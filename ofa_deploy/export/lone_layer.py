"""One layer of any network as a model of its own, with random weights, to be timed.

Blocks of a space are square and padded by half their kernels; what people bring has
layers of any kernel, stride, dilation, padding and grouping, on maps of any shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.export.litert import LiteRTGraph, channels_last
from ofa_deploy.export.onnx import INPUT_NAME, OnnxGraph
from ofa_deploy.layers import Pair, Window

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoneLayer:
    """A convolution and its ReLU, or a linear layer.

    Args:
        name: Of the module that it is in its network.
        in_channels: What it reads.
        out_channels: What it writes.
        in_size: Height and width of the map that it reads; of a linear layer the
            places that it is called at, and 1.
        window: How it goes over the map; None of a linear layer.
        groups: Of channels.
    """

    name: str = field(compare=False)
    in_channels: int
    out_channels: int
    in_size: Pair
    window: Window | None
    groups: int = 1

    @property
    def key(self) -> str:
        """Everything its latency depends on."""
        height, width = self.in_size
        read = f"in{self.in_channels}x{height}x{width}"
        if self.window is None:
            return f"{read}_linear{self.out_channels}"
        parts = [
            f"conv{self.out_channels}",
            f"k{_told(self.window.kernel)}",
            f"s{_told(self.window.stride)}",
            f"d{_told(self.window.dilation)}",
            f"p{_told(self.window.pads)}",
            f"g{self.groups}",
        ]
        return f"{read}_{'-'.join(parts)}"

    @property
    def out_size(self) -> Pair:
        """Height and width of what it writes."""
        return self.window.out_size(self.in_size) if self.window else self.in_size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(out, in / groups, height, width)`; of a linear layer `(out, in)`."""
        read = self.in_channels // self.groups
        return (self.out_channels, read, *(self.window.kernel if self.window else ()))

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is filtered alone, once or several times."""
        return 1 < self.groups == self.in_channels


def emit_onnx(layer: LoneLayer, *, rng: np.random.Generator) -> bytes:
    """As ONNX; its input is `image`, a map or `(places, channels)`."""
    graph = OnnxGraph({}, "fused")
    weight, bias = _random(layer, rng)
    inputs = [
        INPUT_NAME,
        graph.add_array("weight", weight),
        graph.add_array("bias", bias),
    ]
    if layer.window is None:
        graph.end_with(graph.add("Gemm", inputs, "out", transB=1))
        places = layer.in_size[0]
        return graph.serialise(
            name=layer.key,
            input_shape=[places, layer.in_channels],
            output_shape=[places, layer.out_channels],
        )
    value = graph.add_window(layer.window, inputs, "conv", groups=layer.groups)
    graph.end_with(graph.add("Relu", [value], "out"))
    return graph.serialise(
        name=layer.key,
        input_shape=[1, layer.in_channels, *layer.in_size],
        output_shape=[1, layer.out_channels, *layer.out_size],
    )


def emit_litert(layer: LoneLayer, *, rng: np.random.Generator) -> bytes:
    """As .tflite; its input is `image`, channels last."""
    graph = LiteRTGraph({})
    weight, bias = _random(layer, rng)
    entered_shape: tuple[int, ...] = (layer.in_size[0], layer.in_channels)
    if layer.window is not None:
        weight = channels_last(weight, depthwise=layer.is_depthwise)
        entered_shape = (1, *layer.in_size, layer.in_channels)
    entered = graph.add_tensor(INPUT_NAME, entered_shape)
    inputs = [
        entered,
        graph.add_tensor("weight", weight.shape, weight),
        graph.add_tensor("bias", bias.shape, bias),
    ]
    if layer.window is None:
        shape = (layer.in_size[0], layer.out_channels)
        return graph.serialise(
            entered, graph.add("FullyConnected", inputs, "out", shape)
        )
    value = graph.add_window(
        layer.window,
        inputs,
        "out",
        multiplier=layer.out_channels // layer.groups if layer.is_depthwise else None,
        fused=graph.schema.ActivationFunctionType.RELU,
    )
    return graph.serialise(entered, value)


def _random(layer: LoneLayer, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A weight of unit gain, and a bias: zeros would be computed at other speeds."""
    shape = layer.weight_shape
    weight = rng.standard_normal(shape, dtype=np.float32)
    weight /= np.float32(np.prod(shape[1:]) ** 0.5)
    return weight, rng.standard_normal(layer.out_channels, dtype=np.float32)


def _told(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
