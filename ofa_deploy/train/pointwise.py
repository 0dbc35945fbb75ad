"""1×1 convolutions that skip pixels, computed from the pixels that they read alone.

oneDNN's gradient of such a layer's weights writes past the memory that it has, where
maps are stored channels-last and a pixel has fewer channels than a vector register: the
gradient may be wrong, and the process may crash or hang (uxlfoundation/oneDNN, issue
6035; seen with oneDNN 3.12 in torch 2.13). Shortcuts of narrowed networks are such
layers.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ofa_deploy.train.replaced import Replaced, pair, saves_elsewhere

# Channels that fill the widest vector register in float32; with so many all is well.
ENOUGH_CHANNELS = 16


class PointwiseOfFewerPixels(Replaced):
    """While entered, such convolutions are given the pixels that they read, alone.

    What they compute is the same. What the backward pass computes again
    (`torch.utils.checkpoint`) is left to torch, with the danger that is in it.
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
    rows, columns = pair(stride)
    if (
        max(rows, columns) > 1
        and min(rows, columns) > 0
        and weight.shape[1] < ENOUGH_CHANNELS
        and tuple(weight.shape[2:]) == (1, 1)
        and _pads_nothing(padding)
        and not saves_elsewhere()
    ):
        # As slices do, but their gradients lose how maps are stored.
        read = F.avg_pool2d(input, 1, (rows, columns))
        return F.conv2d(read, weight, bias, 1, 0, dilation, groups)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pads_nothing(padding: Any) -> bool:
    if isinstance(padding, str):
        return padding == "valid"
    return pair(padding) == (0, 0)
