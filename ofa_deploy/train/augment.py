"""Random crops, flips, distortions and mixtures of a whole batch at once."""

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


def distort(images: Tensor, *, strength: float, rng: np.random.Generator) -> Tensor:
    """Turn, stretch, shear and recolour each image by amounts of its own.

    For trainings long enough to know every image by heart. Half of the images keep
    their shape: what is resampled is blurred, too. After E. Cubuk et al.,
    "RandAugment", NeurIPS 2020: random strengths below a given one, nothing learned;
    here all at once, since one resampling costs less than several.

    Args:
        images: `(N, 3, H, W)`, grey values 0..255.
        strength: 0..1; at 1 up to 30 degrees, a third of the size, and twice or half
            the brightness, contrast and saturation.
        rng: Source of all choices.

    Returns:
        `(N, 3, H, W)` float32, grey values 0..255.
    """
    x = images.to(torch.float32, copy=True)
    turned = torch.from_numpy(np.flatnonzero(rng.random(len(x)) < 0.5))
    if len(turned):
        matrices = _affine_matrices(len(turned), strength, rng)
        part = x[turned]
        grid = F.affine_grid(matrices, list(part.shape), align_corners=False)
        x[turned] = F.grid_sample(
            part, grid, padding_mode="reflection", align_corners=False
        )
    return _recoloured(x, strength, rng)


def _affine_matrices(count: int, strength: float, rng: np.random.Generator) -> Tensor:
    """Turns, stretches and shears `(count, 2, 3)`."""
    angle = np.pi / 6 * strength * rng.uniform(-1, 1, count)
    stretch = np.exp(strength / 3 * rng.uniform(-1, 1, (2, count)))
    shear = strength / 3 * rng.uniform(-1, 1, count)
    sine, cosine, zero = np.sin(angle), np.cos(angle), np.zeros(count)
    rows = [
        [cosine * stretch[0], (cosine * shear - sine) * stretch[1], zero],
        [sine * stretch[0], (sine * shear + cosine) * stretch[1], zero],
    ]
    return torch.from_numpy(np.array(rows).transpose(2, 0, 1).astype(np.float32))


def _recoloured(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Images of other brightness, contrast and saturation, as far as 0..255 goes."""
    factors = 2.0 ** (strength * rng.uniform(-1, 1, (3, len(x), 1, 1, 1)))
    brightness, contrast, saturation = torch.from_numpy(factors.astype(np.float32))
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * saturation
    mean = grey.mean((2, 3), keepdim=True)
    recoloured: Tensor = (mean + (x - mean) * contrast) * brightness
    return recoloured.clamp(0, 255)


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
