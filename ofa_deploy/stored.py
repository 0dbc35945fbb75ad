"""A trained supernet as a folder of files, read and written without torch.

`supernet.json` says what it is and holds the digests of the other files;
`weights.safetensors` holds the weights, in float16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ofa_deploy.errors import DigestMismatch, FormatError
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.space import SearchSpace
from ofa_deploy.space_file import decode_space, encode_space
from profilers.files import write_atomically
from profilers.json_reader import JsonNode, parse_json

FORMAT_VERSION = 1
DESCRIPTION_FILE = "supernet.json"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredSupernet:
    """What specialising needs of a trained supernet.

    Args:
        space: What it contains.
        weights: By the names that `materialise` documents; float32.
        normalisation: Of the images it was trained on.
        class_names: In label order.
        weights_sha256: Digest of the weights file.
    """

    space: SearchSpace
    weights: Mapping[str, NDArray[np.float32]]
    normalisation: Normalisation
    class_names: tuple[str, ...]
    weights_sha256: str


def write_supernet(
    folder: Path,
    *,
    space: SearchSpace,
    weights: Mapping[str, NDArray[np.floating]],
    normalisation: Normalisation,
    class_names: tuple[str, ...],
) -> None:
    """Write a supernet to a folder, weights rounded to float16."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save(
        {k: np.ascontiguousarray(v, dtype=np.float16) for k, v in weights.items()}
    )
    description = {
        "format_version": FORMAT_VERSION,
        "space": encode_space(space),
        "normalisation": asdict(normalisation),
        "class_names": list(class_names),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomically(folder / WEIGHTS_FILE, content)
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    # Last: a folder without it is not taken for a supernet.
    write_atomically(folder / DESCRIPTION_FILE, text.encode())


def read_supernet(folder: Path) -> StoredSupernet:
    """Read a supernet's folder.

    Raises:
        FormatError: Not such a folder, or damaged.
        DigestMismatch: The weights are not the ones that were written.
    """
    path = folder / DESCRIPTION_FILE
    try:
        node = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{folder} is not a supernet's folder ({error}); give one that "
            "`ofa-deploy train` wrote, or the name of one in the zoo",
            path="",
        ) from error
    entries = node.fields(
        "format_version", "space", "normalisation", "class_names", "weights_sha256"
    )
    if entries["format_version"].integer(minimum=1) != FORMAT_VERSION:
        entries["format_version"].refuse(
            f"this version reads format {FORMAT_VERSION}; install another ofa-deploy"
        )
    space = decode_space(entries["space"])
    class_names = tuple(item.text() for item in entries["class_names"].items())
    if len(class_names) != space.head.class_count:
        entries["class_names"].refuse(
            f"{len(class_names)} names for {space.head.class_count} classes"
        )
    return StoredSupernet(
        space=space,
        weights=_read_weights(
            folder / WEIGHTS_FILE, entries["weights_sha256"].text()
        ),
        normalisation=_decode_normalisation(entries["normalisation"]),
        class_names=class_names,
        weights_sha256=entries["weights_sha256"].text(),
    )


def _read_weights(path: Path, expected: str) -> Mapping[str, NDArray[np.float32]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(
            f"the supernet's weights cannot be read: {error}", path=""
        ) from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise DigestMismatch(path, expected=expected, actual=actual)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise FormatError(f"{path.name} is not safetensors: {error}", path="") from error
    return MappingProxyType({k: v.astype(np.float32) for k, v in tensors.items()})


def _decode_normalisation(node: JsonNode) -> Normalisation:
    entries = node.fields("mean", "std")
    mean = [item.number() for item in entries["mean"].items()]
    std = [item.positive() for item in entries["std"].items()]
    if len(mean) != 3 or len(std) != 3:
        node.refuse("mean and std have one number for each of the 3 channels")
    return Normalisation(
        mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2])
    )
