"""Binary channel masks whose latent weights are trained through their threshold.

Source: Y. Li et al., "Pruning-as-Search: Efficient Neural Architecture Search via
Channel Pruning and Structural Reparameterization", IJCAI 2022: a depthwise 1×1 layer of
binary weights behind a non-linearity, with a straight-through estimator. Here it stands
where the channels are read, which is the same and needs no knowledge of what is
between: removing what nobody reads changes nothing, whatever becomes of it before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ofa_deploy.nn.projection import put_module
from ofa_deploy.nn.stand_in import StandIn
from ofa_deploy.shrink.groups import ChannelGraph, Cut

# Strictly above it a channel is kept.
THRESHOLD = 0.5
INITIAL_LATENT = 1.0


# What stands for the derivative of the step, of the height above the threshold.
Estimator = Literal["identity", "leaky_relu", "softplus", "relu"]
LEAK = 0.01
# What the gradient of a mask is made of: the channel's values, or their signs alone.
Rule = Literal["product", "sign"]


def estimated_slope(height: Tensor, estimator: Estimator) -> Tensor:
    """What stands for the derivative of the step function.

    Args:
        height: Above the threshold.
        estimator: `identity`: 1; `leaky_relu`: 1 above and a little below, so that what
            was removed may come back; `softplus`: the sigmoid; `relu`: 1 above and
            nothing below, so that what was removed is gone for good.
    """
    if estimator == "relu":
        return (height > 0).to(height.dtype)
    if estimator == "leaky_relu":
        return torch.where(height > 0, 1.0, LEAK).to(height.dtype)
    if estimator == "softplus":
        return torch.sigmoid(height)
    return torch.ones_like(height)


class _Step(torch.autograd.Function):
    """1 where the latent weight is above the threshold; an estimator for its gradient.

    Written out, because `latent - (latent - binary).detach()` is 1 only up to rounding.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, estimator: Estimator) -> Tensor:
        """The binary weights."""
        ctx.save_for_backward(latent)
        ctx.estimator = estimator
        return (latent > THRESHOLD).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient times the estimated slope."""
        (latent,) = ctx.saved_tensors
        return gradients[0] * estimated_slope(latent - THRESHOLD, ctx.estimator), None


class _SignRule(torch.autograd.Function):
    """The product of values and masks, whose gradient knows of values only the signs.

    Source: X. Xiao, Z. Wang, S. Rajasekaran, "AutoPrune: Automatic Network Pruning by
    Regularizing Auxiliary Parameters", NeurIPS 2019: large values make masks restless,
    and small ones make them sluggish, where the gradient is the product's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        """The product; `kept` is broadcast."""
        ctx.save_for_backward(x, kept)
        return x * kept

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of the values as usual; of the masks by the values' signs."""
        x, kept = ctx.saved_tensors
        (gradient,) = gradients
        # Of 0 none: a channel that a ReLU has silenced is worth nothing to the task.
        by_sign = (gradient * torch.sign(x)).sum_to_size(kept.shape)
        return gradient * kept, by_sign


def sign_product(x: Tensor, kept: Tensor) -> Tensor:
    """`x * kept`, whose gradient for `kept` is of the signs of `x` alone."""
    result = _SignRule.apply(x, kept)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class BinaryMask(nn.Module):
    """Which channels of a group are kept.

    Args:
        channels: Of the group.
        estimator: Of its gradient.
    """

    def __init__(self, channels: int, *, estimator: Estimator = "identity") -> None:
        super().__init__()
        self.estimator: Estimator = estimator
        # Flat, as batch norms' parameters are: optimisers leave such without decay.
        self.latent = nn.Parameter(torch.full((channels,), INITIAL_LATENT))

    @property
    def binary(self) -> Tensor:
        """1 for kept channels, 0 for others, `(channels,)`; differentiable."""
        result = _Step.apply(  # type: ignore[no-untyped-call]
            self.latent, self.estimator
        )
        assert isinstance(result, Tensor)
        return result

    @property
    def count(self) -> Tensor:
        """Channels kept; its gradient is the estimator's slope."""
        return self.binary.sum()

    def kept(self) -> Tensor:
        """Indices of kept channels, ascending."""
        return (self.latent.detach() > THRESHOLD).nonzero().flatten()

    @torch.no_grad()
    def keep_only(self, indices: Tensor) -> None:
        """Keep these channels and no others."""
        self.latent.fill_(0.0)
        self.latent[indices] = INITIAL_LATENT


