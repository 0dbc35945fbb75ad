"""The artifact: a model with everything needed to trust, check and use it."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from ofa_deploy.errors import BundleError, DataError, DigestMismatch, FormatError
from ofa_deploy.export.model_files import loaded_files
from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME
from ofa_deploy.exporting import REFERENCE_FILE
from ofa_deploy.inference import infer
from ofa_deploy.manifest import MANIFEST_FILE, FileRecord, Manifest
from ofa_deploy.preprocess import as_rgb, prepare
from ofa_deploy.verify import (
    ParityReport,
    compare_outputs,
    require_parity,
)
from profilers.backends import get_backend
from profilers.backends.base import Session
from profilers.files import ABANDONED_S, sha256_of, sync_folder, write_atomically


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model says of one image.

    Args:
        label: Index of the top class.
        class_name: Its name.
        probability: Of the top class, 0..1.
        probabilities: Of all classes, by name.
    """

    label: int
    class_name: str
    probability: float
    probabilities: dict[str, float]


class Bundle:
    """A bundle's folder, opened; use it as a context manager or close it.

    Args:
        path: The folder.
        manifest: What it says; `Bundle.open` reads it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._session: Session | None = None

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle and check every file's digest.

        Raises:
            BundleError: The folder is no bundle, or a file is missing, a link, of
                another size, or would be loaded unlisted.
            DigestMismatch: A file is not the one that was written.
            FormatError: The manifest is damaged.
        """
        folder = Path(path)
        if not (folder / MANIFEST_FILE).is_file():
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST_FILE}; give a folder "
                "that `ofa-deploy specialize` wrote"
            )
        _refuse_link(folder / MANIFEST_FILE)
        bundle = cls(folder, Manifest.read(folder / MANIFEST_FILE))
        bundle.check_digests()
        return bundle

    @property
    def model_path(self) -> Path:
        """The file that the target's runtime loads."""
        return self.path / self.manifest.model_file

    def check_digests(self) -> None:
        """Compare every file with its recorded digest.

        Raises:
            BundleError: A file is missing, a link, of another size, or would be
                loaded unlisted.
            DigestMismatch: A file was changed.
        """
        for name, record in self.manifest.files.items():
            self._check_file(self.path / name, record)
        for file in loaded_files(self.model_path):
            if file.name not in self.manifest.files:
                raise BundleError(
                    f"{file} would be loaded with {self.manifest.model_file}, and the "
                    "manifest does not list it; remove it, or copy the bundle again"
                )

    def _check_file(self, file: Path, record: FileRecord) -> None:
        _refuse_link(file)
        if not file.is_file():
            raise BundleError(
                f"{self.path} lacks {file.name}, which its manifest lists; the bundle "
                "is not complete. Copy it again, or make it anew"
            )
        # Before it is read: a file that has grown takes long.
        size_bytes = file.stat().st_size
        if size_bytes != record.size_bytes:
            raise BundleError(
                f"{file.name} has {size_bytes} bytes, the manifest says "
                f"{record.size_bytes}; the file was changed or damaged. Restore it "
                "from where it came from; do not use it"
            )
        try:
            actual = sha256_of(file)
        except OSError as error:
            raise BundleError(
                f"{file} cannot be read: {error}. See that you may read it, or copy "
                "the bundle again"
            ) from error
        if actual != record.sha256:
            raise DigestMismatch(file, expected=record.sha256, actual=actual)

    def check(self) -> ParityReport:
        """Check digests, and that the model still computes what was recorded.

        Runs the model on this machine's runtime and compares it with the outputs that
        the unfused reference gave when the bundle was made.

        Raises:
            BundleError: As `check_digests`.
            DigestMismatch: Likewise.
            FormatError: The model or the recorded outputs do not fit the manifest.
            ParityError: The outputs differ.
        """
        self.check_digests()
        inputs, outputs = self._read_reference()
        found = [self._infer(inputs[i : i + 1]) for i in range(len(inputs))]
        report = compare_outputs(np.concatenate(found), outputs)
        require_parity(report, what=f"{self.manifest.model_file} on this machine")
        return report

    def _read_reference(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if REFERENCE_FILE not in self.manifest.files:
            raise BundleError(
                f"the manifest of {self.path} lists no {REFERENCE_FILE}; without it "
                "the outputs cannot be checked. Make the bundle anew"
            )
        try:
            reference = load_tensors((self.path / REFERENCE_FILE).read_bytes())
            inputs, outputs = reference[INPUT_NAME], reference[OUTPUT_NAME]
        # Of a type that numpy lacks, and of a missing tensor, a KeyError tells.
        except (SafetensorError, KeyError, ValueError) as error:
            raise FormatError(
                f"{REFERENCE_FILE} is damaged: {error}. Make the bundle anew", path=""
            ) from error
        class_count = len(self.manifest.class_names)
        if not (
            inputs.dtype == outputs.dtype == np.float32
            and inputs.ndim == 4
            and len(inputs) > 0
            and outputs.shape == (len(inputs), class_count)
        ):
            raise FormatError(
                f"{REFERENCE_FILE} is damaged: images {inputs.dtype} {inputs.shape}, "
                f"outputs {outputs.dtype} {outputs.shape}; at least 1 image of 3 axes "
                f"and {class_count} outputs for each belong there, all float32",
                path="",
            )
        return inputs, outputs

    def predict(
        self, image: str | Path | Image.Image | NDArray[np.uint8]
    ) -> Prediction:
        """Classify one image.

        Args:
            image: A file, a Pillow image, or an `(H, W, 3)` uint8 RGB array, of any
                size; it is resized as in training.

        Raises:
            DataError: Not such an image.
            FormatError: The model does not fit the manifest.
        """
        inputs = prepare(
            _as_pixels(image)[None],
            resolution=self.manifest.resolution,
            normalisation=self.manifest.normalisation,
        )
        logits, names = self._infer(inputs)[0], self.manifest.class_names
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        shares = shifted / shifted.sum()
        label = int(shares.argmax())
        return Prediction(
            label=label,
            class_name=names[label],
            probability=float(shares[label]),
            probabilities={n: float(p) for n, p in zip(names, shares, strict=True)},
        )

    def _infer(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits `(1, classes)` of the one image that the model takes at a time."""
        logits = infer(self._open_session(), inputs)
        class_count = len(self.manifest.class_names)
        if logits.shape != (1, class_count):
            raise FormatError(
                f"the model gives outputs of shape {logits.shape} for one image; the "
                f"manifest names {class_count} classes. The bundle is damaged, make it "
                "anew",
                path="class_names",
            )
        return logits

    def close(self) -> None:
        """Release the runtime. Closing again does nothing."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_session(self) -> Session:
        if self._session is None:
            runtime = self.manifest.runtime
            backend = get_backend(runtime.backend)
            self._session = backend.load(self.model_path, threads=runtime.threads)
        return self._session


def _refuse_link(file: Path) -> None:
    # A bundle from elsewhere must not make us read, or trust, what is outside it.
    if file.is_symlink():
        raise BundleError(
            f"{file} is a link; a bundle's files are its own. Put the file that it "
            "leads to in its place, or copy the bundle again"
        )


def _as_pixels(
    image: str | Path | Image.Image | NDArray[np.uint8],
) -> NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                "an image array must be uint8 of shape (height, width, 3); got "
                f"{image.dtype} of shape {image.shape}"
            )
        return image
    try:
        if isinstance(image, Image.Image):
            return as_rgb(image)
        with Image.open(image) as opened:
            return as_rgb(opened)
    except Exception as error:  # Pillow raises many classes for a damaged file
        raise DataError(f"{image} cannot be read as an image: {error}") from error


@contextmanager
def new_bundle_folder(out: Path) -> Iterator[Path]:
    """A folder to write a bundle in, which becomes `out` at the end, or vanishes.

    Until everything is written, nothing is at `out`; whatever interrupts the writing
    leaves no folder that a reader would take for a bundle.

    Raises:
        BundleError: `out` exists and is not an empty folder.
    """
    out = out.resolve()  # "." has no name to put a part of beside it
    require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    _remove_abandoned(out.parent, prefix)
    # Not by `tempfile`, whose folders are the owner's alone whatever the umask says.
    partial = out.with_name(f"{prefix}{secrets.token_hex(8)}")
    partial.mkdir()
    try:
        yield partial
        # Folders in it are bundles, which have done so by themselves.
        for file in filter(Path.is_file, partial.iterdir()):
            with file.open("rb+") as content:
                os.fsync(content.fileno())
        sync_folder(partial)
        require_free(out)
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(out.parent)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say where a disk was full, or closed, and that nothing is left."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"the bundle cannot be written to {out}, or its files to "
            f"{tempfile.gettempdir()}: {error}. Nothing was left there; free space, or "
            "name another folder, and run this again"
        ) from error


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove parts of bundles that a kill left behind, once nobody can be at work."""
    long_ago_s = time.time() - ABANDONED_S
    with suppress(OSError):  # no bundle is worth less for what lies beside it
        for part in folder.iterdir():
            if part.name.startswith(prefix) and part.stat().st_mtime < long_ago_s:
                shutil.rmtree(part, ignore_errors=True)


def require_free(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        BundleError: `out` is a file, or a folder that is not empty.
    """
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise BundleError(
            f"{out} cannot be looked at: {error}; name a folder that can be read"
        ) from error
    if taken:
        raise BundleError(
            f"{out} exists and is not an empty folder; name another output folder, or "
            "remove it first"
        )


def require_output(out: Path) -> None:
    """Refuse an output folder that holds something, or that cannot be made.

    Raises:
        BundleError: `out` is a file, a folder that is not empty, or one that nothing
            can be put in the place of.
    """
    require_free(out)
    whole = out.resolve()  # "." is its own parent
    if os.path.ismount(whole):
        raise BundleError(
            f"{out} is where something is mounted, so that nothing can be moved to it; "
            f"name a folder in it, such as {out / 'bundle'}"
        )
    parent = next(one for one in whole.parents if one.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{whole.name}.partial-", dir=parent))
    except OSError as error:
        raise BundleError(
            f"{out} cannot be made: {error}; make free space, or name a folder whose "
            "parent can be written"
        ) from error


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Digest and size of every file in a bundle's folder but the manifest."""
    return {
        file.name: FileRecord(
            sha256=sha256_of(file),
            size_bytes=file.stat().st_size,
        )
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST_FILE
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest: the last file of a bundle."""
    write_atomically(folder / MANIFEST_FILE, manifest.to_json().encode())
