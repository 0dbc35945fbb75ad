"""A trained supernet as a folder of files, read and written without torch.

`supernet.json` says what it is and holds the digests of the other files, all of them
safetensors: `weights` (float16), `calibration` (uint8 images), `accuracy` (the
predictor) and `samples` (what the predictor was trained on).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ofa_deploy.errors import DigestMismatch, FormatError
from ofa_deploy.materialise import stored_shapes
from ofa_deploy.plan import lower
from ofa_deploy.predict.accuracy import AccuracyPredictor, AccuracySample
from ofa_deploy.preprocess import Normalisation, decode_normalisation
from ofa_deploy.space import SearchSpace
from ofa_deploy.space_file import decode_space, encode_space
from profilers.files import MAX_FILE_BYTES, sha256_of, write_atomically
from profilers.json_reader import JsonNode, read_json

FORMAT_VERSION = 1
DESCRIPTION_FILE = "supernet.json"
WEIGHTS_FILE = "weights.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
ACCURACY_FILE = "accuracy.safetensors"
SAMPLES_FILE = "samples.safetensors"
FILES = (WEIGHTS_FILE, CALIBRATION_FILE, ACCURACY_FILE, SAMPLES_FILE)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredSupernet:
    """What specialising needs of a trained supernet.

    Args:
        space: What it contains.
        weights: By the names that `materialise` documents; float32.
        normalisation: Of the images it was trained on.
        class_names: In label order.
        calibration: Images for batch-norm statistics, `(n, H, W, 3)` uint8, or None.
        accuracy: Predictor of its networks' accuracies, or None.
        samples: What the predictor was trained on, or None.
        sha256: Digest of the description, and through it of every file.
        source: The folder, or the name in the zoo, that it was opened by; empty where
            it was opened by neither.
    """

    space: SearchSpace
    weights: Mapping[str, NDArray[np.float32]]
    normalisation: Normalisation
    class_names: tuple[str, ...]
    calibration: NDArray[np.uint8] | None = None
    accuracy: AccuracyPredictor | None = None
    samples: AccuracySample | None = None
    sha256: str = ""
    source: str = ""


def write_supernet(folder: Path, supernet: StoredSupernet) -> None:
    """Write a supernet to a folder, weights rounded to float16."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, dict[str, NDArray[Any]]] = {
        WEIGHTS_FILE: {
            name: np.ascontiguousarray(array, dtype=np.float16)
            for name, array in supernet.weights.items()
        }
    }
    if supernet.calibration is not None:
        contents[CALIBRATION_FILE] = {"images": supernet.calibration}
    if supernet.accuracy is not None:
        contents[ACCURACY_FILE] = dict(supernet.accuracy.to_arrays())
    if supernet.samples is not None:
        contents[SAMPLES_FILE] = {
            "genomes": supernet.samples.genomes.astype(np.int64),
            "accuracy": supernet.samples.accuracy.astype(np.float64),
            "image_count": np.array([supernet.samples.image_count], dtype=np.int64),
        }
    digests = {}
    for name, arrays in contents.items():
        data = save(arrays)
        digests[name] = hashlib.sha256(data).hexdigest()
        write_atomically(folder / name, data)
    description = {
        "format_version": FORMAT_VERSION,
        "space": encode_space(supernet.space),
        "normalisation": asdict(supernet.normalisation),
        "class_names": list(supernet.class_names),
        "files": digests,
    }
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    # Last: a folder without it is not taken for a supernet.
    write_atomically(folder / DESCRIPTION_FILE, text.encode())


def read_supernet(folder: Path) -> StoredSupernet:
    """Read a supernet's folder.

    Raises:
        FormatError: Not such a folder, or damaged.
        DigestMismatch: A file is not the one that was written.
    """
    return read_json(
        folder / DESCRIPTION_FILE,
        lambda node: _decode(folder, node),
        otherwise=f"{folder} is not a supernet's folder; give one that `ofa-deploy "
        "train` wrote, or the name of one in the zoo",
    )


def description_digest(folder: Path) -> str:
    """Of a supernet's description, by which bundles name it."""
    return sha256_of(folder / DESCRIPTION_FILE)


