"""A small .tflite model with the names and shapes of `profilers_models`."""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tests.support.profilers_models import INPUT_SHAPE


def operators(model: bytes) -> list[str]:
    """Names of a model's operators, in order."""
    names = {
        code: name
        for name, code in vars(schema.BuiltinOperator).items()
        if isinstance(code, int)
    }
    content = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(model, 0))
    codes = [names[code.builtinCode] for code in content.operatorCodes]
    return [codes[op.opcodeIndex] for op in content.subgraphs[0].operators]


def conv_tflite(*, free_batch: bool = False, interrupted: bool = False) -> bytes:
    """One 1x1 convolution over the last axis, from `x` to `y` of the same shape.

    Args:
        free_batch: Leave the first dimension open.
        interrupted: Follow it by a normalisation that XNNPACK has no kernel for, and
            by the same convolution again.
    """
    channels = INPUT_SHAPE[-1]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((channels, 1, 1, channels), dtype=np.float32)
    bias = np.zeros(channels, dtype=np.float32)
    model = schema.ModelT()
    model.version = 3
    model.buffers = [schema.BufferT(), _buffer(weight), _buffer(bias)]
    graph = schema.SubGraphT()
    names = ["x", "y"] if not interrupted else ["x", "between", "normal", "y"]
    graph.tensors = [
        _tensor("weight", weight.shape, buffer=1),
        _tensor("bias", bias.shape, buffer=2),
        *(_tensor(name, INPUT_SHAPE, free_batch=free_batch) for name in names),
    ]
    last = len(graph.tensors) - 1
    graph.inputs, graph.outputs = [2], [last]
    graph.operators = [_conv(2, 3)]
    if interrupted:
        graph.operators += [_normalisation(3, 4), _conv(4, 5)]
    model.subgraphs = [graph]
    model.operatorCodes = [_code("CONV_2D"), _code("L2_NORMALIZATION")]
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _conv(source: int, target: int) -> Any:
    conv = schema.OperatorT()
    conv.opcodeIndex = 0
    conv.inputs, conv.outputs = [source, 0, 1], [target]
    conv.builtinOptionsType = schema.BuiltinOptions.Conv2DOptions
    conv.builtinOptions = schema.Conv2DOptionsT()
    conv.builtinOptions.strideH = conv.builtinOptions.strideW = 1
    conv.builtinOptions.dilationHFactor = conv.builtinOptions.dilationWFactor = 1
    return conv


def _normalisation(source: int, target: int) -> Any:
    normalisation = schema.OperatorT()
    normalisation.opcodeIndex = 1
    normalisation.inputs, normalisation.outputs = [source], [target]
    normalisation.builtinOptionsType = schema.BuiltinOptions.L2NormOptions
    normalisation.builtinOptions = schema.L2NormOptionsT()
    return normalisation


def _code(operator: str) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, operator)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = 1
    return code


def _buffer(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Any:
    buffer = schema.BufferT()
    buffer.data = values.reshape(-1).view(np.uint8)
    return buffer


def _tensor(
    name: str, shape: tuple[int, ...], *, buffer: int = 0, free_batch: bool = False
) -> Any:
    tensor = schema.TensorT()
    tensor.name = name
    tensor.shape = list(shape)
    if free_batch:
        tensor.shapeSignature = [-1, *shape[1:]]
    tensor.type = schema.TensorType.FLOAT32
    tensor.buffer = buffer
    return tensor
