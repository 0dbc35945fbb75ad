"""How networks are called while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ofa_deploy.train.batch_norm import LineAlignedBatchNorm
from ofa_deploy.train.convolutions import ConvolutionsBy
from ofa_deploy.train.pointwise import of_read_pixels
from ofa_deploy.train.small_maps import as_product
from ofa_deploy.train.views import ViewsInAnyOrder


@contextmanager
def called_as_in_training(*, bf16: bool) -> Iterator[None]:
    """Call networks in here with all that is to make their training fast, and safe.

    Args:
        bf16: Use bfloat16 autocast; worth it where the CPU has it.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with (
        LineAlignedBatchNorm(),
        ConvolutionsBy(as_product, of_read_pixels),
        ViewsInAnyOrder(),
        autocast,
    ):
        yield


def logits_of(network: nn.Module, inputs: Tensor, *more: object, bf16: bool) -> Tensor:
    """What a network makes of a batch while it is trained.

    Args:
        network: In whichever mode it is to be called.
        inputs: `(N, 3, resolution, resolution)`.
        more: What else the network takes.
        bf16: See `called_as_in_training`.

    Returns:
        `(N, classes)`, in float32.
    """
    with called_as_in_training(bf16=bf16):
        logits = network(inputs, *more)
    assert isinstance(logits, Tensor)
    return logits.float()
