"""What takes the place of a layer in somebody else's network."""

from __future__ import annotations

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Has all that a layer has: a forward may ask it, such as for `in_features`.

    It reads an `input`, as torch's layers do: that may be given by name.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        """What the layer has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # while it is being copied
                raise
            return getattr(self.layer, name)
