"""A user's own images to calibrate with."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofa_deploy import calibration
from ofa_deploy.calibration import load_calibration, require_calibration
from ofa_deploy.errors import DataError

SIZE = 8


def save(path: Path, *, value: int, size: tuple[int, int] = (SIZE, SIZE)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def values(images: np.ndarray) -> list[int]:
    assert images.shape[1:] == (SIZE, SIZE, 3)
    return [int(image[0, 0, 0]) for image in images]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images at different depths and of different sizes, and what is none."""
    folder = tmp_path / "photos"
    save(folder / "a.png", value=10)
    save(folder / "b/c.jpg", value=20, size=(30, 11))
    save(folder / "b/d/e.bmp", value=30, size=(5, 5))
    save(folder / ".hidden/f.png", value=40)
    save(folder / "__MACOSX/g.png", value=50)
    (folder / "notes.txt").write_text("none")
    return folder


def test_images_are_found_at_any_depth_and_resized(photos: Path) -> None:
    assert values(load_calibration(photos, size=SIZE)) == [10, 20, 30]


def test_a_zip_holds_what_the_folder_does(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in photos.rglob("*"):
            archive.write(file, file.relative_to(photos))
    assert values(load_calibration(path, size=SIZE)) == [10, 20, 30]


def test_of_many_images_some_are_taken_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_IMAGES", 3)
    images = np.arange(9, dtype=np.uint8)[:, None, None, None]
    path = tmp_path / "images.npz"
    np.savez(path, images=np.tile(images, (1, SIZE, SIZE, 3)))
    assert values(load_calibration(path, size=SIZE)) == [0, 4, 8]


def test_images_that_cannot_be_read_are_counted_and_named(photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 4 images cannot be read \(broken.png\)"):
        load_calibration(photos, size=SIZE)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("nowhere", None, "does not exist"),
        ("text.txt", b"text", "neither a folder, a .zip nor an .npz"),
        ("broken.npz", b"text", "cannot be read as .npz"),
    ],
)
def test_what_holds_no_images_is_refused(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load_calibration(tmp_path / name, size=SIZE)


def test_a_zip_whose_directory_is_damaged_is_refused(
    photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in photos.rglob("*.png"):
            archive.write(file, file.name)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02")] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"photos.zip cannot be read as .zip: "):
        load_calibration(path, size=SIZE)


PIXELS = "images must be uint8 of shape (count, height, width, 3); got"


@pytest.mark.parametrize(
    ("shape", "dtype", "told"),
    [
        ((4, 8, 8, 3), np.float32, f"{PIXELS} float32 of shape (4, 8, 8, 3)"),
        ((4, 8, 8), np.uint8, f"{PIXELS} uint8 of shape (4, 8, 8)"),
        ((4, 3, 8, 8), np.uint8, f"{PIXELS} uint8 of shape (4, 3, 8, 8)"),
        (
            (1, 8, 8, 3),
            np.uint8,
            "1 calibration images are too few; batch statistics need at least 2, and "
            "some hundreds to be good",
        ),
        (
            (2, 0, 8, 3),
            np.uint8,
            "calibration images of shape (2, 0, 8, 3) have no pixels",
        ),
    ],
)
def test_images_without_statistics_are_refused(
    shape: tuple[int, ...], dtype: type, told: str
) -> None:
    with pytest.raises(DataError) as caught:
        require_calibration(np.zeros(shape, dtype=dtype))
    assert str(caught.value) == told


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        load_calibration(tmp_path, size=SIZE)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (
            np.zeros((2, SIZE, SIZE, 3), dtype=np.float32),
            f": {PIXELS} float32 of shape (2, {SIZE}, {SIZE}, 3)",
        ),
        (
            np.zeros((2, SIZE, SIZE, 1), dtype=np.uint8),
            f": {PIXELS} uint8 of shape (2, {SIZE}, {SIZE}, 1)",
        ),
        (
            np.zeros((0, SIZE, SIZE, 3), dtype=np.uint8),
            " holds no images; give at least one",
        ),
    ],
    ids=["floats", "grey", "none"],
)
def test_arrays_of_another_kind_are_refused(
    tmp_path: Path, images: np.ndarray, told: str
) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=images)
    with pytest.raises(DataError) as caught:
        load_calibration(path, size=SIZE)
    assert str(caught.value) == f"{path}{told}"
