"""Which format a runtime reads, and random models in it, to be timed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from ofa_deploy.export import litert, lone_layer, onnx, timed_int8
from ofa_deploy.export.lone_layer import LoneLayer
from ofa_deploy.layers import BlockPlan
from ofa_deploy.plan import NetworkPlan

Precision = Literal["float32", "int8"]

_SUFFIXES = {"litert-cpu": ".tflite"}


def model_suffix(backend_name: str) -> str:
    """Ending of the files that a backend reads: `.onnx`, or `.tflite`."""
    return _SUFFIXES.get(backend_name, ".onnx")


def timed_block(
    block: BlockPlan,
    *,
    backend_name: str,
    rng: np.random.Generator,
    precision: Precision = "float32",
) -> bytes:
    """A block with random weights, in the backend's format."""
    if model_suffix(backend_name) == ".tflite":
        if precision == "int8":
            return timed_int8.emit_litert_block(block, rng=rng)
        return litert.emit_block(block, rng=rng)
    if precision == "int8":
        on_tensorrt = backend_name.startswith("tensorrt")
        return timed_int8.emit_onnx_block(
            block, rng=rng, integer_biases=not on_tensorrt
        )
    return onnx.emit_block(block, rng=rng)


def timed_layer(
    layer: LoneLayer, *, backend_name: str, rng: np.random.Generator
) -> bytes:
    """A layer with random weights, in the backend's format."""
    if model_suffix(backend_name) == ".tflite":
        return lone_layer.emit_litert(layer, rng=rng)
    return lone_layer.emit_onnx(layer, rng=rng)


def timed_network(
    plan: NetworkPlan, *, backend_name: str, rng: np.random.Generator
) -> bytes:
    """A network with random weights, in the backend's format."""
    weights = onnx.random_weights(plan.layers, rng=rng)
    if model_suffix(backend_name) == ".tflite":
        return litert.emit_network(plan, weights)
    return onnx.emit_network(plan, weights, form="fused")


def write_timed(folder: Path, name: str, model: bytes, *, backend_name: str) -> Path:
    """Write a model into a folder, and return its file."""
    # A name can be longer than a file's may be.
    stem = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = folder / f"{stem}{model_suffix(backend_name)}"
    path.write_bytes(model)
    return path
