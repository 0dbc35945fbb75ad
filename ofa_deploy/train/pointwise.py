"""1×1 convolutions that skip pixels, computed from the pixels that they read alone.

oneDNN's gradient of such a layer's weights writes past the memory that it has, where
maps are stored channels-last and a pixel has fewer channels than a vector register: the
gradient may be wrong, and the process may crash or hang (uxlfoundation/oneDNN, issue
6035; seen with oneDNN 3.12 in torch 2.13). Shortcuts of narrowed networks are such
layers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa_deploy.train.convolutions import ConvolutionCall
from ofa_deploy.train.replaced import pair, saves_elsewhere

# Channels that fill the widest vector register in float32; with so many all is well.
ENOUGH_CHANNELS = 16


def of_read_pixels(call: ConvolutionCall) -> Tensor | None:
    """The same of the pixels that are read, alone; None for other convolutions.

    What the backward pass computes again (`torch.utils.checkpoint`) is left to torch; a
    warning tells of the danger. Reentrant checkpoints are not seen: they save nothing
    that would tell, and no mode is entered where they call again.
    """
    stride = pair(call.stride)
    if not (_skips_pixels(call.weight, stride) and _pads_nothing(call.padding)):
        return None
    if not saves_elsewhere():
        # As slices do, but their gradients lose how maps are stored.
        read = F.avg_pool2d(call.input, 1, stride)
        return F.conv2d(*call._replace(input=read, stride=1, padding=0))
    if torch.is_grad_enabled():
        warnings.warn(
            "torch.utils.checkpoint calls a 1×1 convolution of "
            f"{call.weight.shape[1]} channels that skips pixels; by an error of oneDNN "
            "the gradient of its weights may be wrong, and the process may crash or "
            "hang. Call it outside of the checkpoint",
            stacklevel=2,
        )
    return None


def _skips_pixels(weight: Tensor, stride: tuple[int, int]) -> bool:
    """Whether it is 1×1 with fewer channels than are safe, and leaves pixels out."""
    return (
        max(stride) > 1
        and min(stride) > 0
        and weight.shape[1] < ENOUGH_CHANNELS
        and tuple(weight.shape[2:]) == (1, 1)
    )


def _pads_nothing(padding: Any) -> bool:
    if isinstance(padding, str):
        return padding == "valid"
    return pair(padding) == (0, 0)
