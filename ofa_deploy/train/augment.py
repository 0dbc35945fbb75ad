"""Random crops and flips of a whole batch at once."""

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
