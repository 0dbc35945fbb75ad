"""Labelled images from a folder or zip of class folders, or from an .npz file.

All images are kept as one uint8 array: a small data set fits, and nothing is decoded
twice.
"""

from __future__ import annotations

import errno
import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ofa_deploy.errors import DataError, few_of
from ofa_deploy.preprocess import as_rgb

# What a member of an archive may unpack to: more than any photograph, and little enough
# to be read.
MAX_IMAGE_BYTES = 100_000_000
# Errors of a file itself: it is no file, or not there; None is what archives raise.
DAMAGED = (None, errno.ENOENT, errno.EISDIR)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
Progress = Callable[[int, int], None]
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageSet:
    """Images of one size with their labels.

    Args:
        images: `(count, height, width, 3)` uint8, RGB.
        labels: `(count,)`, integers in `0..len(class_names) - 1`; kept as int64.
        class_names: In label order, all different; kept as a tuple.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        # As people have them: lists, and integers of other widths.
        try:
            images, labels = np.asarray(self.images), np.asarray(self.labels)
        except ValueError as error:
            raise DataError(
                f"images must be of one size, and labels of one kind: {error}. Resize "
                "the images, or give a folder"
            ) from error
        if labels.dtype.kind not in "iu":
            raise DataError(f"labels must be integers; got {labels.dtype}")
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))
        object.__setattr__(self, "class_names", tuple(map(_text, self.class_names)))
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            is_float = self.images.dtype.kind == "f"
            cure = ". Of pixels from 0 to 1 give (255 * images).astype('uint8')"
            raise DataError(
                f"images must be uint8 of shape (count, height, width, 3); got "
                f"{self.images.dtype} of shape {self.images.shape}"
                f"{cure if is_float else ''}"
            )
        if self.images.shape[3] != 3:
            raise DataError(
                f"images must have 3 channels in the last axis; got shape "
                f"{self.images.shape}"
            )
        if self.labels.shape != (len(self.images),):
            raise DataError(
                f"{len(self.images)} images but labels of shape {self.labels.shape}"
            )
        if len(self.images) == 0:
            raise DataError("there are no images; give at least one of each class")
        if "" in self.class_names:
            raise DataError(
                f"class {self.class_names.index('')} has an empty name; give every "
                "class one of at least one character"
            )
        twice = [name for name, count in Counter(self.class_names).items() if count > 1]
        if twice:
            raise DataError(
                f"class {', '.join(map(repr, twice[:_SHOWN]))} is named more than "
                "once; give every class a name of its own"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise DataError(
                f"labels go from {low} to {high}, but there are "
                f"{len(self.class_names)} classes; allowed is "
                f"0..{len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sha256(self) -> str:
        """Digest of pixels, labels and names."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.tobytes())
        digest.update("\n".join(self.class_names).encode(errors="surrogateescape"))
        return digest.hexdigest()

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> ImageSet:
        """The images at `index`, in that order."""
        return ImageSet(
            images=self.images[index],
            labels=self.labels[index],
            class_names=self.class_names,
        )


def _text(name: object) -> str:
    """A class name, which numpy may have as bytes."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def split_validation(
    data: ImageSet, *, fraction: float, purpose: str = "for validation"
) -> tuple[ImageSet, ImageSet]:
    """Training and validation parts; the last images of each class validate.

    Args:
        data: All images.
        fraction: Of each class that is held out, 0..1.
        purpose: What that is held out for, for people.

    Raises:
        DataError: A class has too few images to be in both.
    """
    validates = np.zeros(len(data), dtype=bool)
    for label in range(len(data.class_names)):
        members = np.flatnonzero(data.labels == label)
        held_out = round(len(members) * fraction)
        if held_out == 0 or held_out == len(members):
            raise DataError(
                f"class {data.class_names[label]!r} has {len(members)} images: too few "
                f"to hold out {fraction:.0%} {purpose}; give more images of it, or "
                "hold out another share"
            )
        validates[members[-held_out:]] = True
    return data.take(~validates), data.take(validates)


def load_images(
    path: Path, *, skip_bad: bool = False, progress: Progress | None = None
) -> tuple[ImageSet, tuple[str, ...]]:
    """Read a data set.

    Args:
        path: A folder or .zip of class folders, or an .npz with `images` and `labels`
            (and, if wanted, `class_names`). Hidden files and folders are not looked at.
        skip_bad: Leave unreadable images out instead of refusing the set.
        progress: Called with (done, total).

    Returns:
        The images, and the names of those that were left out.

    Raises:
        DataError: Missing or empty classes, unreadable images, images of several
            sizes, a wrong shape.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder, .zip or .npz of images")
    if path.suffix == ".npz":
        return _load_npz(path), ()
    if path.is_dir():
        return _load_files(path.name, _folder_files(path), skip_bad, progress)
    if zipfile.is_zipfile(path):
        with open_zip(path) as archive:
            entries = _zip_files(path.name, archive)
            return _load_files(path.name, entries, skip_bad, progress)
    raise DataError(
        f"{path} is neither a folder, a .zip nor an .npz file; give one of these"
    )


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open an archive.

    Raises:
        DataError: It is damaged.
    """
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises many classes for a damaged directory
        raise DataError(
            f"{path} cannot be read as .zip: {error}; pack it anew"
        ) from error


def read_image(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's content.

    Raises:
        DataError: It unpacks to more than any image has, or in a way that cannot be
            stopped there.
    """
    member = archive.getinfo(name)
    if member.file_size > MAX_IMAGE_BYTES:
        raise DataError(
            f"{name} unpacks to {member.file_size} bytes; give images of at most "
            f"{MAX_IMAGE_BYTES}"
        )
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{name} is packed by bzip2, LZMA or another method; pack the images anew, "
            "as zip does by itself"
        )
    # All of it, and no more: what is said of its size may be untrue.
    with archive.open(member) as file:
        return file.read(member.file_size)


