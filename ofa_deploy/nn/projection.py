"""A shortcut that may change its width, and is not there where it does not."""

from __future__ import annotations

import torch
from torch import nn


class Projection(nn.Sequential):
    """A 1×1 convolution and a batch norm; made as what hands its input on.

    Between equal widths it is left out: `drop_needless` puts nothing in its place.

    Args:
        channels: Of its input and output.
    """

    def __init__(self, channels: int) -> None:
        conv = nn.Conv2d(channels, channels, 1, bias=False)
        norm = nn.BatchNorm2d(channels)
        super().__init__(conv, norm)
        with torch.no_grad():
            conv.weight.copy_(torch.eye(channels)[:, :, None, None])
            norm.weight.copy_((1 + norm.eps) ** 0.5 * torch.ones(channels))

    @property
    def is_needless(self) -> bool:
        """Whether it reads as many channels as it writes."""
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        return conv.in_channels == conv.out_channels


def projection_paths(network: nn.Module) -> list[str]:
    """Where a network has projections."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, Projection)
    ]


def drop_needless(network: nn.Module) -> nn.Module:
    """The same network, without the projections between equal widths."""
    for path in projection_paths(network):
        projection = network.get_submodule(path)
        assert isinstance(projection, Projection)
        if projection.is_needless:
            put_module(network, path, nn.Identity())
    return network


def put_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a module of a network, under all names that it has there.

    Args:
        network: Changed in place.
        path: Of what is replaced.
        module: Takes its place.
    """
    before = network.get_submodule(path)
    names = [
        name
        for name, one in network.named_modules(remove_duplicate=False)
        if one is before
    ]
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, module)
