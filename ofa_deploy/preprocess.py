"""From an image to a network's input; the same in training, search and bundles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ofa_deploy.errors import DataError
from profilers.json_reader import JsonNode

Floats = NDArray[np.float32]
PIXELS_AT_A_TIME = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """Mean and spread of the training images, per RGB channel, in 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, images: NDArray[np.uint8]) -> Floats:
        """`(N, H, W, 3)` uint8 to `(N, 3, H, W)` float32 around 0."""
        mean = np.array(self.mean, dtype=np.float32)
        std = np.array(self.std, dtype=np.float32)
        scaled = (images.astype(np.float32) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def measure_normalisation(images: NDArray[np.uint8]) -> Normalisation:
    """Statistics of `(N, H, W, 3)` uint8 images; of a channel of one value a std of 1.

    Needs little memory besides theirs.
    """
    flat = images.reshape(-1, 3)
    mean = flat.mean(axis=0, dtype=np.float64)
    squares = np.zeros((1, 3))
    for start in range(0, len(flat), PIXELS_AT_A_TIME):
        part = (flat[start : start + PIXELS_AT_A_TIME] - mean) ** 2
        # In the order of a sum over all at once: others differ in the last digits, by
        # which normalisations are told apart.
        squares = np.concatenate([squares, part]).sum(0, keepdims=True)
    std = np.sqrt(squares[0] / len(flat))
    std[std == 0] = 1.0
    return Normalisation(
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
    )


def require_pixel_scale(normalisation: Normalisation) -> None:
    """Refuse statistics of pixels of 0 to 1, as frameworks have them, and none at all.

    Raises:
        DataError: Says what to give instead.
    """
    mean, std = normalisation.mean, normalisation.std
    told = f"normalisation has mean {mean} and std {std}"
    if not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise DataError(f"{told}; give finite numbers, and a std above 0")
    if max(std) < 1 or (max(std) == 1 and 0 < max(mean) <= 1):
        raise DataError(
            f"{told}, which are of pixels of 0 to 1; give those of pixels of 0 to 255, "
            "255 times as much"
        )


def as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels `(H, W, 3)` of an image of any kind.

    Raises:
        DataError: It has numbers that are no grey values.
    """
    is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode == "F" or (image.mode == "I" and not is_16_bit):
        raise DataError(
            f"an image of mode {image.mode} has no range of grey values; give one of 8 "
            "or 16 bits"
        )
    if is_16_bit or image.mode.startswith("I;16"):  # which Pillow would clip at 8
        grey = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def decode_normalisation(node: JsonNode) -> Normalisation:
    """A normalisation from JSON."""
    entries = node.fields("mean", "std")
    mean = [item.number() for item in entries["mean"].items()]
    std = [item.positive() for item in entries["std"].items()]
    if len(mean) != 3 or len(std) != 3:
        node.refuse(
            f"mean has {len(mean)} numbers and std {len(std)}; give one for each of "
            "the 3 channels"
        )
    return Normalisation(mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize `(N, H, W, 3)` to `(N, size, size, 3)`, bilinear with antialiasing."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack(
        [
            np.asarray(
                Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
            )
            for image in images
        ]
    )


def prepare(
    images: NDArray[np.uint8], *, resolution: int, normalisation: Normalisation
) -> Floats:
    """Network input `(N, 3, resolution, resolution)` of `(N, H, W, 3)` uint8 images."""
    require_pixels(images)
    return normalisation.apply(resize(images, resolution))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedImages:
    """Network inputs that are prepared when they are asked for, by slices.

    All at once would take four times their images' memory, and more.
    """

    images: NDArray[np.uint8]
    resolution: int
    normalisation: Normalisation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> Floats:
        return prepare(
            self.images[part],
            resolution=self.resolution,
            normalisation=self.normalisation,
        )


def require_pixels(images: NDArray[Any], *, where: str = "") -> None:
    """Refuse what is not `(N, H, W, 3)` uint8.

    Args:
        images: Any array.
        where: What the message is to begin with.

    Raises:
        DataError: Names what was given instead.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise DataError(
            f"{where}images must be uint8 of shape (count, height, width, 3); got "
            f"{images.dtype} of shape {images.shape}"
        )
