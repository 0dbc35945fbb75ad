"""Binary channel masks whose latent weights are trained through their threshold.

Source: Y. Li et al., "Pruning-as-Search: Efficient Neural Architecture Search via
Channel Pruning and Structural Reparameterization", IJCAI 2022: a depthwise 1×1 layer of
binary weights behind a non-linearity, with a straight-through estimator.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ofa_deploy.shrink.groups import ChannelGraph

# Strictly above it a channel is kept.
THRESHOLD = 0.5
INITIAL_LATENT = 1.0


class _StraightThrough(torch.autograd.Function):
    """1 where the latent weight is above the threshold; its gradient is the identity.

    Written out, because `latent - (latent - binary).detach()` is 1 only up to rounding.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        """The binary weights."""
        return (latent > THRESHOLD).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient as it is, of kept and of removed channels alike."""
        return gradients[0]


class BinaryMask(nn.Module):
    """Keeps or zeroes whole channels.

    Args:
        channels: Of its input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Flat, as batch norms' parameters are: optimisers leave such without decay.
        self.latent = nn.Parameter(torch.full((channels,), INITIAL_LATENT))

    @property
    def binary(self) -> Tensor:
        """1 for kept channels, 0 for others, `(channels,)`; differentiable."""
        result = _StraightThrough.apply(self.latent)  # type: ignore[no-untyped-call]
        assert isinstance(result, Tensor)
        return result

    @property
    def count(self) -> Tensor:
        """Channels kept; its gradient is 1 at every latent weight."""
        return self.binary.sum()

    def kept(self) -> Tensor:
        """Indices of kept channels, ascending."""
        return (self.latent.detach() > THRESHOLD).nonzero().flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `(N, channels, ...)`."""
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return x * self.binary.to(x.dtype).view(shape)

    @torch.no_grad()
    def keep_only(self, indices: Tensor) -> None:
        """Keep these channels and no others."""
        self.latent.fill_(0.0)
        self.latent[indices] = INITIAL_LATENT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedNetwork:
    """A traced network with a mask behind each group of channels.

    Args:
        module: Computes what the network computes, less the masked channels.
        graph: What it was made from; the parameters are shared.
        masks: Of the groups, in their order.
    """

    module: fx.GraphModule
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
        return [f"{_mask_name(index)}.latent" for index in range(len(self.masks))]

    def kept(self) -> tuple[Tensor, ...]:
        """Indices of the kept channels of each group, ascending."""
        return tuple(mask.kept() for mask in self.masks)


def insert_masks(graph: ChannelGraph) -> MaskedNetwork:
    """Put a mask behind the last operation of each group before it is read."""
    module = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    nodes = {node.name: node for node in module.graph.nodes}
    masks = []
    for index, group in enumerate(graph.groups):
        mask = BinaryMask(group.channels)
        module.add_submodule(_mask_name(index), mask)
        masks.append(mask)
        for name in group.masked:
            with module.graph.inserting_after(nodes[name]):
                masked = module.graph.call_module(_mask_name(index), (nodes[name],))
            nodes[name].replace_all_uses_with(
                masked, delete_user_cb=lambda user, masked=masked: user is not masked
            )
    module.recompile()
    return MaskedNetwork(module=module, graph=graph, masks=tuple(masks))


def _mask_name(index: int) -> str:
    return f"mask_{index}"
