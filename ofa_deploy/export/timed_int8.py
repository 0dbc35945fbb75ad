"""Blocks in int8 whose scales are made up: right to be timed, and for nothing else.

How long an integer kernel takes does not depend on the scales, so a probe needs no
calibration. Where the quantising stands does matter: after each convolution with its
ReLU, and after everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.export.litert import Constant as LiteRTConstant
from ofa_deploy.export.litert import LiteRTGraph
from ofa_deploy.export.litert import serialise_block as serialise_litert
from ofa_deploy.export.onnx import INPUT_NAME, OnnxGraph, random_weights
from ofa_deploy.export.onnx import serialise_block as serialise_onnx
from ofa_deploy.layers import BlockPlan, LayerActivation
from ofa_deploy.materialise import Weights

# Powers of two, so that rescaling is exact; activations reach ±8, weights ±2.
_ACTIVATION_SCALE = 1 / 16
_WEIGHT_SCALE = 1 / 64
_INT8 = np.iinfo(np.int8)


def emit_onnx_block(
    block: BlockPlan, *, rng: np.random.Generator, integer_biases: bool
) -> bytes:
    """One block as ONNX with pairs of QuantizeLinear and DequantizeLinear.

    Args:
        block: The block.
        rng: Source of the weights.
        integer_biases: ONNX Runtime fuses only where biases are int32 too; TensorRT
            refuses them.
    """
    weights = random_weights(block.layers, rng=rng)
    graph = _QdqGraph(weights, integer_biases=integer_biases)
    return serialise_onnx(graph, block, graph.quantise(INPUT_NAME, "entered"))


def emit_litert_block(block: BlockPlan, *, rng: np.random.Generator) -> bytes:
    """One block as .tflite with int8 tensors, its input and output included."""
    return serialise_litert(_Int8Graph(random_weights(block.layers, rng=rng)), block)


class _QdqGraph(OnnxGraph):
    """Every value is quantised where a quantiser would."""

    def __init__(self, weights: Weights, *, integer_biases: bool) -> None:
        super().__init__(weights, "fused")
        self._integer_biases = integer_biases

    def quantise(self, value: str, output: str) -> str:
        """Add a pair of QuantizeLinear and DequantizeLinear."""
        scale = [self._scale("activation.scale", _ACTIVATION_SCALE), self._zero()]
        quantised = super().add("QuantizeLinear", [value, *scale], f"{output}.int8")
        return super().add("DequantizeLinear", [quantised, *scale], output)

    def add(
        self,
        op: str,
        inputs: list[str],
        output: str,
        **attributes: int | float | list[int],
    ) -> str:
        """See `OnnxGraph`; what a convolution gives waits for its activation."""
        if op == "Conv":
            return super().add(op, inputs, output, **attributes)
        value = super().add(op, inputs, f"{output}.float", **attributes)
        return self.quantise(value, output)

    def _add_activation(
        self, name: str, activation: LayerActivation, value: str
    ) -> str:
        if activation != "relu":  # which runs inside the convolution
            value = self.quantise(value, f"{name}.quantised")
        return super()._add_activation(name, activation, value)

    def _constant(self, name: str) -> str:
        values = self._weights[name]
        if name.endswith("bias") and not self._integer_biases:
            return super()._constant(name)
        if name.endswith("bias"):
            scale, label = _ACTIVATION_SCALE * _WEIGHT_SCALE, "bias.scale"
            stored: NDArray[Any] = np.rint(values / scale).astype(np.int32)
            zero = self.add_array("bias.zero", np.array(0, dtype=np.int32))
        else:
            scale, label = _WEIGHT_SCALE, "weight.scale"
            stored, zero = _to_int8(values, scale), self._zero()
        inputs = [self.add_array(f"{name}.stored", stored), self._scale(label, scale)]
        return super().add("DequantizeLinear", [*inputs, zero], name)

    def _scale(self, label: str, scale: float) -> str:
        return self.add_array(label, np.array(scale, dtype=np.float32))

    def _zero(self) -> str:
        return self.add_array("zero", np.array(0, dtype=np.int8))


class _Int8Graph(LiteRTGraph):
    """Every tensor is int8, biases are int32."""

    def encode(
        self, name: str, data: LiteRTConstant | None
    ) -> tuple[int, Any, LiteRTConstant | None]:
        """See `LiteRTGraph`."""
        types = self.schema.TensorType
        if data is None:
            return types.INT8, self._scaled(_ACTIVATION_SCALE), None
        if data.dtype == np.int32:  # shapes and axes, not values
            return super().encode(name, data)
        if name.endswith("bias"):
            scale = _ACTIVATION_SCALE * _WEIGHT_SCALE
            stored = np.rint(data / scale).astype(np.int32)
            return types.INT32, self._scaled(scale), stored
        return types.INT8, self._scaled(_WEIGHT_SCALE), _to_int8(data, _WEIGHT_SCALE)

    def _scaled(self, scale: float) -> Any:
        parameters = self.schema.QuantizationParametersT()
        parameters.scale = np.array([scale], dtype=np.float32)
        parameters.zeroPoint = np.array([0], dtype=np.int64)
        return parameters


def _to_int8(values: NDArray[Any], scale: float) -> NDArray[np.int8]:
    return np.rint(values / scale).clip(_INT8.min, _INT8.max).astype(np.int8)
