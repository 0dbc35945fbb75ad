"""Folding batch norms into convolutions, and branches into one; pure, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.layers import ConvLayer, RepConvLayer
from ofa_deploy.materialise import NORM_TENSORS, Weights, fused_shapes
from ofa_deploy.plan import NetworkPlan

BATCH_NORM_EPS = 1e-5

Floats = NDArray[np.float64]
Kernels = NDArray[np.float32] | Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchNorm:
    """What a batch norm does when it is not trained, `(channels,)` each.

    Args:
        gamma: Scale.
        beta: Shift.
        mean: Running mean.
        variance: Running variance, biased.
    """

    gamma: NDArray[np.float32]
    beta: NDArray[np.float32]
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]

    @classmethod
    def of(cls, weights: Weights, layer_name: str) -> BatchNorm:
        """The one behind a layer."""
        return cls(
            **{name: weights[f"{layer_name}.norm.{name}"] for name in NORM_TENSORS}
        )

    def fold(self, weight: Kernels) -> tuple[Floats, Floats]:
        """Weight and bias of the convolution that gives what this gives behind one.

        Args:
            weight: `(out_channels, in_channels / groups, kernel, kernel)`.

        Raises:
            ValueError: The convolution has another number of channels.
        """
        if self.gamma.shape != weight.shape[:1]:
            raise ValueError(
                f"norm covers {self.gamma.shape[0]} channels, weight has "
                f"{weight.shape[0]}"
            )
        spread = np.sqrt(self.variance.astype(np.float64) + BATCH_NORM_EPS)
        scale = self.gamma.astype(np.float64) / spread
        bias = self.beta.astype(np.float64) - self.mean.astype(np.float64) * scale
        return weight.astype(np.float64) * scale[:, None, None, None], bias


def merge_branches(
    *,
    dense: tuple[Kernels, BatchNorm],
    point: tuple[Kernels, BatchNorm],
    identity: BatchNorm | None,
    groups: int = 1,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of the one convolution that a sum of branches is.

    Source: RepVGG (CVPR 2021), section 3.3.

    Args:
        dense: The 3×3 branch, `(out_channels, in_channels / groups, 3, 3)`.
        point: The 1×1 branch, `(out_channels, in_channels / groups, 1, 1)`.
        identity: Of the input itself; covers the channels that are handed on, the
            first ones of input and output. None for no such branch.
        groups: Of both convolutions.

    Raises:
        ValueError: The branches do not fit each other.
    """
    weight, bias = dense[1].fold(dense[0])
    centre, point_bias = point[1].fold(point[0])
    if weight.shape[2:] != (3, 3) or centre.shape != (*weight.shape[:2], 1, 1):
        raise ValueError(
            f"branches of shapes {weight.shape} and {centre.shape}; give a 3×3 and a "
            "1×1 kernel of the same channels"
        )
    weight[:, :, 1:2, 1:2] += centre
    bias += point_bias
    if identity is not None:
        count, group_inputs = len(identity.gamma), weight.shape[1]
        if count > min(len(weight), group_inputs * groups):
            raise ValueError(
                f"the identity branch has {count} channels, the convolution "
                f"{group_inputs * groups} and {len(weight)}"
            )
        outputs = np.arange(count)
        if (outputs // (len(weight) // groups) != outputs // group_inputs).any():
            raise ValueError(
                f"with {groups} groups between {group_inputs * groups} and "
                f"{len(weight)} channels a channel that is handed on is in another "
                "group than the one that reads it"
            )
        # As a convolution: a 1 from each channel to itself, counted within its group.
        kernel = np.zeros((count, group_inputs, 1, 1))
        kernel[outputs, outputs % group_inputs] = 1.0
        kernel, identity_bias = identity.fold(kernel)
        weight[:count, :, 1:2, 1:2] += kernel
        bias[:count] += identity_bias
    return weight.astype(np.float32), bias.astype(np.float32)


def fuse(weights: Weights, plan: NetworkPlan) -> dict[str, NDArray[np.float32]]:
    """The weights of the same network without batch norms.

    Each convolution that had one gets a `.bias` instead of its `.norm` tensors; several
    branches become one convolution.
    """
    fused: dict[str, NDArray[np.float32]] = {}
    for layer in plan.layers:
        name = layer.name
        if isinstance(layer, RepConvLayer):
            weight, bias = _merge(weights, layer)
            fused |= {f"{name}.weight": weight, f"{name}.bias": bias}
        elif isinstance(layer, ConvLayer) and layer.batch_norm:
            kernels, shift = BatchNorm.of(weights, name).fold(weights[f"{name}.weight"])
            fused[f"{name}.weight"] = kernels.astype(np.float32)
            fused[f"{name}.bias"] = shift.astype(np.float32)
        else:
            fused |= {
                f"{name}.{part}": weights[f"{name}.{part}"]
                for part in fused_shapes(layer)
            }
    return fused


def _merge(
    weights: Weights, layer: RepConvLayer
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    dense, point = (
        (weights[f"{branch.name}.weight"], BatchNorm.of(weights, branch.name))
        for branch in layer.branches
    )
    return merge_branches(
        dense=dense,
        point=point,
        identity=(
            BatchNorm.of(weights, layer.identity_name)
            if layer.identity_channels
            else None
        ),
    )