# (class name, file name, read) of every file in a class folder; None marks a class
# folder itself, so that an empty one is seen.
_Entry = tuple[str, str, Callable[[], bytes] | None]


def _folder_files(root: Path) -> Iterator[_Entry]:
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if is_hidden(folder.name):
            continue
        yield folder.name, folder.name, None
        files = {
            file.relative_to(root).parts: file
            for file in sorted(folder.rglob("*"))
            if is_image(file.name)
        }
        shown = {k: v for k, v in files.items() if not any(map(is_hidden, k))}
        deepest = max(shown, key=len, default=())
        if len(deepest) > 2:
            if all(len(parts) > 2 for parts in shown):
                raise DataError(
                    f"{root.name}: {folder.name} holds no images itself, but folders "
                    f"that do; if these are the classes, give {folder}"
                )
            raise _too_deep(root.name, deepest[:1], deepest[:-1])
        for parts, file in shown.items():
            yield folder.name, "/".join(parts), file.read_bytes


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _too_deep(
    source: str, class_folder: tuple[str, ...], folder: tuple[str, ...]
) -> DataError:
    return DataError(
        f"{source}: class {class_folder[-1]!r} has images in {'/'.join(folder)}, a "
        "folder of its own; put them beside its others, or take them out; if its "
        f"folders are the classes, give {'/'.join(class_folder)} alone"
    )


