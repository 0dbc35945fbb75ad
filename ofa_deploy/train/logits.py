"""How networks are called while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofa_deploy.train.batch_norm import LineAlignedBatchNorm
from ofa_deploy.train.small_maps import SmallMapConvolutions
from ofa_deploy.train.views import ViewsInAnyOrder


def logits_of(network: nn.Module, inputs: Tensor, *, bf16: bool) -> Tensor:
    """What a network makes of a batch, with all that is to make it fast here.

    Args:
        network: In whichever mode it is to be called.
        inputs: `(N, 3, resolution, resolution)`.
        bf16: Use bfloat16 autocast; worth it where the CPU has it.

    Returns:
        `(N, classes)`, in float32.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with LineAlignedBatchNorm(), SmallMapConvolutions(), ViewsInAnyOrder(), autocast:
        logits = network(inputs)
    assert isinstance(logits, Tensor)
    return logits.float()
