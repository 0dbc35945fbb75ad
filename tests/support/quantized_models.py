"""Small ONNX models in the types that TensorRT builds engines of."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Quantized = Literal["nothing", "weights", "all"]

CHANNELS, CLASSES = 8, 16
ACTIVATION_SCALE = 0.03


class _Graph:
    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **settings: Any) -> str:
        node = helper.make_node(kind, inputs, [output], name=output, **settings)
        self.nodes.append(node)
        return output

    def activation(self, name: str) -> str:
        """Round an activation to int8 and back."""
        scale = self.constant(f"{name}_scale", self.dtype.type(ACTIVATION_SCALE))
        zero = self.constant(f"{name}_zero", np.int8(0))
        stored = self.node("QuantizeLinear", [name, scale, zero], f"{name}_q")
        return self.node("DequantizeLinear", [stored, scale, zero], f"{name}_dq")

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Store a weight as int8, with a scale per output channel."""
        scale = np.abs(value).reshape(len(value), -1).max(axis=1) / 127
        rounded = np.round(value / scale.reshape(-1, *[1] * (value.ndim - 1)))
        parts = [
            self.constant(f"{name}_int8", rounded.astype(np.int8)),
            self.constant(f"{name}_scale", scale.astype(self.dtype)),
            self.constant(f"{name}_zero", np.zeros(len(value), np.int8)),
        ]
        return self.node("DequantizeLinear", parts, f"{name}_dq", axis=0)


def small_network(dtype: str = "float32", *, quantized: Quantized = "nothing") -> bytes:
    """A convolution, a ReLU, a mean, and a classifier, from `x` to `y`.

    Args:
        dtype: Of what is not quantized.
        quantized: `weights` stores these as int8; `all` rounds activations as well.
    """
    rng = np.random.default_rng(0)
    graph = _Graph(np.dtype(dtype))
    conv = rng.standard_normal((CHANNELS, 3, 3, 3)).astype(dtype)
    classifier = rng.standard_normal((CLASSES, CHANNELS)).astype(dtype)
    activation = graph.activation if quantized == "all" else str
    weight = graph.constant if quantized == "nothing" else graph.weight
    operands = [activation("x"), weight("w1", conv)]
    graph.node("Conv", operands, "conv", pads=[1] * 4)
    graph.node("Relu", ["conv"], "relu")
    graph.node("GlobalAveragePool", ["relu"], "mean")
    graph.node("Flatten", ["mean"], "flat")
    operands = [activation("flat"), weight("w2", classifier)]
    graph.node("Gemm", operands, "y", transB=1)
    kind = helper.np_dtype_to_tensor_dtype(graph.dtype)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "small",
            [helper.make_tensor_value_info("x", kind, [1, 3, 8, 8])],
            [helper.make_tensor_value_info("y", kind, [1, CLASSES])],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )
    return bytes(model.SerializeToString())


def unknown_operator() -> bytes:
    """A model of one node that nobody has."""
    shape = [1, 3, 8, 8]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Mystery", ["x"], ["y"], name="odd", domain="example")],
            "odd",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        ),
        opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("example", 1)],
        ir_version=9,
    )
    return bytes(model.SerializeToString())
