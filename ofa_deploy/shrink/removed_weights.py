"""What was removed keeps its weights, whatever an optimiser does besides the gradient.

Nobody reads a removed channel, so that no gradient changes what writes and reads it;
decay and momentum do. Put back after each step, it comes back as what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_deploy.shrink.masks import THRESHOLD, MaskedNetwork


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Slice:
    """Where a parameter has channels of a group: rows of writers, columns of readers.

    Args:
        parameter: Of the network.
        dim: 0 for rows, 1 for columns.
        group: Index of the group.
        positions: Along that dimension.
        channels: For each position, the index among the group's channels.
    """

    parameter: Tensor
    dim: int
    group: int
    positions: Tensor
    channels: Tensor

    def positions_of(self, gone: Tensor) -> Tensor:
        """Of those channels of the group that are gone, `(channels,)`."""
        return self.positions[gone[self.channels]]


class RemovedWeights:
    """Weights of the channels that masks remove.

    Args:
        masked: The network with its masks; what is removed now is noted.
    """

    def __init__(self, masked: MaskedNetwork) -> None:
        self._masks = masked.masks
        self._slices = tuple(_slices(masked))
        self.note()

    @torch.no_grad()
    def note(self) -> None:
        """Keep what the masks remove now, as it is now."""
        gone = [mask.latent.detach() <= THRESHOLD for mask in self._masks]
        self._noted = [
            (one, places, one.parameter.index_select(one.dim, places))
            for one in self._slices
            if len(places := one.positions_of(gone[one.group]))
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make it what it was when it was noted."""
        for one, places, values in self._noted:
            one.parameter.index_copy_(one.dim, places, values)


def _slices(masked: MaskedNetwork) -> Iterator[_Slice]:
    for cut in masked.graph.cuts:
        dim = 0 if cut.side == "out" else 1
        for parameter in masked.module.network.get_submodule(cut.module).parameters():
            # Vectors have no columns, and depthwise filters one: theirs are rows.
            if parameter.ndim <= dim or (dim == 1 and parameter.shape[1] == 1):
                continue
            # Identities have only the channels that both sides share.
            there = cut.positions < parameter.shape[dim]
            yield _Slice(
                parameter=parameter,
                dim=dim,
                group=cut.group,
                positions=torch.from_numpy(cut.positions[there]),
                channels=torch.from_numpy(cut.channels[there]),
            )