class MaskedInput(StandIn):
    """A layer that reads zeros in place of the channels that are not kept.

    Args:
        layer: The layer.
        width: Channels that it reads, or features.
        cuts: Which of them are whose.
        masks: Of the groups of these cuts; they belong to the network.
        rule: Of the masks' gradient.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        width: int,
        cuts: Sequence[Cut],
        masks: Sequence[BinaryMask],
        rule: Rule = "product",
    ) -> None:
        super().__init__(layer)
        self._rule: Rule = rule
        self._masks = tuple(masks)
        index, begin = np.zeros(width, dtype=np.int64), 1
        for cut, mask in zip(cuts, masks, strict=True):
            index[cut.positions] = begin + cut.channels
            begin += len(mask.latent)
        # Of each channel, its place in the masks one after the other; 0 always stays.
        self.register_buffer("index", torch.from_numpy(index), persistent=False)
        # Features are last, channels second.
        self._is_linear = isinstance(layer, nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        """Apply to `(N, width, ...)`, or of a linear layer `(..., width)`."""
        always = torch.ones(1, dtype=self._masks[0].latent.dtype)
        every = torch.cat([always, *(mask.binary for mask in self._masks)])
        assert isinstance(self.index, Tensor)
        kept = every[self.index].to(input.dtype)
        if not self._is_linear:
            kept = kept.view(1, -1, *(1,) * (input.ndim - 2))
        masked = sign_product(input, kept) if self._rule == "sign" else input * kept
        result = self.layer(masked)
        assert isinstance(result, Tensor)
        return result


class MaskedModule(nn.Module):
    """A network whose layers read through masks.

    Args:
        network: With `MaskedInput` where channels can go.
        masks: Of the groups, in their order.
    """

    def __init__(self, network: nn.Module, masks: Sequence[BinaryMask]) -> None:
        super().__init__()
        self.network = network
        self.masks = nn.ModuleList(masks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, 3, H, W)`."""
        result = self.network(x)
        assert isinstance(result, Tensor)
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedNetwork:
    """A network with a mask for each group of channels.

    Args:
        module: Computes what the network computes, less the masked channels; has its
            parameters and running statistics.
        graph: The groups.
        masks: Of these, in their order.
    """

    module: MaskedModule
    graph: ChannelGraph
    masks: tuple[BinaryMask, ...]

    @property
    def counts(self) -> Tensor:
        """Channels kept of each group, `(groups,)`; differentiable."""
        return torch.stack([mask.count for mask in self.masks])

    def latents(self) -> list[Tensor]:
        """Copies of the latent weights of each group, `(channels,)`."""
        return [mask.latent.detach().clone() for mask in self.masks]

    def latent_names(self) -> list[str]:
        """Names of the masks' parameters in the module."""
        return [f"masks.{index}.latent" for index in range(len(self.masks))]

    def kept(self) -> tuple[Tensor, ...]:
        """Indices of the kept channels of each group, ascending."""
        return tuple(mask.kept() for mask in self.masks)


def insert_masks(
    network: nn.Module,
    graph: ChannelGraph,
    *,
    estimator: Estimator = "identity",
    rule: Rule = "product",
) -> MaskedNetwork:
    """Put masks before the layers that read what can go; weights are shared.

    Args:
        network: Stays as it is.
        graph: Of its channels.
        estimator: Of the masks' gradients.
        rule: Likewise.
    """
    shared = _with_same_tensors(network)
    masks = [BinaryMask(group.channels, estimator=estimator) for group in graph.groups]
    width = {layer.name: layer.in_channels for layer in graph.layers}
    for name, cuts in graph.readers().items():
        masked = MaskedInput(
            shared.get_submodule(name),
            width=width[name],
            cuts=cuts,
            masks=[masks[cut.group] for cut in cuts],
            rule=rule,
        )
        put_module(shared, name, masked)
    module = MaskedModule(shared, masks)
    module.train(network.training)
    return MaskedNetwork(module=module, graph=graph, masks=tuple(masks))


def _with_same_tensors(network: nn.Module) -> nn.Module:
    """A copy with modules of its own, and the same parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, memo={id(tensor): tensor for tensor in tensors})
