"""Elastic operators: stored at their largest, applied at the size a layer asks for.

Width is a prefix slice, kernel size a chain of centre crops with learned transforms.
Source: Once-for-All (ICLR 2020), section 3.3, and the authors' code.
"""

from __future__ import annotations

import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.fuse import BATCH_NORM_EPS
from ofa_deploy.layers import (
    ConvLayer,
    LayerActivation,
    LinearLayer,
    RepConvLayer,
    SqueezeExciteLayer,
)

BATCH_NORM_MOMENTUM = 0.1


class ElasticBatchNorm(nn.Module):
    """Batch norm over a prefix of its channels.

    The running statistics are shared by all sub-networks and right for none of them:
    recalibrate before evaluating one.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(N, C, H, W)` with the first C channels' parameters."""
        channels = x.shape[1]
        return F.batch_norm(
            x,
            self.mean[:channels],
            self.variance[:channels],
            self.gamma[:channels],
            self.beta[:channels],
            self.training,
            BATCH_NORM_MOMENTUM,
            BATCH_NORM_EPS,
        )


def transform_name(larger: int, smaller: int) -> str:
    """Name of the matrix that makes the smaller kernel from the larger one."""
    return f"transform_{larger}to{smaller}"


def is_transform(name: str) -> bool:
    """Whether a parameter is such a matrix, by its name in a network."""
    return re.fullmatch(r"transform_\d+to\d+", name.rpartition(".")[2]) is not None


class ElasticConv(nn.Module):
    """A convolution cut to a `ConvLayer`, with its batch norm and activation.

    Args:
        largest: The layer of the largest network; fixes the stored sizes.
    """

    def __init__(self, largest: ConvLayer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(largest.weight_shape))
        fan_out = largest.out_channels * largest.kernel**2 // largest.groups
        nn.init.normal_(self.weight, std=(2.0 / fan_out) ** 0.5)
        for smaller, larger in pairwise(largest.kernels):
            matrix = nn.Parameter(torch.eye(smaller**2))
            self.register_parameter(transform_name(larger, smaller), matrix)
        self.norm = (
            ElasticBatchNorm(largest.out_channels) if largest.batch_norm else None
        )

    def active_weight(self, layer: ConvLayer) -> Tensor:
        """The weight of `layer.weight_shape`: prefix slices, then the kernel chain."""
        out, inputs = layer.weight_shape[:2]
        weight = self.weight[:out, :inputs]
        for smaller, larger in reversed(list(pairwise(layer.kernels))):
            if layer.kernel == larger:
                break
            border = (larger - smaller) // 2
            centre = weight[..., border:-border, border:-border]
            matrix = self.get_parameter(transform_name(larger, smaller))
            weight = F.linear(centre.flatten(2), matrix).reshape(centre.shape)
        return weight

    def forward(self, x: Tensor, layer: ConvLayer) -> Tensor:
        """Apply to `(N, layer.in_channels, in_size, in_size)`."""
        x = convolve(x, self.active_weight(layer), layer)
        if self.norm is not None:
            x = self.norm(x)
        return activate(x, layer.activation)


class ElasticIdentity(nn.Module):
    """The input itself, normalised: the third branch of a `RepConvLayer`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ElasticBatchNorm(channels)

    def forward(self, x: Tensor, layer: RepConvLayer) -> Tensor:
        """`(N, layer.out_channels, H, W)`: the channels of both sides, then zeros."""
        channels = layer.identity_channels
        passed = self.norm(x[:, :channels])
        assert isinstance(passed, Tensor)
        missing = layer.out_channels - channels
        return F.pad(passed, (0, 0, 0, 0, 0, missing)) if missing else passed


class ElasticRepConv(nn.Module):
    """Branches cut to a `RepConvLayer`, summed, with the activation."""

    def __init__(self, largest: RepConvLayer) -> None:
        super().__init__()
        dense, point = largest.branches
        self.dense, self.point = ElasticConv(dense), ElasticConv(point)
        channels = largest.identity_channels
        self.identity = ElasticIdentity(channels) if channels else None

    def forward(self, x: Tensor, layer: RepConvLayer) -> Tensor:
        """Apply to `(N, layer.in_channels, in_size, in_size)`."""
        dense, point = layer.branches
        total: Tensor = self.dense(x, dense) + self.point(x, point)
        if self.identity is not None:
            total = total + self.identity(x, layer)
        return activate(total, layer.activation)


class ElasticSqueezeExcite(nn.Module):
    """A gate cut to a `SqueezeExciteLayer`."""

    def __init__(self, largest: SqueezeExciteLayer) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(largest.channels, largest.middle_channels, 1)
        self.expand = nn.Conv2d(largest.middle_channels, largest.channels, 1)

    def forward(self, x: Tensor, layer: SqueezeExciteLayer) -> Tensor:
        """Scale `(N, layer.channels, H, W)`."""
        channels, middle = layer.channels, layer.middle_channels
        gate = x.mean((2, 3), keepdim=True)
        reduce, expand = self.reduce, self.expand
        assert reduce.bias is not None
        assert expand.bias is not None
        gate = F.conv2d(gate, reduce.weight[:middle, :channels], reduce.bias[:middle])
        gate = F.conv2d(
            F.relu(gate), expand.weight[:channels, :middle], expand.bias[:channels]
        )
        return x * F.hardsigmoid(gate)


class Classifier(nn.Linear):
    """Flatten and classify; not elastic."""

    def __init__(self, largest: LinearLayer) -> None:
        super().__init__(largest.in_channels, largest.out_channels)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


def convolve(x: Tensor, weight: Tensor, layer: ConvLayer) -> Tensor:
    """The bare convolution of a layer."""
    if layer.depthwise and layer.kernel > 3 and torch.is_autocast_enabled("cpu"):
        # oneDNN's bf16 depthwise backward is slower than float32's from 5×5 on.
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(
                x.float(),
                weight.float(),
                stride=layer.stride,
                padding=layer.kernel // 2,
                groups=layer.groups,
            )
    return F.conv2d(
        x,
        weight,
        stride=layer.stride,
        padding=layer.kernel // 2,
        groups=layer.groups,
    )


def activate(x: Tensor, activation: LayerActivation) -> Tensor:
    """Apply an activation by name; h-swish is `x * relu6(x + 3) / 6`."""
    if activation == "relu":
        return F.relu(x)
    if activation == "hswish":
        return F.hardswish(x)
    return x
