"""Trained supernets that come with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ofa_deploy.errors import DeployError
from ofa_deploy.stored import (
    DESCRIPTION_FILE,
    StoredSupernet,
    description_digest,
    read_supernet,
)

__all__ = ["find_in_zoo", "open_supernet", "open_zoo", "zoo_names"]

_FOLDER = Path(__file__).parent


def zoo_names() -> tuple[str, ...]:
    """Names of the supernets in the package."""
    found = _FOLDER.glob(f"*/{DESCRIPTION_FILE}")
    return tuple(sorted(path.parent.name for path in found))


def open_zoo(name: str) -> StoredSupernet:
    """The supernet of that name.

    Raises:
        DeployError: There is none.
    """
    if name not in zoo_names():
        raise DeployError(
            f"{name!r} is not a supernet of the zoo; there are: "
            f"{', '.join(zoo_names()) or 'none'}"
        )
    return replace(read_supernet(_FOLDER / name), source=name)


def find_in_zoo(sha256: str) -> StoredSupernet | None:
    """The supernet whose description has that digest, if it is in the zoo."""
    for name in zoo_names():
        if description_digest(_FOLDER / name) == sha256:
            return open_zoo(name)
    return None


def open_supernet(name_or_folder: str | Path) -> StoredSupernet:
    """A supernet by its name in the zoo, or by its folder."""
    if isinstance(name_or_folder, str) and name_or_folder in zoo_names():
        return open_zoo(name_or_folder)
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise DeployError(
            f"{str(name_or_folder)!r} is neither a folder nor a supernet of the zoo "
            f"({', '.join(zoo_names()) or 'none'})"
        )
    return read_supernet(folder)
