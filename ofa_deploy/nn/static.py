"""A plan as a plain torch module: no elasticity, ordinary layers, own weights.

The oracle of the equality tests, and the form in which one found network is fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LinearLayer,
    PoolLayer,
    SqueezeExciteLayer,
)
from ofa_deploy.nn.elastic import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM
from ofa_deploy.plan import NetworkPlan

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "hswish": nn.Hardswish,
}


class StaticConv(nn.Module):
    """Convolution, batch norm where the layer has one, activation."""

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel,
            layer.stride,
            layer.kernel // 2,
            groups=layer.groups,
            bias=False,
        )
        self.norm = (
            nn.BatchNorm2d(
                layer.out_channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM
            )
            if layer.batch_norm
            else nn.Identity()
        )
        self.activation = _ACTIVATIONS[layer.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three in order."""
        result = self.activation(self.norm(self.conv(x)))
        assert isinstance(result, Tensor)
        return result


class StaticSqueezeExcite(nn.Module):
    """Gate by channel means."""

    def __init__(self, layer: SqueezeExciteLayer) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(layer.channels, layer.middle_channels, 1)
        self.expand = nn.Conv2d(layer.middle_channels, layer.channels, 1)
        self.relu = nn.ReLU()
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Scale `(N, channels, H, W)`."""
        mean = x.mean((2, 3), keepdim=True)
        gate = self.gate(self.expand(self.relu(self.reduce(mean))))
        assert isinstance(gate, Tensor)
        return x * gate


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class StaticBlock(nn.Module):
    """Layers in sequence, with the shortcut where the plan has one."""

    def __init__(self, block: BlockPlan) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_build(layer) for layer in block.layers))
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `(N, in_channels, in_size, in_size)`."""
        result = self.layers(x)
        assert isinstance(result, Tensor)
        return result + x if self.residual else result


class StaticNet(nn.Module):
    """The network of a plan.

    Args:
        plan: Its layers.
        weights: Unfused weights as `materialise` gives them, to be copied.
    """

    def __init__(
        self, plan: NetworkPlan, weights: Mapping[str, NDArray[np.float32]]
    ) -> None:
        super().__init__()
        self.plan = plan
        self.blocks = nn.Sequential(*(StaticBlock(block) for block in plan.blocks))
        self._load(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, class_count)` of images `(N, 3, resolution, resolution)`."""
        result = self.blocks(x)
        assert isinstance(result, Tensor)
        return result

    @torch.no_grad()
    def _load(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        for block, module in zip(self.plan.blocks, self.blocks, strict=True):
            assert isinstance(module, StaticBlock)
            for layer, built in zip(block.layers, module.layers, strict=True):
                for name, tensor in _tensors(layer, built).items():
                    tensor.copy_(torch.from_numpy(weights[f"{layer.name}.{name}"]))


def _build(layer: Layer) -> nn.Module:
    if isinstance(layer, ConvLayer):
        return StaticConv(layer)
    if isinstance(layer, SqueezeExciteLayer):
        return StaticSqueezeExcite(layer)
    if isinstance(layer, PoolLayer):
        return _Pool()
    return nn.Sequential(
        nn.Flatten(1), nn.Linear(layer.in_channels, layer.out_channels)
    )


def _tensors(layer: Layer, module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors under the names that the plan's weights have."""
    if isinstance(module, StaticConv):
        tensors: dict[str, Tensor] = {"weight": module.conv.weight}
        norm = module.norm
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            tensors |= {
                "norm.gamma": norm.weight,
                "norm.beta": norm.bias,
                "norm.mean": norm.running_mean,
                "norm.variance": norm.running_var,
            }
        return tensors
    if isinstance(layer, LinearLayer):
        linear = module.get_submodule("1")
        return dict(linear.named_parameters())
    return dict(module.named_parameters())
