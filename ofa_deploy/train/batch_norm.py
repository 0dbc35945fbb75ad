"""Batch norms that are fast to train where a pixel's channels are no whole cache lines.

In channels-last memory torch adds up per thread, in a row of one sum a channel. Rows
that are no whole lines have a line in common, which threads then take from each other
for every pixel (false sharing); and narrow rows leave most of a vector register empty.
Pruned networks have such widths. Here several pixels make a row of whole lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofa_deploy.train.replaced import Replaced, saves_elsewhere

# A cache line of 64 bytes, in float32 sums.
SUMS_PER_LINE = 16
# Fewer take no time; and a column of few values is too far from its channel's mean to
# be corrected in eight bits.
LEAST_ROWS = 16


class LineAlignedBatchNorm(Replaced):
    """While entered, batch norms of such widths are trained by rows of whole lines.

    They compute what torch's do, up to rounding, and can be differentiated once. What
    the backward pass computes again (`torch.utils.checkpoint`) is torch's own.
    """

    def __init__(self) -> None:
        super().__init__({F.batch_norm: _batch_norm})


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """In place of `torch.nn.functional.batch_norm`, whose names these are."""
    statistics = (running_mean, running_var)
    vectors = (*statistics, weight, bias)
    if (
        training
        and eps > 0
        and _is_unaligned(input)
        and _fit(input, vectors)
        and not saves_elsewhere()
    ):
        output: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, *statistics, momentum, eps
        )
        return output
    return F.batch_norm(input, *statistics, weight, bias, training, momentum, eps)


def _fit(x: Tensor, vectors: Sequence[Tensor | None]) -> bool:
    """Whether statistics are both or neither there, and all are single floats.

    What else torch takes or refuses is left to it.
    """
    mean, variance, *_ = vectors
    return (mean is None) == (variance is None) and all(
        one is None or (one.dtype == torch.float32 and one.shape == x.shape[1:2])
        for one in vectors
    )


def _is_unaligned(x: Tensor) -> bool:
    """Whether its pixels are no whole lines, and parts of them all are."""
    if x.dim() != 4 or not x.is_cpu:
        return False
    channels = x.shape[1]
    if channels % SUMS_PER_LINE == 0 or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    rows, rest = divmod(x.numel() // channels, pixels_per_row(channels))
    return (
        rest == 0
        and rows >= LEAST_ROWS
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def pixels_per_row(channels: int) -> int:
    """The fewest pixels whose channels are whole lines together."""
    return SUMS_PER_LINE // math.gcd(channels, SUMS_PER_LINE)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        mean, variance = channel_statistics(x)
        pixels = x.numel() // x.shape[1]
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            # The unbiased estimate, as torch keeps it.
            running_var.lerp_(variance * pixels / (pixels - 1), momentum)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        together = pixels_per_row(x.shape[1])
        # No view of another: layers that follow may write into it.
        output = torch.empty_like(x)
        unused = mean.new_empty(0)
        torch.native_batch_norm(
            _rows(x),
            None if weight is None else weight.repeat(together),
            None if bias is None else bias.repeat(together),
            mean.repeat(together),
            variance.repeat(together),
            False,
            0.0,  # momentum, of statistics that stay
            eps,
            out=(_rows(output), unused, torch.empty_like(unused)),
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        gradients = batch_norm_backward(
            gradient, x, mean=mean, scale=scale, weight=weight
        )
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(one if needed else None for one, needed in wanted), *(None,) * 4)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over batch and pixels.

    Args:
        x: `(N, channels, H, W)`; see `batch_norm_backward`.
    """
    rows = _rows(x)
    # Running statistics: their type is that of what is returned, and they stay.
    unused = rows.new_zeros((2, rows.shape[1]), dtype=torch.float32)
    of_columns = torch.ops.aten.batch_norm_update_stats(rows, *unused, 0.0)
    means, variances = (one.view(-1, x.shape[1]) for one in of_columns)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def batch_norm_backward(
    gradient: Tensor, x: Tensor, *, mean: Tensor, scale: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by a batch norm's input, weight and bias.

    Rows of several pixels, whose channels are whole lines, go through torch's own. That
    corrects each column of a row by its own sums (Ioffe and Szegedy, arXiv 1502.03167,
    section 3); what this is short of a correction by all columns of a channel follows.

    Args:
        gradient: By its output, `(N, channels, H, W)`.
        x: Its input, likewise, in channels-last memory; `N · H · W` is a multiple of
            `pixels_per_row`.
        mean: Of each channel, over the batch.
        scale: `1 / sqrt(variance + eps)` of each channel.
        weight: That its output was multiplied with; None for ones.
    """
    channels = x.shape[1]
    together = pixels_per_row(channels)
    inputs, gradients = _rows(x), _rows(gradient)
    factor = torch.ones_like(scale) if weight is None else weight

    def spread(values: Tensor) -> Tensor:
        return values.repeat(together)

    def beyond_mean(of_columns: Tensor) -> Tensor:
        columns = of_columns.view(together, channels) / len(inputs)
        return (columns - columns.mean(0)).flatten()

    of_rows, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        gradients,
        inputs,
        spread(factor),
        None,
        None,
        spread(mean),
        spread(scale),
        True,
        0.0,  # eps, which is in the scale
        [True, True, True],
    )
    slope = spread(factor * scale * scale) * beyond_mean(of_weight)
    offset = spread(factor * scale) * beyond_mean(of_bias) - slope * spread(mean)
    of_rows += torch.addcmul(offset.to(x.dtype), inputs, slope.to(x.dtype))
    count, _, height, width = x.shape
    return (
        of_rows.view(count, height, width, channels).permute(0, 3, 1, 2),
        of_weight.view(together, channels).sum(0),
        of_bias.view(together, channels).sum(0),
    )


def _rows(values: Tensor) -> Tensor:
    """Of several pixels each, `(N · H · W / pixels, pixels · channels)`."""
    channels = values.shape[1]
    ordered = values.contiguous(memory_format=torch.channels_last)
    return ordered.permute(0, 2, 3, 1).reshape(-1, pixels_per_row(channels) * channels)
