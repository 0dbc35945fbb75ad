"""Branched convolutions as .tflite with their branches: what merging them saves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.export.litert import LiteRTGraph
from ofa_deploy.export.onnx import INPUT_NAME
from ofa_deploy.fuse import BatchNorm
from ofa_deploy.layers import RepConvLayer
from ofa_deploy.plan import IMAGE_CHANNELS, NetworkPlan

Weights = dict[str, NDArray[np.float32]]


def emit_branched(plan: NetworkPlan, weights: Weights) -> bytes:
    """The network with every branch, batch norms folded into each as runtimes do.

    Args:
        plan: Of branched convolutions that do not narrow.
        weights: Unfused.
    """
    graph = _BranchedGraph(_fold_each(plan, weights))
    size = plan.resolution
    entered = graph.add_tensor(INPUT_NAME, (1, size, size, IMAGE_CHANNELS))
    value = entered
    for block in plan.blocks:
        value = graph.add_block(block, value)
    return graph.serialise(entered, value)


def _fold_each(plan: NetworkPlan, weights: Weights) -> Weights:
    folded = dict(weights)
    for layer in plan.layers:
        if not isinstance(layer, RepConvLayer):
            continue
        for branch in layer.branches:
            kernel, bias = BatchNorm.of(weights, branch.name).fold(
                weights[f"{branch.name}.weight"]
            )
            folded[f"{branch.name}.weight"] = kernel.astype(np.float32)
            folded[f"{branch.name}.bias"] = bias.astype(np.float32)
        if layer.identity_channels:
            unit = np.ones((layer.identity_channels, 1, 1, 1), dtype=np.float32)
            scale, shift = BatchNorm.of(weights, layer.identity_name).fold(unit)
            folded[f"{layer.identity_name}.scale"] = scale.ravel().astype(np.float32)
            folded[f"{layer.identity_name}.shift"] = shift.astype(np.float32)
    return folded


class _BranchedGraph(LiteRTGraph):
    def add_rep_conv(self, layer: RepConvLayer, value: int) -> int:
        dense, point = (self.add_conv(branch, value) for branch in layer.branches)
        shape = self._shape(dense)
        parts = [dense, point]
        if layer.identity_channels:
            name = layer.identity_name
            constants = [self._stored(f"{name}.{part}") for part in ("scale", "shift")]
            inner = self._shape(value)
            scaled = self.add("Mul", [value, constants[0]], f"{name}.scaled", inner)
            out = self.add("Add", [scaled, constants[1]], f"{name}.out", inner)
            parts.append(self._widen(layer, out, shape))
        options: dict[str, Any] = {}
        for place, part in enumerate(parts[1:], start=1):
            if place == len(parts) - 1:
                options = {"fusedActivationFunction": self._fused(layer.activation)}
            label = f"{layer.name}.sum{place}"
            parts[0] = self.add("Add", [parts[0], part], label, shape, **options)
        return parts[0]

    def _widen(self, layer: RepConvLayer, value: int, shape: tuple[int, ...]) -> int:
        """Zeros for the channels that the layer's input lacks."""
        if layer.in_channels > layer.out_channels:
            raise ValueError(f"{layer.name} narrows; its identity would be cut")
        missing = layer.out_channels - layer.in_channels
        if not missing:
            return value
        amounts = np.zeros((4, 2), dtype=np.int32)
        amounts[3, 1] = missing
        pads = self._constant(f"{layer.identity_name}.pads", amounts)
        return self.add("Pad", [value, pads], f"{layer.identity_name}.wide", shape)
