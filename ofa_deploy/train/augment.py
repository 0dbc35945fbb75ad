"""Random crops, flips and mixtures of a whole batch at once."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ofa_deploy.preprocess import Normalisation


def crop_and_flip(images: Tensor, *, padding: int, rng: np.random.Generator) -> Tensor:
    """Shift by up to `padding` pixels (reflected border) and mirror half of them.

    Args:
        images: `(N, 3, H, W)` uint8.
        padding: Largest shift in pixels, below H and W.
        rng: Source of all choices.

    Returns:
        `(N, 3, H, W)` uint8.
    """
    count, channels, height, width = images.shape
    # Reflection is not implemented for uint8.
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect").to(images.dtype)
    top = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=count))
    left = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=count))
    mirrored = torch.from_numpy(rng.random(count) < 0.5)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def cut_and_mix(
    images: Tensor, targets: Tensor, *, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Paste one box of every image over another image's, and mix their labels so.

    Source: S. Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers
    with Localizable Features", ICCV 2019; one box a batch, its area uniform.

    Args:
        images: `(N, 3, H, W)`.
        targets: Class probabilities `(N, classes)`.
        rng: Source of the box and of the pairs.

    Returns:
        New images and targets of the same shapes.
    """
    count, _, height, width = images.shape
    side = rng.random() ** 0.5
    top, bottom = _span(height, side, rng)
    left, right = _span(width, side, rng)
    partner = torch.from_numpy(rng.permutation(count))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    share = (bottom - top) * (right - left) / (height * width)
    return mixed, (1 - share) * targets + share * targets[partner]


def _span(size: int, side: float, rng: np.random.Generator) -> tuple[int, int]:
    """A stretch of `side * size` around a random place, cut off at the border."""
    centre = int(rng.integers(size))
    half = round(side * size / 2)
    return max(0, centre - half), min(size, centre + half)


def resize_bilinear(x: Tensor, size: int) -> Tensor:
    """`(N, 3, H, W)` to `(N, 3, size, size)`, antialiased as Pillow does it."""
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(
        x, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )


def network_input(
    images: Tensor, *, resolution: int, normalisation: Normalisation
) -> Tensor:
    """`(N, 3, resolution, resolution)` float32, as `preprocess.prepare` makes it.

    The resize is not rounded to whole grey values here, as it is there once per axis;
    the difference is up to one grey value.
    """
    mean = torch.tensor(normalisation.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalisation.std).view(1, 3, 1, 1)
    x = images.float()
    x = resize_bilinear(x, resolution)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)
