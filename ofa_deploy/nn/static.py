"""A plan as plain torch modules: no elasticity, ordinary layers, own weights.

`StaticNet` is the form to train, with batch norms and branches: the oracle of the
equality tests, and what is pruned or fine-tuned. `FusedNet` is the form that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.fuse import BATCH_NORM_EPS
from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
    SqueezeExciteLayer,
)
from ofa_deploy.nn.elastic import BATCH_NORM_MOMENTUM
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
            _batch_norm(layer.out_channels) if layer.batch_norm else nn.Identity()
        )
        self.activation = _ACTIVATIONS[layer.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three in order."""
        return cast(Tensor, self.activation(self.norm(self.conv(x))))


class StaticIdentity(nn.Module):
    """Batch norm of the channels that a layer's two sides share; zeros for the rest."""

    def __init__(self, layer: RepConvLayer) -> None:
        super().__init__()
        self.channels = layer.identity_channels
        self.missing = layer.out_channels - self.channels
        self.norm = _batch_norm(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, in_channels, H, W)`."""
        if x.shape[1] > self.channels:
            x = x[:, : self.channels]
        passed = self.norm(x)
        assert isinstance(passed, Tensor)
        if not self.missing:
            return passed
        return nn.functional.pad(passed, (0, 0, 0, 0, 0, self.missing))


class StaticRepConv(nn.Module):
    """Branches, their sum, activation."""

    def __init__(self, layer: RepConvLayer) -> None:
        super().__init__()
        dense, point = layer.branches
        self.dense, self.point = StaticConv(dense), StaticConv(point)
        self.identity = StaticIdentity(layer) if layer.identity_channels else None
        self.activation = _ACTIVATIONS[layer.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, in_channels, H, W)`."""
        total = self.dense(x) + self.point(x)
        if self.identity is not None:
            total = total + self.identity(x)
        return cast(Tensor, self.activation(total))


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
        return x * cast(Tensor, self.gate(self.expand(self.relu(self.reduce(mean)))))


class FusedConv(nn.Sequential):
    """Convolution with the bias that its batch norm left, if it had one; activation."""

    def __init__(self, layer: ConvLayer) -> None:
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel,
            layer.stride,
            layer.kernel // 2,
            groups=layer.groups,
            bias=layer.batch_norm,
        )
        super().__init__(conv, _ACTIVATIONS[layer.activation]())


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class StaticBlock(nn.Module):
    """Layers in sequence, with the shortcut where the plan has one."""

    def __init__(
        self, block: BlockPlan, *, build: Callable[[Layer], nn.Module]
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(build(layer) for layer in block.layers))
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `(N, in_channels, in_size, in_size)`."""
        result = cast(Tensor, self.layers(x))
        return result + x if self.residual else result


class PlannedNet(nn.Module):
    """The network of a plan, in one of its forms.

    Args:
        plan: Its layers.
        build: A layer to its module.
    """

    def __init__(
        self, plan: NetworkPlan, *, build: Callable[[Layer], nn.Module]
    ) -> None:
        super().__init__()
        self.plan = plan
        self.blocks = nn.Sequential(
            *(StaticBlock(block, build=build) for block in plan.blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, class_count)` of images `(N, 3, resolution, resolution)`."""
        return cast(Tensor, self.blocks(x))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and running statistics by the names that a plan's weights have."""
        found: dict[str, Tensor] = {}
        for block, module in zip(self.plan.blocks, self.blocks, strict=True):
            assert isinstance(module, StaticBlock)
            for layer, built in zip(block.layers, module.layers, strict=True):
                for name, tensor in _tensors(layer, built).items():
                    found[f"{layer.name}.{name}"] = tensor
        return found

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Copies of all tensors, as `tensors` names them."""
        return {
            name: tensor.detach().float().cpu().contiguous().numpy().copy()
            for name, tensor in self.tensors().items()
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy weights, as `tensors` names them.

        Raises:
            KeyError: One is missing.
        """
        for name, tensor in self.tensors().items():
            tensor.copy_(torch.from_numpy(weights[name]))


class StaticNet(PlannedNet):
    """The form to train: batch norms, and all branches.

    Args:
        plan: Its layers.
        weights: Unfused, as `materialise` gives them, to be copied; None for new ones.
    """

    def __init__(
        self,
        plan: NetworkPlan,
        weights: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        super().__init__(plan, build=_build)
        if weights is not None:
            self.load(weights)


class FusedNet(PlannedNet):
    """The form that runs: convolutions with bias, branches merged.

    Args:
        plan: Its layers.
        weights: Fused, as `fuse` gives them, to be copied.
    """

    def __init__(
        self, plan: NetworkPlan, weights: Mapping[str, NDArray[np.float32]]
    ) -> None:
        super().__init__(plan, build=_build_fused)
        self.load(weights)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)


def _build_fused(layer: Layer) -> nn.Module:
    if isinstance(layer, RepConvLayer):
        return FusedConv(layer.merged)
    return FusedConv(layer) if isinstance(layer, ConvLayer) else _build(layer)


def _build(layer: Layer) -> nn.Module:
    if isinstance(layer, RepConvLayer):
        return StaticRepConv(layer)
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
    if isinstance(module, StaticRepConv):
        found = {
            f"{part}.{name}": tensor
            for part, conv in (("dense", module.dense), ("point", module.point))
            for name, tensor in _conv_tensors(conv).items()
        }
        if module.identity is not None:
            norm = _norm_tensors(module.identity.norm)
            found |= {f"identity.{name}": tensor for name, tensor in norm.items()}
        return found
    if isinstance(module, StaticConv):
        return _conv_tensors(module)
    if isinstance(module, FusedConv):
        return {k.removeprefix("0."): v for k, v in module.named_parameters()}
    if isinstance(layer, LinearLayer):
        linear = module.get_submodule("1")
        return dict(linear.named_parameters())
    return dict(module.named_parameters())


def _conv_tensors(module: StaticConv) -> dict[str, Tensor]:
    return {"weight": module.conv.weight, **_norm_tensors(module.norm)}


def _norm_tensors(norm: nn.Module) -> dict[str, Tensor]:
    if not isinstance(norm, nn.BatchNorm2d):
        return {}
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return {
        "norm.gamma": norm.weight,
        "norm.beta": norm.bias,
        "norm.mean": norm.running_mean,
        "norm.variance": norm.running_var,
    }
