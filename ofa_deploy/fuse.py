"""Folding batch norms into the convolutions before them; pure, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.layers import ConvLayer
from ofa_deploy.materialise import Weights
from ofa_deploy.plan import NetworkPlan

BATCH_NORM_EPS = 1e-5


def fold_batch_norm(
    weight: NDArray[np.float32],
    *,
    gamma: NDArray[np.float32],
    beta: NDArray[np.float32],
    mean: NDArray[np.float32],
    variance: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of the convolution that gives what the batch norm gives.

    Args:
        weight: `(out_channels, in_channels / groups, kernel, kernel)`.
        gamma: Scale, `(out_channels,)`, like all the rest.
        beta: Shift.
        mean: Running mean.
        variance: Running variance, biased.

    Raises:
        ValueError: The batch norm covers another number of channels.
    """
    if gamma.shape != weight.shape[:1]:
        raise ValueError(
            f"norm covers {gamma.shape[0]} channels, weight has {weight.shape[0]}"
        )
    scale = gamma.astype(np.float64) / np.sqrt(
        variance.astype(np.float64) + BATCH_NORM_EPS
    )
    fused = weight.astype(np.float64) * scale[:, None, None, None]
    bias = beta.astype(np.float64) - mean.astype(np.float64) * scale
    return fused.astype(np.float32), bias.astype(np.float32)


def fuse(weights: Weights, plan: NetworkPlan) -> dict[str, NDArray[np.float32]]:
    """The weights of the same network without batch norms.

    Each convolution that had one gets a `.bias` instead of its `.norm` tensors.
    """
    normed = {
        layer.name: layer
        for layer in plan.layers
        if isinstance(layer, ConvLayer) and layer.batch_norm
    }
    fused = {
        name: array
        for name, array in weights.items()
        if not any(part == "norm" for part in name.split("."))
        and name.removesuffix(".weight") not in normed
    }
    for name in normed:
        weight, bias = fold_batch_norm(
            weights[f"{name}.weight"],
            gamma=weights[f"{name}.norm.gamma"],
            beta=weights[f"{name}.norm.beta"],
            mean=weights[f"{name}.norm.mean"],
            variance=weights[f"{name}.norm.variance"],
        )
        fused[f"{name}.weight"], fused[f"{name}.bias"] = weight, bias
    return fused
