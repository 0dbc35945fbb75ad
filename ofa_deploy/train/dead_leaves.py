"""Random images with the statistics of natural ones, made of nothing but shapes.

Opaque leaves of all sizes fall on top of each other. As in photographs, what results
has edges, flat regions and power that falls with the square of the frequency, where
noise has none of these. After A. Lee, D. Mumford and J. Huang, "Occlusion Models for
Natural Images" (IJCV 2001); that networks learn from such images was shown by
M. Baradad et al., "Learning to See by Looking at Noise" (NeurIPS 2021).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# Enough to cover the canvas. Count, sizes and colours were chosen by eye and by the
# power spectrum of CIFAR-10's training images.
LEAVES_PER_IMAGE = 200
# Radii, in image sides. Between them the density falls with the third power, with
# which a picture looks the same at every scale.
_SMALLEST_RADIUS = 0.06
_LARGEST_RADIUS = 0.7
_HUE_SPREAD = 0.12  # of each colour channel around the grey value, in ranges
_MIN_ASPECT = 0.4
_OVERSAMPLING = 4
_ELLIPSE_CORNERS = 24


def dead_leaves(count: int, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images `(count, size, size, 3)`."""
    return np.stack([_image(size, rng) for _ in range(count)])


def _image(size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    side = size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), _colour(rng))
    draw = ImageDraw.Draw(canvas)
    for _ in range(LEAVES_PER_IMAGE):
        leaf = _outline(rng) * side
        draw.polygon([(x, y) for x, y in leaf.tolist()], fill=_colour(rng))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _outline(rng: np.random.Generator) -> NDArray[np.float64]:
    """Corners `(n, 2)` of a turned rectangle or ellipse, in image sides."""
    corners = 4 if rng.random() < 0.5 else _ELLIPSE_CORNERS
    angle = (np.arange(corners) + 0.5) * 2 * np.pi / corners
    unit = np.stack([np.cos(angle), np.sin(angle) * rng.uniform(_MIN_ASPECT, 1)], 1)
    turn = rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # The inverse of the distribution whose density falls with the third power.
    share = rng.random()
    squared = (1 - share) / _SMALLEST_RADIUS**2 + share / _LARGEST_RADIUS**2
    centre = rng.uniform(-0.2, 1.2, 2)
    shape: NDArray[np.float64] = unit @ rotation.T / np.sqrt(squared) + centre
    return shape


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    channels = rng.random() + rng.normal(0, _HUE_SPREAD, 3)
    red, green, blue = (255 * channels.clip(0, 1)).round().astype(int).tolist()
    return red, green, blue
