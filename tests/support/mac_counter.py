"""Multiply-accumulates counted while a network runs: an oracle for formulas."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


def counted_macs(network: nn.Module, size: int) -> int:
    """Of convolutions and linear layers, for one image.

    Args:
        network: From images `(1, 3, size, size)`.
        size: Height and width of the image.
    """
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = cast(Tensor, module.weight)
        total += weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

    handles = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return total
