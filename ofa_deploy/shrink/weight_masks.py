"""Masks of single weights, and where their auxiliary parameters begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ofa_deploy.shrink.masks import (
    INITIAL_LATENT,
    THRESHOLD,
    Estimator,
    estimated_slope,
)


class _IndicatedWeight(torch.autograd.Function):
    """Weights times the step of their auxiliary parameters, by the sign rule."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, latent: Tensor, estimator: Estimator
    ) -> Tensor:
        """The weights that are kept, and zeros."""
        ctx.save_for_backward(weight, latent)
        ctx.estimator = estimator
        return weight * (latent > THRESHOLD)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of kept weights as usual; of parameters by the weights' signs."""
        weight, latent = ctx.saved_tensors
        (gradient,) = gradients
        # A weight of exactly zero has a sign, too: else it would never move.
        signed = torch.where(weight < 0, -gradient, gradient)
        slope = estimated_slope(latent - THRESHOLD, ctx.estimator)
        return gradient * (latent > THRESHOLD), signed * slope, None


def indicated(weight: Tensor, latent: Tensor, *, estimator: Estimator) -> Tensor:
    """`weight * (latent > threshold)`, with AutoPrune's gradients."""
    result = _IndicatedWeight.apply(  # type: ignore[no-untyped-call]
        weight, latent, estimator
    )
    assert isinstance(result, Tensor)
    return result


class WeightMask(nn.Module):
    """A parametrization: which weights of a layer are kept.

    Args:
        heights: Of the weights' parameters above the threshold, positive.
        estimator: Of the gradient.
    """

    def __init__(self, heights: Tensor, *, estimator: Estimator) -> None:
        super().__init__()
        self.latent = nn.Parameter(THRESHOLD + heights)
        self._estimator: Estimator = estimator

    def forward(self, weight: Tensor) -> Tensor:
        """The weights that are kept, and zeros."""
        return indicated(weight, self.latent, estimator=self._estimator)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Weights of convolutions and linear layers, by the layers' names."""
    return {
        name: layer.weight.detach()
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def initial_heights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where auxiliary parameters begin, above the threshold: in LAMP's order.

    Layers of few weights keep more of them, as it is the weights that a layer would
    have left which a weight is held against. The parameters lie as magnitudes of one
    normal distribution do, whatever the layers' are; weights of zero have the least.

    Source: J. Lee, S. Park, S. Mo, S. Ahn, J. Shin, "Layer-adaptive Sparsity for the
    Magnitude-based Pruning", ICLR 2021, equation 2.

    Args:
        weights: Of layers, by their names.

    Returns:
        As the weights, all positive.
    """
    scores = torch.cat([_lamp(weight.flatten()) for weight in weights.values()])
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(stable=True)] = torch.arange(
        len(scores), dtype=scores.dtype, device=scores.device
    )
    magnitudes = 2**0.5 * torch.erfinv((ranks + 0.5) / len(ranks))
    heights = (INITIAL_LATENT - THRESHOLD) * magnitudes
    # As parameters lie above the threshold, in the weights' precision.
    parts = torch.split(heights, [weight.numel() for weight in weights.values()])
    return {
        name: part.to(weight.dtype)
        .clamp(min=torch.finfo(weight.dtype).eps)
        .reshape(weight.shape)
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


def _lamp(weights: Tensor) -> Tensor:
    """Squares over the sums of all that are no smaller, of one layer; float64."""
    squares, order = weights.double().square().sort(descending=True)
    scores = torch.empty_like(squares)
    least = torch.finfo(squares.dtype).tiny
    scores[order] = squares / squares.cumsum(0).clamp(min=least)
    return scores
