"""How convolutions' weights lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def store_channels_last(network: nn.Module) -> None:
    """Store convolutions' weights as they train fastest on CPUs."""
    # These alone take the format; `nn.Module.to` has no typed overload for it.
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(
                memory_format=torch.channels_last
            )


def store_plainly(network: nn.Module) -> None:
    """Store weights as others expect them, who may look at maps as they are stored."""
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()


def as_matrix(weight: Tensor) -> Tensor:
    """`(O, I, K, L)` as `(O, K·L·I)`; a view where it is stored channels-last."""
    return weight.permute(0, 2, 3, 1).flatten(1)
