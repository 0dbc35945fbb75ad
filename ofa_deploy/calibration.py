"""A user's own images for batch-norm statistics: no labels, any sizes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.dataset import (
    IMAGE_SUFFIXES,
    Progress,
    is_hidden,
    is_image,
    open_zip,
    read_image,
    read_image_by,
)
from ofa_deploy.errors import DataError, few_of
from ofa_deploy.preprocess import require_pixels, resize

# Statistics of more images are no better, and take longer.
MOST_IMAGES = 2_000

Read = Callable[[], bytes]


def load_calibration(
    path: Path, *, size: int, progress: Progress | None = None
) -> NDArray[np.uint8]:
    """Read images to calibrate with.

    Args:
        path: A folder or .zip with images anywhere below, or an .npz with `images`
            `(count, height, width, 3)` uint8.
        size: Height and width to resize to, as `Bundle.predict` does.
        progress: Called with (done, total).

    Returns:
        `(n, size, size, 3)` uint8; at most `MOST_IMAGES`, evenly over the names.

    Raises:
        DataError: Nothing there, or an image that cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder, .zip or .npz of images")
    if path.suffix == ".npz":
        return resize(_thinned(_npz_images(path)), size)
    if path.is_dir():
        found = {
            file.relative_to(path).as_posix(): file.read_bytes
            for file in path.rglob("*")
            if file.is_file()
        }
        return _decode(path, found, size, progress)
    if zipfile.is_zipfile(path):
        with open_zip(path) as archive:
            members = {
                name: partial(read_image, archive, name) for name in archive.namelist()
            }
            return _decode(path, members, size, progress)
    raise DataError(
        f"{path} is neither a folder, a .zip nor an .npz file; give one of these"
    )


def require_calibration(images: NDArray[np.uint8]) -> None:
    """Refuse what batch-norm statistics cannot be taken from.

    Raises:
        DataError: Not `(n, height, width, 3)` uint8 with at least 2 images.
    """
    require_pixels(images)
    require_enough(images)
    if not images.size:
        raise DataError(f"calibration images of shape {images.shape} have no pixels")


def require_enough(images: NDArray[Any]) -> None:
    """Refuse a single image.

    Raises:
        DataError: Fewer than two.
    """
    if len(images) < 2:
        raise DataError(
            f"{len(images)} calibration images are too few; batch statistics need at "
            "least 2, and some hundreds to be good"
        )


def _decode(
    path: Path, files: Mapping[str, Read], size: int, progress: Progress | None
) -> NDArray[np.uint8]:
    names = sorted(name for name in files if _is_shown(name))
    if not names:
        raise DataError(
            f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}); give a few hundred "
            "of what the network will see"
        )
    chosen = [names[index] for index in _spread(len(names))]
    images, bad = [], []
    for done, name in enumerate(chosen, start=1):
        try:
            image = read_image_by(files[name], name=f"{path}: {name}")
            images.append(resize(image[None], size)[0])
        except ValueError:
            bad.append(name)
        if progress is not None:
            progress(done, len(chosen))
    if bad:
        raise DataError(
            f"{path}: {len(bad)} of {len(chosen)} images cannot be read "
            f"({few_of(bad)}); repair or remove them"
        )
    return np.stack(images)


def _is_shown(name: str) -> bool:
    """Whether it is an image by its name, and not hidden."""
    return is_image(name) and not any(map(is_hidden, Path(name).parts))


def _spread(count: int) -> NDArray[np.int64]:
    return np.unique(
        np.linspace(0, count - 1, min(count, MOST_IMAGES)).astype(np.int64)
    )


def _thinned(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images[_spread(len(images))]


def _npz_images(path: Path) -> NDArray[np.uint8]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["images"]
    except Exception as error:  # numpy and zipfile raise many classes here
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    require_pixels(images, where=f"{path}: ")
    if not len(images):
        raise DataError(f"{path} holds no images; give at least one")
    found: NDArray[np.uint8] = images
    return found
