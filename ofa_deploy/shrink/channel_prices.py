"""What a network's layers take on the device, by how many channels they have.

Each layer is timed alone, at a grid of channel counts; between these its latency is
interpolated. Layers are not a network: some whole networks of different widths are
timed beside them, and say what the layers' sum is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa_deploy.errors import MeasurementError
from ofa_deploy.export.lone_layer import LoneLayer
from ofa_deploy.shrink.cost import Counts
from ofa_deploy.shrink.groups import ChannelGraph, Side, TracedLayer

Floats = NDArray[np.float64]

# Channel counts of a layer at which it is timed, on either side.
GRID_POINTS = 5
# Weights of the least linear layer that is timed, times the places that it is called
# at: a classifier behind a pool takes no longer than the clock's error.
TIMED_WEIGHTS = 2**16


def channel_grid(channels: int, *, step: int, points: int = GRID_POINTS) -> list[int]:
    """Counts from one step to all channels, evenly spaced, multiples of the step.

    Args:
        channels: Of the whole layer; always the last one.
        step: Channels that the runtime's kernels work in.
        points: How many at most.
    """
    first = min(step, channels)
    counts = np.linspace(first, channels, points)
    aligned = {min(channels, max(first, round(c / step) * step)) for c in counts}
    return sorted(aligned | {channels})


def side_grid(
    graph: ChannelGraph, layer: TracedLayer, side: Side, *, step: int
) -> list[int]:
    """Counts of one side of a layer; of one that is not pruned, its width alone."""
    channels = layer.in_channels if side == "in" else layer.out_channels
    cut = graph.cuts_at(layer.name, side)
    return channel_grid(channels, step=step) if cut else [channels]


def timed_layer(layer: TracedLayer, *, read: int, written: int) -> LoneLayer:
    """A layer between that many channels, to be timed."""
    return LoneLayer(
        name=layer.name,
        in_channels=read,
        out_channels=written,
        in_size=layer.in_size,
        window=layer.window,
        groups=written if layer.depthwise else layer.groups,
    )


def timed_layers(graph: ChannelGraph, *, step: int) -> dict[str, LoneLayer]:
    """All layers at all points of their grids, by key.

    Small linear layers are left out. So are layers that stay as they are, and where
    they are: what every network of the graph has is in the calibration's constant.
    """
    found: dict[str, LoneLayer] = {}
    for layer in graph.layers:
        if not _is_priced(graph, layer):
            continue
        for read, written in product(*_grids(graph, layer, step=step)):
            read = written if layer.depthwise else read
            timed = timed_layer(layer, read=read, written=written)
            found.setdefault(timed.key, timed)
    return found


def _is_priced(graph: ChannelGraph, layer: TracedLayer) -> bool:
    cuts = graph.cuts_at(layer.name, "in") + graph.cuts_at(layer.name, "out")
    weights = layer.in_channels * layer.out_channels
    if layer.is_linear and weights * max(layer.call_places) < TIMED_WEIGHTS:
        return False
    return bool(cuts) or layer.name in graph.removable


def _grids(
    graph: ChannelGraph, layer: TracedLayer, *, step: int
) -> tuple[list[int], list[int]]:
    """Counts read and written; a depthwise convolution reads what it writes."""
    written = side_grid(graph, layer, "out", step=step)
    if layer.depthwise:
        return [1], written
    return side_grid(graph, layer, "in", step=step), written


class LatencyPrice:
    """Milliseconds of a network by its groups' channel counts; differentiable.

    Each layer's latency is interpolated bilinearly between the measured points of its
    grid; the sum is scaled, and a constant added.

    Args:
        graph: Of the network.
        latency_ms: Of timed layers, by key.
        step: Of the grids.
        scale: Of the sum.
        constant_ms: What every network takes besides.

    Raises:
        MeasurementError: A layer was not measured.
    """

    unit = "ms"

    def __init__(
        self,
        graph: ChannelGraph,
        *,
        latency_ms: dict[str, float],
        step: int,
        scale: float = 1.0,
        constant_ms: float = 0.0,
    ) -> None:
        self.graph, self._latency_ms, self._step = graph, latency_ms, step
        self.scale, self.constant_ms = scale, constant_ms
        self._counts = Counts(graph)
        self._surfaces = [
            (place, layer.repeats, _surface(graph, layer, latency_ms, step=step))
            for place, layer in enumerate(graph.layers)
            if _is_priced(graph, layer)
        ]

    def __call__(self, counts: Tensor) -> Tensor:
        """See `Price`."""
        read, written = self._counts.of_layers(counts)
        total = sum(
            (
                repeats * surface.at(read[place], written[place])
                for place, repeats, surface in self._surfaces
                if not self._is_left_out(place, read[place], written[place])
            ),
            start=torch.zeros((), dtype=torch.float64),
        )
        return self.scale * total + self.constant_ms

    def _is_left_out(
        self, place: int, read: Tensor | float, written: Tensor | float
    ) -> bool:
        return self.graph.layers[place].is_projection and bool(read == written)

    @property
    def constant(self) -> float:
        """See `LayerPrices`."""
        return self.constant_ms

    def of_layer(self, place: int, read: float, written: float) -> float:
        """See `LayerPrices`."""
        for index, repeats, surface in self._surfaces:
            if index == place and not self._is_left_out(place, read, written):
                both = torch.tensor([read, written], dtype=torch.float64)
                at = surface.at(both[0], both[1])
                return self.scale * repeats * float(at)
        return 0.0

    def of_graph(self, graph: ChannelGraph) -> LatencyPrice:
        """The same of another network, all of whose layers were measured.

        Args:
            graph: Of a part of the network that was.
        """
        return LatencyPrice(
            graph,
            latency_ms=self._latency_ms,
            step=self._step,
            scale=self.scale,
            constant_ms=self.constant_ms,
        )

    def calibrated(self, sums_ms: Floats, measured_ms: Floats) -> LatencyPrice:
        """Scale and constant that fit whole networks best, by relative squares.

        Args:
            sums_ms: Of each network's layers, by a price of scale 1 and constant 0.
            measured_ms: Latencies of the networks.
        """
        design = np.stack([sums_ms, np.ones_like(sums_ms)], axis=1)
        (scale, constant), *_ = np.linalg.lstsq(
            design / measured_ms[:, None], np.ones(len(sums_ms)), rcond=None
        )
        if constant < 0:  # a network takes no less than nothing besides its layers
            shares = sums_ms / measured_ms
            scale = float(shares.sum() / (shares**2).sum())
            constant = 0.0
        return LatencyPrice(
            self.graph,
            latency_ms=self._latency_ms,
            step=self._step,
            scale=float(scale),
            constant_ms=float(constant),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Surface:
    """Latency over the channels read and written, `(read, written)` points."""

    read: Tensor
    written: Tensor
    latency_ms: Tensor

    def at(self, read: Tensor, written: Tensor) -> Tensor:
        row, row_share = _place(self.read, read)
        column, column_share = _place(self.written, written)
        values = self.latency_ms
        low = values[row, column] * (1 - column_share)
        low = low + values[row, column + 1] * column_share
        high = values[row + 1, column] * (1 - column_share)
        high = high + values[row + 1, column + 1] * column_share
        return low * (1 - row_share) + high * row_share


def _place(points: Tensor, value: Tensor) -> tuple[int, Tensor]:
    """The interval of ascending points that a value is in, and where in it.

    Below the first point and above the last the nearest interval goes on.
    """
    index = int(torch.searchsorted(points, value.detach().to(points.dtype), right=True))
    index = min(max(index - 1, 0), len(points) - 2)
    low, high = float(points[index]), float(points[index + 1])
    return index, (value - low) / (high - low)


def _surface(
    graph: ChannelGraph,
    layer: TracedLayer,
    latency_ms: dict[str, float],
    *,
    step: int,
) -> _Surface:
    read, written = _grids(graph, layer, step=step)
    values = np.empty((len(read), len(written)))
    for (row, in_count), (column, out_count) in product(
        enumerate(read), enumerate(written)
    ):
        timed = timed_layer(
            layer, read=out_count if layer.depthwise else in_count, written=out_count
        )
        if timed.key not in latency_ms:
            raise MeasurementError(
                f"{layer.name} with {in_count} and {out_count} channels was not "
                "measured; measure the network's layers anew"
            )
        values[row, column] = latency_ms[timed.key]
    rows, columns = (_at_least_two(points) for points in (read, written))
    grown = np.pad(
        values,
        ((0, len(rows) - len(read)), (0, len(columns) - len(written))),
        mode="edge",
    )
    return _Surface(
        read=torch.tensor(rows, dtype=torch.float64),
        written=torch.tensor(columns, dtype=torch.float64),
        latency_ms=torch.from_numpy(grown),
    )


def _at_least_two(points: list[int]) -> list[int]:
    """A side that is never pruned has one point; an interval has two."""
    return points if len(points) > 1 else [points[0], points[0] + 1]
