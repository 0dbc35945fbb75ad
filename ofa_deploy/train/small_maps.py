"""Convolutions of many channels over maps of a few pixels, as matrix products.

The last layers of VGG-like networks on small images are such: 512 channels over 2×2
pixels. oneDNN takes several times as long for one as for the product of its windows
with its weights (measured by `benchmarks/small_maps.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa_deploy.nn.memory_format import as_matrix
from ofa_deploy.train.convolutions import ConvolutionCall
from ofa_deploy.train.replaced import pair, saves_elsewhere

# Over more pixels oneDNN is as fast, and so it is with fewer weights; larger kernels'
# windows, which stay until the backward pass, are mostly zeros around such a map.
MOST_PIXELS, LEAST_WEIGHTS, MOST_OF_WINDOW = 9, 2**18, 9


def as_product(call: ConvolutionCall) -> Tensor | None:
    """The product, where it is faster; None for other convolutions.

    Only of maps and weights in channels-last memory, with nothing or zeros around the
    map and windows at every pixel; what else there is, is left to torch, as is what the
    backward pass computes again (`torch.utils.checkpoint`).
    """
    if (
        _is_small(call.input, call.weight)
        and call.groups == 1
        and _is_one(call.stride)
        and _is_one(call.dilation)
        and not isinstance(call.padding, str)
        and _covers(call.input, call.weight, pair(call.padding))
        and not saves_elsewhere()
    ):
        return product(call.input, call.weight, call.bias, padding=pair(call.padding))
    return None


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether a map has few pixels, a layer many weights, and both lie as is needed.

    Kernels of one pixel are products already.
    """
    return (
        x.dim() == 4
        and x.is_cpu
        and x.shape[1] == weight.shape[1]
        and x.shape[2] * x.shape[3] <= MOST_PIXELS
        and weight.numel() >= LEAST_WEIGHTS
        and 1 < weight.shape[2] * weight.shape[3] <= MOST_OF_WINDOW
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _covers(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> bool:
    """Whether a window fits on the padded map."""
    return all(
        size + 2 * around >= kernel
        for size, around, kernel in zip(
            x.shape[2:], padding, weight.shape[2:], strict=True
        )
    )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: tuple[int, int]
) -> Tensor:
    """A convolution as the product of its windows with its weights.

    Args:
        x: `(N, I, H, W)`.
        weight: `(O, I, K, L)`.
        bias: `(O,)`, or None.
        padding: Rows of zeros above and below, and columns left and right.

    Returns:
        `(N, O, H', W')`, in channels-last memory.
    """
    (rows, columns), (height, width) = padding, weight.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, columns, columns, rows, rows))
    high = padded.shape[1] - height + 1
    wide = padded.shape[2] - width + 1
    windows = torch.cat(
        [
            padded[:, top : top + high, left : left + wide]
            for top in range(height)
            for left in range(width)
        ],
        dim=3,
    )
    return F.linear(windows, as_matrix(weight), bias).permute(0, 3, 1, 2)


def _is_one(value: Any) -> bool:
    return pair(value) == (1, 1)
