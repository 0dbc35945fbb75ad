"""From supernet weights to one network's own weights: prefix slices, kernel transforms.

Weights are a mapping from tensor names (`stage1.block1.expand.weight`) to float32
arrays. What the names are, per layer of a plan:

- convolution: `.weight`, and with batch norm `.norm.gamma`, `.norm.beta`, `.norm.mean`,
  `.norm.variance`; in a supernet also `.transform_7to5` and the like
- squeeze-and-excite: `.reduce.weight`, `.reduce.bias`, `.expand.weight`, `.expand.bias`
- classifier: `.weight`, `.bias`
- convolution of several branches: `.dense` and `.point` as convolutions with batch
  norm, `.identity.norm.gamma` and the like where there is such a branch
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.layers import (
    ConvLayer,
    Layer,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
    SqueezeExciteLayer,
)
from ofa_deploy.plan import NetworkPlan

Weights = Mapping[str, NDArray[np.float32]]

NORM_TENSORS = ("gamma", "beta", "mean", "variance")


def stored_shapes(largest: NetworkPlan) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a supernet, by name.

    Args:
        largest: Plan of its largest network.
    """
    return {
        f"{layer.name}.{name}": shape
        for layer in largest.layers
        for name, shape in _stored_shapes(layer).items()
    }


def fused_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors once its batch norm is folded, by name."""
    if isinstance(layer, RepConvLayer):
        layer = layer.merged
    shapes = _shared_shapes(layer)
    if isinstance(layer, ConvLayer) and layer.batch_norm:
        shapes["bias"] = (layer.out_channels,)
    return shapes


def _stored_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    if isinstance(layer, RepConvLayer):
        return _branch_shapes(layer)
    shapes = _shared_shapes(layer)
    if isinstance(layer, ConvLayer):
        for smaller, larger in pairwise(layer.kernels):
            shapes[f"transform_{larger}to{smaller}"] = (smaller**2, smaller**2)
        if layer.batch_norm:
            shapes |= {f"norm.{name}": (layer.out_channels,) for name in NORM_TENSORS}
    return shapes


def _branch_shapes(layer: RepConvLayer) -> dict[str, tuple[int, ...]]:
    """Of the tensors of all branches, by name within the layer."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{branch.name}.weight": branch.weight_shape for branch in layer.branches
    }
    for norm, channels in layer.norms.items():
        shapes |= {f"{norm}.norm.{name}": (channels,) for name in NORM_TENSORS}
    return {k.removeprefix(f"{layer.name}."): shape for k, shape in shapes.items()}


def _shared_shapes(
    layer: ConvLayer | SqueezeExciteLayer | PoolLayer | LinearLayer,
) -> dict[str, tuple[int, ...]]:
    """Of the tensors that a layer has whether or not its batch norm is folded."""
    if isinstance(layer, PoolLayer):
        return {}
    if isinstance(layer, ConvLayer):
        return {"weight": layer.weight_shape}
    if isinstance(layer, LinearLayer):
        outputs = layer.out_channels
        return {"weight": (outputs, layer.in_channels), "bias": (outputs,)}
    channels, middle = layer.channels, layer.middle_channels
    return {
        "reduce.weight": (middle, channels, 1, 1),
        "reduce.bias": (middle,),
        "expand.weight": (channels, middle, 1, 1),
        "expand.bias": (channels,),
    }


def materialise(stored: Weights, plan: NetworkPlan) -> dict[str, NDArray[np.float32]]:
    """The unfused weights of a plan, cut from a supernet's.

    The batch-norm statistics are the supernet's shared ones, which suit no single
    network: recalibrate before use.

    Args:
        stored: The supernet's weights.
        plan: Of a space that the supernet was trained on.
    """
    result: dict[str, NDArray[np.float32]] = {}
    for layer in plan.layers:
        for name, array in _cut(stored, layer).items():
            result[f"{layer.name}.{name}"] = np.ascontiguousarray(array)
    return result


def _cut(stored: Weights, layer: Layer) -> dict[str, NDArray[np.float32]]:
    if isinstance(layer, PoolLayer):
        return {}
    if isinstance(layer, LinearLayer):
        return {name: stored[f"{layer.name}.{name}"] for name in ("weight", "bias")}
    if isinstance(layer, SqueezeExciteLayer):
        return _cut_gate(stored, layer)
    if isinstance(layer, RepConvLayer):
        return _cut_branches(stored, layer)
    cut = {"weight": active_kernel(stored, layer)}
    if layer.batch_norm:
        for name in NORM_TENSORS:
            tensor = stored[f"{layer.name}.norm.{name}"]
            cut[f"norm.{name}"] = tensor[: layer.out_channels]
    return cut


def _cut_branches(
    stored: Weights, layer: RepConvLayer
) -> dict[str, NDArray[np.float32]]:
    cut: dict[str, NDArray[np.float32]] = {}
    for name, shape in _branch_shapes(layer).items():
        tensor = stored[f"{layer.name}.{name}"]
        cut[name] = tensor[tuple(slice(size) for size in shape)]
    return cut


def _cut_gate(
    stored: Weights, layer: SqueezeExciteLayer
) -> dict[str, NDArray[np.float32]]:
    channels, middle, name = layer.channels, layer.middle_channels, layer.name
    return {
        "reduce.weight": stored[f"{name}.reduce.weight"][:middle, :channels],
        "reduce.bias": stored[f"{name}.reduce.bias"][:middle],
        "expand.weight": stored[f"{name}.expand.weight"][:channels, :middle],
        "expand.bias": stored[f"{name}.expand.bias"][:channels],
    }


def active_kernel(stored: Weights, layer: ConvLayer) -> NDArray[np.float32]:
    """The layer's weight: prefix slices, then centre crops with transforms, chained.

    `K5 = crop(K7) @ M75ᵀ`, `K3 = crop(K5) @ M53ᵀ` over the flattened kernels
    (Once-for-All, section 3.3); the largest kernel passes through no matrix.
    """
    out, inputs = layer.weight_shape[:2]
    weight = stored[f"{layer.name}.weight"][:out, :inputs]
    for smaller, larger in reversed(list(pairwise(layer.kernels))):
        if layer.kernel == larger:
            break
        border = (larger - smaller) // 2
        centre = weight[..., border:-border, border:-border]
        matrix = stored[f"{layer.name}.transform_{larger}to{smaller}"]
        flat = centre.reshape(out, inputs, smaller**2) @ matrix.T
        weight = flat.reshape(centre.shape)
    return weight
