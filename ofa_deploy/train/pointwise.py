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

from ofa_deploy.train.replaced import Replaced, pair, saves_elsewhere

# Channels that fill the widest vector register in float32; with so many all is well.
ENOUGH_CHANNELS = 16


class PointwiseOfFewerPixels(Replaced):
    """While entered, such convolutions are given the pixels that they read, alone.

    What they compute is the same. What the backward pass computes again
    (`torch.utils.checkpoint`) is left to torch; a warning tells of the danger.
    """

    def __init__(self) -> None:
        super().__init__({F.conv2d: _conv2d})


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """In place of `torch.nn.functional.conv2d`, whose names these are."""
    is_in_danger = _skips_pixels(weight, pair(stride)) and _pads_nothing(padding)
    if is_in_danger and not saves_elsewhere():
        # As slices do, but their gradients lose how maps are stored.
        input, stride, padding = F.avg_pool2d(input, 1, pair(stride)), 1, 0
    elif is_in_danger and torch.is_grad_enabled():
        warnings.warn(
            f"torch.utils.checkpoint calls a 1×1 convolution of {weight.shape[1]} "
            "channels that skips pixels; by an error of oneDNN the gradient of its "
            "weights may be wrong, and the process may crash or hang. Call it outside "
            "of the checkpoint",
            stacklevel=2,
        )
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


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