def _class_folders(source: str, holding: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Of the folders that hold images, those that are classes.

    What lies beside or above all class folders, such as a preview, is of no class.

    Raises:
        DataError: A class has images in a folder of its own.
    """

    def above(folder: tuple[str, ...]) -> list[tuple[str, ...]]:
        parts = [folder[:count] for count in range(1, len(folder))]
        return [part for part in parts if part in holding]

    others = {folder for inner in holding for folder in above(inner)}
    classes = holding - others
    parents = {folder[:-1] for folder in classes}
    if others and len(parents) > 1:
        deepest = max((one for one in sorted(classes) if above(one)), key=len)
        raise _too_deep(source, above(deepest)[-1], deepest)
    return classes


def _zip_files(source: str, archive: zipfile.ZipFile) -> Iterator[_Entry]:
    # By parts, as folders are listed; as texts, "a b/1.png" comes before "a/1.png".
    listed = sorted((_parts(name), name) for name in archive.namelist())
    listed = [(parts, name) for parts, name in listed if not any(map(is_hidden, parts))]
    images = [
        (parts, name)
        for parts, name in listed
        if not name.endswith("/") and len(parts) > 1 and is_image(name)
    ]
    classes = _class_folders(source, {tuple(parts[:-1]) for parts, _ in images})
    parent_of: dict[str, list[str]] = {}
    for parts, name in images:
        if tuple(parts[:-1]) in classes:
            parent = parent_of.setdefault(parts[-2], parts[:-2])
            if parent != parts[:-2]:
                # Else training and test images would be mixed without a word.
                raise DataError(
                    f"{source}: class {parts[-2]!r} is in folder "
                    f"{'/'.join(parent) or '.'} and in {'/'.join(parts[:-2]) or '.'}; "
                    "pack one of them alone"
                )
            yield parts[-2], name, partial(read_image, archive, name)
    # Folder entries tell of classes without images; folders of folders are not classes.
    folders = [tuple(parts) for parts, name in listed if name.endswith("/") and parts]
    parents = {parts[:-1] for parts in folders}
    for folder in sorted(set(folders) - parents):
        yield folder[-1], "/".join(folder), None


def _parts(name: str) -> list[str]:
    """Of an archive's member; "./cat/1.png" is that of cat/1.png."""
    return [part for part in name.split("/") if part not in ("", ".")]


def is_hidden(part: str) -> bool:
    """Whether a part of a path is what systems put beside people's files.

    macOS archives hold a `._1.png` for a `1.png`, some under `__MACOSX`.
    """
    return part == "__MACOSX" or part.startswith(".")


def read_image_by(read: Callable[[], bytes], *, name: str) -> NDArray[np.uint8]:
    """Decode an image.

    Args:
        read: Gives the file's content.
        name: For people.

    Returns:
        RGB, `(height, width, 3)` uint8.

    Raises:
        DataError: The file is there, and the system cannot read it now. It is not left
            out as damaged ones may be: another day it would be among the images.
        ValueError: It is damaged, or not there.
    """
    try:
        content = read()
    except OSError as error:
        if error.errno in DAMAGED:
            raise ValueError(str(error)) from error
        raise DataError(
            f"{name} cannot be read: {error}. Check its permissions, and the disk; "
            "then run this again"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # of archives there are many classes
        raise ValueError(str(error)) from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            return as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # and of Pillow for a damaged file
        raise ValueError(str(error)) from error


def _load_files(
    source: str, entries: Iterator[_Entry], skip_bad: bool, progress: Progress | None
) -> tuple[ImageSet, tuple[str, ...]]:
    listed = list(entries)
    class_names = tuple(sorted({class_name for class_name, _, _ in listed}))
    files = [(c, n, read) for c, n, read in listed if read is not None]
    _require_classes(source, class_names, {c for c, _, _ in files})
    label_of = {name: label for label, name in enumerate(class_names)}
    images, labels, bad = [], [], []
    for done, (class_name, name, read) in enumerate(files):
        try:
            images.append(read_image_by(read, name=f"{source}: {name}"))
            labels.append(label_of[class_name])
        except ValueError:
            bad.append(name)
        if progress and done % 500 == 499:
            progress(done + 1, len(files))
    if bad and not skip_bad:
        raise DataError(
            f"{source}: {len(bad)} of {len(files)} images cannot be read "
            f"({few_of(bad)}); repair or remove them; train --skip-bad leaves them out"
        )
    _require_classes(source, class_names, {class_names[label] for label in labels})
    _require_one_size(source, images)
    data = ImageSet(
        images=np.stack(images),
        labels=np.array(labels, dtype=np.int64),
        class_names=class_names,
    )
    return data, tuple(bad)


def _require_classes(source: str, names: tuple[str, ...], filled: set[str]) -> None:
    if len(names) < 2:
        raise DataError(
            f"{source} has {len(names)} class folders; at least 2 are needed, each "
            f"with images ({', '.join(IMAGE_SUFFIXES)})"
        )
    empty = [name for name in names if name not in filled]
    if empty:
        raise DataError(
            f"{source}: no readable images in class {', '.join(map(repr, empty))}; "
            "add some or remove the folder"
        )


def _require_one_size(source: str, images: list[NDArray[np.uint8]]) -> None:
    shapes = {image.shape[:2] for image in images}
    if len(shapes) > 1:
        shown = ", ".join(f"{w}×{h}" for h, w in sorted(shapes)[:_SHOWN])
        raise DataError(
            f"{source}: images have {len(shapes)} different sizes ({shown}); "
            "resize them to one size first"
        )


def _load_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise many classes here
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    missing = {"images", "labels"} - set(arrays)
    if missing:
        raise DataError(
            f"{path} has no array {', '.join(sorted(missing))}; it needs `images` "
            "(count, height, width, 3) uint8 and `labels` (count,)"
        )
    labels = arrays["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(
            f"{path}: labels must be integers of shape (count,); got {labels.dtype} "
            f"of shape {labels.shape}"
        )
    class_names = _npz_class_names(path, labels, arrays.get("class_names"))
    data = ImageSet(
        images=arrays["images"],
        labels=labels.astype(np.int64),
        class_names=class_names,
    )
    _require_classes(
        path.name, class_names, {class_names[i] for i in np.unique(data.labels)}
    )
    return data


def _npz_class_names(
    path: Path, labels: NDArray[Any], names: NDArray[Any] | None
) -> tuple[str, ...]:
    if names is not None:
        if names.ndim != 1:
            raise DataError(
                f"{path}: class_names must be texts of shape (classes,); got "
                f"{names.dtype} of shape {names.shape}"
            )
        return tuple(map(_text, names))
    highest = int(labels.max())
    # A class without images is refused anyway, and names for 10**12 fill the memory.
    if highest >= len(labels):
        raise DataError(
            f"{path}: labels go up to {highest}, but there are only {len(labels)} "
            "images; number the classes from 0 on, each with images of its own"
        )
    return tuple(f"class {label}" for label in range(highest + 1))
