"""A torch module as .tflite, through the well-kept converter.

For networks that have no plan. Those of a space are written by `export.litert`, in
milliseconds and without a second framework; this takes about ten seconds of CPU time.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import nn

from ofa_deploy.errors import DeployError, MissingDependency, ModelRejected
from ofa_deploy.nn.silence import silence
from profilers.files import write_atomically

_CONVERTER = "litert-torch"


def convert_module(
    module: nn.Module,
    *,
    input_shape: tuple[int, int, int, int],
    cache: Path | None = None,
) -> bytes:
    """A module's .tflite, taken from the cache where it was converted before.

    Args:
        module: From images `(N, channels, height, width)` to one tensor of rank 2. Not
            changed.
        input_shape: Of the images.
        cache: Folder of converted models; by default in the user's cache folder.

    Returns:
        The model, in float32, with an input `args_0` `(N, height, width, channels)` and
        an output `output_0` in the signature `serving_default`.

    Raises:
        MissingDependency: `litert-torch` is not installed.
        ModelRejected: It does not convert this network.
    """
    if cache is None:
        cache = user_cache_path("ofa-deploy") / "litert"
    module = copy.deepcopy(module).eval()
    with _rejecting(module, input_shape):
        path = cache / f"{_content_sha256(module, input_shape)}.tflite"
        if path.exists():
            return path.read_bytes()
        model = _convert(module, input_shape)
    with suppress(OSError):  # where nothing can be kept it is converted each time
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model)
    return model


@contextmanager
def _rejecting(module: nn.Module, input_shape: tuple[int, ...]) -> Iterator[None]:
    """Tell what torch and the converter refuse, of whatever kind their parts raise."""
    try:
        yield
    except (DeployError, OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise ModelRejected(
            f"{type(module).__name__} cannot be converted to .tflite for images "
            f"{input_shape}: {error}; change what it names, or use another backend"
        ) from error


def _content_sha256(module: nn.Module, input_shape: tuple[int, ...]) -> str:
    """Digest of what decides the file: graph, weights, shape and versions."""
    program = torch.export.export(module, (torch.zeros(input_shape),))
    digest = hashlib.sha256()
    for text in (_CONVERTER, _converter_version(), torch.__version__, str(input_shape)):
        digest.update(f"{text}\n".encode())
    digest.update(program.graph_module.code.encode())
    tensors = {**program.state_dict, **program.constants}
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _converter_version() -> str:
    try:
        return version(_CONVERTER)
    except ModuleNotFoundError as error:
        raise MissingDependency(_CONVERTER, extra="litert-convert") from error


def _convert(module: nn.Module, input_shape: tuple[int, int, int, int]) -> bytes:
    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    with silence():
        import litert_torch

        # The wrapper itself starts in training mode.
        wrapped = litert_torch.to_channel_last_io(module, args=[0]).eval()
        count, channels, height, width = input_shape
        sample = torch.zeros(count, height, width, channels)
        converted = litert_torch.convert(wrapped, (sample,))
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
            path = Path(folder) / "model.tflite"
            converted.export(str(path))
            return path.read_bytes()
