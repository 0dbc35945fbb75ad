"""A user's network as it is worked on: a copy of plain layers that can be trained."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import (
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
)
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ofa_deploy.errors import DataError, TraceError
from ofa_deploy.nn.memory_format import store_channels_last
from ofa_deploy.train.logits import called_as_in_training
from ofa_deploy.train.precision import prefers_bf16
from ofa_deploy.train.views import ViewsInAnyOrder

Floats = NDArray[np.float32]
# Of norms' statistics, as torch has it by default.
NORM_MOMENTUM = 0.1
# Between outputs that should be equal, over the largest; rounding makes 1e-6.
MOST_DIFFERENCE = 1e-4


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32, with nothing frozen, that computes the same.

    What layers compute from other parameters, such as weight norms and pruned weights,
    becomes a parameter itself, and each layer has its own, so that each can lose
    channels of its own.

    Args:
        module: Not changed.

    Raises:
        TraceError: It cannot be copied, or its `train` returns nothing.
    """
    copied = _copy(module)
    for layer in list(copied.modules()):
        if parametrize.is_parametrized(layer):
            _settle(layer)
        _settle_hooks(layer)
        # The mean over all batches ever seen would hardly move any more.
        if isinstance(layer, _NormBase) and layer.momentum is None:
            layer.momentum = NORM_MOMENTUM
        # In eval mode one operator computes it, past the layers that lose channels, and
        # no exporter knows that one. This says that the activation is none of its own.
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0
    _untie(copied)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if copied.train(copied.training) is not copied:
        raise TraceError(
            f"{type(module).__name__}.train gives something else than the network; let "
            "it end with `return self`, as torch's own does"
        )
    return copied


def _copy(module: nn.Module) -> nn.Module:
    name = type(module).__name__
    if any(isinstance(one, torch.jit.ScriptModule) for one in module.modules()):
        raise TraceError(f"{name} is TorchScript; give the module that it was made of")
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise TraceError(
            f"{name} has layers that do not know their inputs yet; call it once on "
            "images before"
        )
    # What a layer computed last, and keeps: torch copies nothing that has a gradient.
    computed = {
        id(value): value.detach().clone()
        for layer in module.modules()
        for value in vars(layer).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(module, memo=computed).cpu().float()
    except Exception as error:  # whatever its layers hold
        raise TraceError(
            f"{name} cannot be copied: {error}. Where it keeps what it computed, call "
            "it once within torch.no_grad() before"
        ) from error


def _settle(layer: nn.Module) -> None:
    """Make parameters of what is computed from others.

    Torch's own way would take the properties from the class, which layers share with
    those that they are copies of.
    """
    computed = layer.parametrizations
    assert isinstance(computed, nn.ModuleDict)
    computed.eval()
    values = {name: getattr(layer, name).detach().clone() for name in computed}
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value))


def _settle_hooks(layer: nn.Module) -> None:
    """The same, of what is computed by a hook before each call."""
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(  # type: ignore[no-untyped-call]
                layer, hook._tensor_name
            )


def _untie(module: nn.Module) -> None:
    """Give each layer its own parameters; a layer under two names stays one."""
    seen: set[int] = set()
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if id(parameter) in seen:
                mine = nn.Parameter(parameter.detach().clone())
                setattr(layer, name, mine)
            seen.add(id(parameter))


def run(module: nn.Module, inputs: Floats) -> Floats:
    """Outputs of a module in eval mode; its mode is left as it was.

    Raises:
        TraceError: It gives no tensor, or writes into its input.
    """
    images = torch.from_numpy(inputs.copy())
    outputs = _run(module, images)
    if not np.array_equal(images.numpy(), inputs, equal_nan=True):
        raise TraceError(
            f"{type(module).__name__} writes into its input, which others read, too; "
            "write what it computes elsewhere, as `x = x - mean` does for `x -= mean`"
        )
    return outputs


def _run(module: nn.Module, images: Tensor) -> Floats:
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            outputs = module(images)
    finally:
        module.train(training)
    result: Floats = require_logits(module, outputs).float().numpy()
    return result


def are_equal(found: Floats, expected: Floats) -> bool:
    """Whether outputs are, but for rounding."""
    if found.shape != expected.shape:
        return False
    # Of outputs that are all zero there is no scale.
    scale = float(np.abs(expected).max()) or 1.0
    return bool(np.abs(found - expected).max() <= MOST_DIFFERENCE * scale)


def train_once(module: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Try what a step of training does; moves the module's statistics.

    Args:
        module: Is in training mode afterwards, and stored channels-last.
        image_shape: `(3, H, W)`.

    Raises:
        TraceError: It gives no tensor.
    """
    store_channels_last(module.train())
    images = torch.zeros(2, *image_shape).contiguous(memory_format=torch.channels_last)
    with called_as_in_training(bf16=prefers_bf16()):
        outputs = require_logits(module, module(images))
    torch.autograd.backward(outputs.sum())


def require_trainable(module: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Refuse what hours of training would come to nothing with.

    Args:
        module: From images to logits `(N, classes)`; not changed.
        image_shape: `(3, H, W)`.

    Raises:
        TraceError: It fails in training, gives more then than in use, such as networks
            with two heads, or logits that depend on more than the image.
    """
    name = type(module).__name__
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, *image_shape), dtype=np.float32)
    alone = run(module, noise[:1])
    try:
        expected = run(module, noise)
    except Exception as error:  # whatever its forward raises
        raise TraceError(
            f"{name} takes one image, and not two at once: {error}. Let its forward "
            "leave the first axis as it is"
        ) from error
    if not are_equal(expected[:1], alone):
        raise TraceError(
            f"{name} gives an image other logits beside another than alone, as batch "
            "norms with track_running_stats=False do, and what draws at random in "
            "eval mode: what is deployed takes one image at a time. Change these "
            "layers, and train it"
        )
    tried = copy.deepcopy(module)
    store_channels_last(tried)
    images = torch.from_numpy(noise).contiguous(memory_format=torch.channels_last)
    try:
        with ViewsInAnyOrder():
            found = _run(tried, images)
        train_once(tried, image_shape)
    except TraceError:
        raise
    except Exception as error:  # whatever its forward raises
        raise TraceError(
            f"{name} cannot be trained on images of shape {image_shape}, whose maps "
            f"are stored channels-last: {error}"
        ) from error
    if not are_equal(found, expected):
        raise TraceError(
            f"{name} computes something else where maps are stored channels-last, as "
            "they are trained: it writes into views of them, or looks at how they are "
            "stored. Use flatten or reshape, and write into nothing that they gave"
        )


def require_logits(module: nn.Module, outputs: object) -> Tensor:
    """A network's outputs, which must be a tensor.

    Raises:
        TraceError: They are something else.
    """
    if isinstance(outputs, Tensor):
        return outputs
    mode = ", while it is trained," if module.training else ""
    raise TraceError(
        f"{type(module).__name__} gives{mode} {type(outputs).__name__}, not a tensor; "
        "wrap it in a module that gives the logits alone"
    )


def require_numbers(module: nn.Module) -> None:
    """Refuse weights of a training that came to nothing.

    Raises:
        DataError: Names the first tensor that is infinite, or no number.
    """
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise DataError(
                f"{type(module).__name__}'s {name} is not finite; look at the weights "
                "that were brought"
            )
