"""Folders that long calls keep their state in, to go on from after a kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ofa_deploy.errors import DataError, TrainingError
from profilers.locks import HELD, lock, unlock

LOCK_FILE = ".lock"


@contextmanager
def working_alone(folder: Path) -> Iterator[None]:
    """Have a folder for oneself: two calls in one would spoil each other's state.

    Args:
        folder: Made if it is not there.

    Raises:
        TrainingError: Another call is at work in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise TrainingError(
            f"{folder} cannot be worked in: {error}. Name a folder that can be written"
        ) from error
    with file:
        try:
            lock(file)
        except OSError as error:
            if error.errno in HELD:
                raise TrainingError(
                    f"another call is at work in {folder}; wait for it, stop it, or "
                    "name another folder to work in"
                ) from error
            yield  # where there are no locks it goes without
            return
        try:
            yield
        finally:
            unlock(file)


def require_outside(name: str, folder: Path, data: object) -> None:
    """Refuse to write among the images: what is written would be taken for a class.

    Args:
        name: Of the argument.
        folder: That is to be written.
        data: What images are read from; only a path can hold the folder.

    Raises:
        DataError: `folder` is in the data's, or is it.
    """
    if not isinstance(data, (str, Path)):
        return
    images = Path(data).resolve()
    if folder.resolve().is_relative_to(images):
        raise DataError(
            f"{name}={folder} is in the folder of the images, {images}, where it would "
            "be taken for a class; name one outside"
        )
