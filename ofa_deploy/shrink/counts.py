"""What a network multiplies and holds, counted while it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ofa_deploy.nn.silence import silence


def mac_count(module: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of all convolutions and matrix products for an image.

    Args:
        module: In eval mode.
        image: `(1, 3, H, W)`.
    """
    with silence():  # some versions tell of GPUs' packages when they are imported
        from torch.utils.flop_counter import FlopCounterMode
    counter = FlopCounterMode(display=False)
    # Attention as products: of its faster forms for CPUs nothing is counted.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module(image)
    return int(counter.get_total_flops()) // 2


def parameter_count(module: nn.Module, image: Tensor) -> int:
    """Parameters of all modules that are called for an image.

    Without the factors of batch norms, which are in the weights before them once they
    are folded.

    Args:
        module: In eval mode.
        image: `(1, 3, H, W)`.
    """
    found: dict[nn.Parameter, int] = {}

    def note(called: nn.Module, *_: object) -> None:
        # Torch's own may call functions in place of the modules in them.
        is_torchs = type(called).__module__.startswith("torch.nn.modules")
        for name, parameter in called.named_parameters(recurse=is_torchs):
            is_factor = isinstance(called, nn.BatchNorm2d) and name == "weight"
            found[parameter] = 0 if is_factor else parameter.numel()

    handles = [
        layer.register_forward_pre_hook(note)
        for layer in module.modules()
        if not isinstance(layer, nn.Sequential)
    ]
    try:
        with torch.no_grad(), silence():
            module(image)
    finally:
        for handle in handles:
            handle.remove()
    return sum(found.values())
