"""Spaces that people name on the command line, or bring in a file."""

from __future__ import annotations

from pathlib import Path

from ofa_deploy.errors import SpaceError
from ofa_deploy.families import mbv3, repvgg
from ofa_deploy.space import SearchSpace
from ofa_deploy.space_file import decode_space
from profilers.json_reader import read_json

SPACE_NAMES = (
    "mbv3-small",
    "mbv3-imagenet-w1.0",
    "mbv3-imagenet-w1.2",
    "repvgg-small",
)


def named_space(name: str, *, class_count: int | None = None) -> SearchSpace:
    """The space of a name in `SPACE_NAMES`, or of a JSON file.

    Without a count of classes, a named space has that of the data it was made for.
    """
    if name == "mbv3-small":
        return mbv3.small(class_count=class_count or 10)
    if name == "repvgg-small":
        return repvgg.small(class_count=class_count or 10)
    if name in SPACE_NAMES:
        width = float(name.rsplit("w", 1)[1])
        return mbv3.imagenet(width=width, class_count=class_count or 1000)
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return read_json(path, decode_space, otherwise="give a space's JSON file")
    raise SpaceError(
        f"{name!r} is neither a space ({', '.join(SPACE_NAMES)}) nor a .json file"
    )