def _decode(folder: Path, node: JsonNode) -> StoredSupernet:
    entries = node.fields(
        "format_version", "space", "normalisation", "class_names", "files"
    )
    if entries["format_version"].integer(minimum=1) != FORMAT_VERSION:
        entries["format_version"].refuse(
            f"this version reads format {FORMAT_VERSION}; install another ofa-deploy"
        )
    space = decode_space(entries["space"])
    class_names = tuple(item.text() for item in entries["class_names"].items())
    if len(class_names) != space.head.class_count:
        entries["class_names"].refuse(
            f"{len(class_names)} names for {space.head.class_count} classes; the "
            "folder is damaged, copy or train it again"
        )
    files = {name: node.text() for name, node in entries["files"].entries().items()}
    if WEIGHTS_FILE not in files or not set(files) <= set(FILES):
        entries["files"].refuse(
            f"{sorted(files)}: {WEIGHTS_FILE} must be there, and nothing but {FILES}"
        )
    read = {name: _read(folder / name, digest) for name, digest in files.items()}
    calibration = read.get(CALIBRATION_FILE)
    accuracy, samples = read.get(ACCURACY_FILE), read.get(SAMPLES_FILE)
    return StoredSupernet(
        space=space,
        weights=_require_weights(space, read[WEIGHTS_FILE]),
        normalisation=decode_normalisation(entries["normalisation"]),
        class_names=class_names,
        calibration=None if calibration is None else _images(calibration),
        accuracy=(
            None
            if accuracy is None
            else AccuracyPredictor.from_arrays(
                space, _require_floats(accuracy, path="accuracy")
            )
        ),
        samples=None if samples is None else _samples(space, samples),
        sha256=description_digest(folder),
        source=str(folder),
    )


def _read(path: Path, expected: str) -> Arrays:
    try:
        if (size_bytes := path.stat().st_size) > MAX_FILE_BYTES:
            raise FormatError(
                f"{path.name} has {size_bytes} bytes, and a supernet's files at most "
                f"{MAX_FILE_BYTES}; copy or train it again",
                path="",
            )
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read: {error}", path="") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise DigestMismatch(path, expected=expected, actual=actual)
    try:
        return load(content)
    except KeyError as error:
        raise FormatError(
            f"{path.name} has tensors of type {error}, which numpy lacks; store them "
            "as float32 or float16",
            path="",
        ) from error
    except (SafetensorError, ValueError) as error:
        raise FormatError(
            f"{path.name} is not safetensors: {error}; the folder is damaged, copy or "
            "train it again",
            path="",
        ) from error


def _require_weights(
    space: SearchSpace, arrays: Arrays
) -> Mapping[str, NDArray[np.float32]]:
    _require_floats(arrays, path="weights")
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise FormatError(
                f"{name} holds NaN or infinity; train the supernet at a lower rate",
                path="weights",
            )
    shapes = stored_shapes(lower(space, space.largest()))
    for name, shape in shapes.items():
        if name not in weights or weights[name].shape != shape:
            found = weights[name].shape if name in weights else "nothing"
            raise FormatError(
                f"{name} should have shape {shape}; found {found}", path="weights"
            )
    unknown = sorted(weights.keys() - shapes.keys())
    if unknown:
        raise FormatError(
            f"{unknown[0]} is no tensor of space {space.name}", path="weights"
        )
    return MappingProxyType(weights)


def _require_floats(arrays: Arrays, *, path: str) -> Arrays:
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise FormatError(
                f"{name} holds {array.dtype}; floating-point numbers belong there",
                path=path,
            )
    return arrays


def _images(arrays: Arrays) -> NDArray[np.uint8]:
    images = arrays.get("images")
    if (
        images is None
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
    ):
        raise FormatError(
            "calibration images must be uint8 (n, H, W, 3)", path="calibration"
        )
    return images


def _samples(space: SearchSpace, arrays: Arrays) -> AccuracySample:
    try:
        genomes, accuracy, image_count = (
            arrays[name] for name in ("genomes", "accuracy", "image_count")
        )
    except KeyError as error:
        raise FormatError(f"missing array {error}", path="samples") from error
    found = (genomes, accuracy, image_count)
    genes, shapes = len(space.choice_counts), [array.shape for array in found]
    kinds = "".join(array.dtype.kind for array in found)
    if shapes != [(accuracy.size, genes), (accuracy.size,), (1,)] or kinds != "ifi":
        given = ", ".join(f"{array.dtype} {array.shape}" for array in found)
        raise FormatError(
            f"genomes, accuracy and image_count are {given}; integers (n, {genes}), "
            "floats (n,) and an integer (1,) belong here",
            path="samples",
        )
    return AccuracySample(
        genomes=genomes, accuracy=accuracy, image_count=int(image_count[0])
    )
