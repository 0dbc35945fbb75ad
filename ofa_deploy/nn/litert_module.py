"""A torch module as .tflite, through the well-kept converter.

For what `export.onnx_to_litert` has no operators for: that takes milliseconds and no
second framework, this about ten seconds of CPU time. The names of what goes in and
comes out are the same.
"""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from ofa_deploy.errors import (
    DeployError,
    DeviceError,
    MissingDependency,
    ModelRejected,
)
from ofa_deploy.export.litert import named_alike
from ofa_deploy.nn.silence import silence
from profilers.files import write_atomically

_CONVERTER = "litert-torch"
# What its files are made into here, for those that are kept.
_WRITTEN_AS = "image to logits, norms alone spelt out"
_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding}
# What the compiled part of version 0.10 has packages for.
_CONVERTS_ON = {("Linux", "x86_64"), ("Darwin", "arm64")}


def convert_module(
    module: nn.Module,
    *,
    input_shape: tuple[int, int, int, int],
    cache: Path | None = None,
) -> bytes:
    """A module's .tflite.

    Args:
        module: From images `(N, channels, height, width)` to one tensor of rank 2. Not
            changed.
        input_shape: Of the images.
        cache: Folder of converted models, from which one that was converted before is
            taken; None converts it in any case.

    Returns:
        The model, in float32, with an input `image` `(N, height, width, channels)` and
        an output `logits` in the signature `serving_default`.

    Raises:
        MissingDependency: `litert-torch` is not installed.
        DeviceError: Nor can it be, on this machine.
        ModelRejected: It does not convert this network.
    """
    module = copy.deepcopy(module).eval()
    with _rejecting(module, input_shape):
        if cache is None:
            return _convert(module, input_shape)
        path = cache / f"{_content_sha256(module, input_shape)}.tflite"
        if path.exists():
            return path.read_bytes()
        model = _convert(module, input_shape)
    with suppress(OSError):  # where nothing can be kept it is converted each time
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model)
    return model


def require_converter() -> str:
    """See that the converter is there; returns its version.

    Raises:
        MissingDependency: It is not installed.
        DeviceError: Nor can it be, on this machine.
    """
    try:
        return version(_CONVERTER)
    except ModuleNotFoundError as error:
        here = (platform.system(), platform.machine())
        if here not in _CONVERTS_ON:
            raise DeviceError(
                f"{_CONVERTER}, which writes networks without a plan as .tflite, has "
                f"no packages for {' on '.join(here)}; take onnxruntime-cpu or "
                "openvino-cpu for these"
            ) from error
        raise MissingDependency(_CONVERTER, extra="litert-convert") from error


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
    converter = f"{_CONVERTER} {require_converter()}"
    for text in (converter, _WRITTEN_AS, torch.__version__, str(input_shape)):
        digest.update(f"{text}\n".encode())
    digest.update(program.graph_module.code.encode())
    tensors = {**program.state_dict, **program.constants}
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _spell_norms_out(module: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Make a product and a sum of each norm that no convolution takes in; in place.

    The converter writes four operators of each.
    """
    graph = torch.export.export(module, (torch.zeros(input_shape),)).graph
    for node in graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        before = node.args[0]
        if before.target in _CONVOLUTIONS and len(before.users) == 1:
            continue
        name, _ = list(node.meta["nn_module_stack"].values())[-1]
        norm = module.get_submodule(name)
        # Not one with a forward of its own, or without statistics.
        if type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
            norm.__class__ = _Affine


class _Affine(nn.BatchNorm2d):
    """A batch norm in eval mode, whose factors are constants to the converter."""

    def forward(self, input: Tensor) -> Tensor:
        """Of maps `(N, channels, height, width)`."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = (self.running_var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.affine:
            shift = shift + self.bias
        return input * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


class _ChannelsLast(nn.Module):
    """A module that takes channels last, as the runtime's kernels want them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        """Of images `(N, height, width, channels)`."""
        # In the order that the module knows: it may view maps as rows of features.
        outputs: Tensor = self.module(image.permute(0, 3, 1, 2).contiguous())
        return outputs


def _convert(module: nn.Module, input_shape: tuple[int, int, int, int]) -> bytes:
    require_converter()
    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    with silence():
        import litert_torch

        _spell_norms_out(module, input_shape)
        wrapped = _ChannelsLast(module).eval()
        count, channels, height, width = input_shape
        sample = torch.zeros(count, height, width, channels)
        converted = litert_torch.convert(wrapped, (sample,))
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
            path = Path(folder) / "model.tflite"
            converted.export(str(path))
            return named_alike(path.read_bytes())
