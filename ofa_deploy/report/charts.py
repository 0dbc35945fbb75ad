"""What a report shows, one function a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.report.svg import Plot, padded

Floats = NDArray[np.float64]

HISTOGRAM_BINS = 60
# Of all runs, what the histogram's right end shows; a few take many times as long.
SHOWN_SHARE = 99.5
# A line further from all runs would leave them no room.
FARTHEST = 2.0
# Of the bars of blocks, and of their names, in pixels.
ROW_HEIGHT, NAMES_WIDTH = 22, 112


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """A network of the Pareto front, as predicted."""

    name: str
    latency_ms: float
    accuracy: float
    weight_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPoint:
    """The network of a bundle: its latency as certified, with its interval."""

    name: str
    latency_ms: float
    low_ms: float
    high_ms: float
    predicted_ms: float
    accuracy: float


def draw_front(
    points: Sequence[FrontPoint],
    *,
    chosen: ChosenPoint | None,
    budget_ms: float | None,
) -> str:
    """Accuracy over latency; darker networks have more weights."""
    shown = [p.latency_ms for p in points], [100 * p.accuracy for p in points]
    if chosen is not None:
        shown[0].append(chosen.latency_ms)
        shown[1].append(100 * chosen.accuracy)
    if budget_ms is not None and budget_ms < 1.5 * max(shown[0]):
        shown[0].append(budget_ms)
    plot = Plot(
        name="pareto",
        label="Pareto front: accuracy over latency",
        x_label="latency, ms (predicted)",
        y_label="top-1 accuracy, %",
        x_range=padded(shown[0]),
        y_range=padded(shown[1]),
    )
    largest = max(point.weight_mb for point in points)
    for point in points:
        shade = min(4, int(5 * point.weight_mb / largest))
        plot.point(
            point.latency_ms,
            100 * point.accuracy,
            kind=f"front shade{shade}",
            tip=f"{point.name}\n{point.latency_ms:.4g} ms, {point.accuracy:.2%}, "
            f"{point.weight_mb:.3g} MB",
        )
    if budget_ms is not None:
        plot.vertical(budget_ms, kind="budget", text=f"budget {budget_ms:.4g} ms")
    if chosen is not None:
        plot.point(
            chosen.latency_ms,
            100 * chosen.accuracy,
            kind="chosen",
            radius=6,
            tip=f"chosen: {chosen.name}\nmeasured {chosen.latency_ms:.4g} ms, "
            f"{chosen.accuracy:.2%}",
        )
    return plot.render()


def draw_predicted(
    predicted_ms: Floats,
    measured_ms: Floats,
    names: Sequence[str],
    *,
    low_ratio: float,
    high_ratio: float,
    chosen: ChosenPoint | None,
) -> str:
    """Measured over predicted latencies of networks that the fit had not seen."""
    values = [*predicted_ms, *measured_ms]
    if chosen is not None:
        values += [chosen.predicted_ms, chosen.high_ms]
    low, high = padded(values, zero=True)
    plot = Plot(
        name="predicted",
        label="Predicted against measured latency",
        x_label="predicted, ms",
        y_label="measured, ms",
        x_range=(low, high),
        y_range=(low, high),
    )
    plot.line((low, high), (low, high), kind="identity", tip="measured as predicted")
    for ratio, name in ((low_ratio, "lower"), (high_ratio, "upper")):
        end = min(high, high / ratio)
        plot.line(
            (low, end),
            (low * ratio, end * ratio),
            kind="interval",
            tip=f"{name} end of the 95 % interval: {ratio - 1:+.1%}",
        )
    for x, y, name in zip(predicted_ms, measured_ms, names, strict=True):
        plot.point(
            x,
            y,
            kind="network",
            tip=f"{name}\npredicted {x:.4g} ms, measured {y:.4g} ms ({y / x - 1:+.1%})",
        )
    if chosen is not None:
        x = chosen.predicted_ms
        plot.line((x, x), (chosen.low_ms, chosen.high_ms), kind="error")
        plot.point(
            x,
            chosen.latency_ms,
            kind="chosen",
            radius=6,
            tip=f"chosen: {chosen.name}\npredicted {x:.4g} ms, measured "
            f"{chosen.latency_ms:.4g} ms ({chosen.latency_ms / x - 1:+.1%})",
        )
    return plot.render()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShare:
    """What a block costs within the network, and by itself."""

    name: str
    what: str
    price_ms: float
    alone_ms: float | None


def draw_blocks(shares: Sequence[BlockShare]) -> str:
    """Where the milliseconds go: a bar a block, in the network's order."""
    dearest = max(max(s.price_ms, s.alone_ms or 0.0) for s in shares)
    plot = Plot(
        name="blocks",
        label="Milliseconds by block",
        x_label="ms in the network (bar), and timed alone (line)",
        y_label="",
        x_range=(min(0.0, *(s.price_ms for s in shares)), 1.04 * dearest),
        y_range=(-len(shares) - 0.1, 0.1),
        height=ROW_HEIGHT * len(shares) + 70,
        margin_left=NAMES_WIDTH,
    )
    total = sum(share.price_ms for share in shares)
    for row, share in enumerate(shares):
        top, bottom = -row - 0.15, -row - 0.85
        plot.bar(
            (0.0, share.price_ms),
            (bottom, top),
            kind="block",
            tip=f"{share.name} {share.what}\n{share.price_ms:.4g} ms, "
            f"{share.price_ms / total:.1%} of the network",
        )
        if share.alone_ms is not None:
            plot.line(
                (share.alone_ms, share.alone_ms),
                (bottom, top),
                kind="alone",
                tip=f"{share.name} alone: {share.alone_ms:.4g} ms",
            )
        plot.text(
            plot.x_range[0] - 6 * _per_pixel(plot),
            -row - 0.5,
            share.name,
            anchor="end",
        )
    return plot.render(y_ticks=False)


def _per_pixel(plot: Plot) -> float:
    low, high = plot.x_range
    return (high - low) / (plot.width - plot.margin_left)


def draw_histogram(
    samples_ms: Floats,
    *,
    quiet_ms: float,
    budget_ms: float | None,
    budget_text: str,
) -> str:
    """How long runs took, with the budget."""
    start, end = float(samples_ms.min()), float(np.percentile(samples_ms, SHOWN_SHARE))
    # On a slow day all runs are above the quiet state, and above the budget of it.
    lines = [quiet_ms] if budget_ms is None else [quiet_ms, budget_ms]
    shown = [line for line in lines if start / FARTHEST < line < end * FARTHEST]
    low, high = padded((start, end, *shown))
    counts, edges = np.histogram(samples_ms, bins=HISTOGRAM_BINS, range=(low, high))
    plot = Plot(
        name="histogram",
        label="Histogram of all timed runs",
        x_label="ms of one run",
        y_label="runs",
        x_range=(low, high),
        y_range=padded(counts.tolist(), zero=True),
    )
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            plot.bar(
                (left, right),
                (0.0, float(count)),
                kind="runs",
                tip=f"{count} runs between {left:.4g} and {right:.4g} ms",
            )
    plot.vertical(quiet_ms, kind="quiet", text=f"quiet state {quiet_ms:.4g} ms")
    if budget_ms is not None:
        plot.vertical(budget_ms, kind="budget", text=budget_text)
    return plot.render()


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthLine:
    """A block's latency by its width, everything else the same."""

    name: str
    widths: tuple[int, ...]
    latency_ms: tuple[float, ...]

    @property
    def dominated(self) -> tuple[bool, ...]:
        """Whether a wider one costs no more."""
        return tuple(
            any(other <= own for other in self.latency_ms[place + 1 :])
            for place, own in enumerate(self.latency_ms)
        )


def draw_staircase(lines: Sequence[WidthLine]) -> str:
    """Milliseconds over channels, a line a block; dominated widths stand out."""
    plot = Plot(
        name="staircase",
        label="Channel staircase: milliseconds by width",
        x_label="channels inside the block",
        y_label="ms, timed alone",
        x_range=padded([w for line in lines for w in line.widths], zero=True),
        y_range=padded([ms for line in lines for ms in line.latency_ms], zero=True),
    )
    for line in lines:
        plot.line(line.widths, line.latency_ms, kind="stair", tip=line.name)
    for line in lines:
        marks = zip(line.widths, line.latency_ms, line.dominated, strict=True)
        for width, latency_ms, dominated in marks:
            plot.point(
                width,
                latency_ms,
                kind="dominated" if dominated else "width",
                radius=3,
                tip=f"{line.name}, {width} channels: {latency_ms:.4g} ms"
                + (", as dear as a wider one" if dominated else ""),
            )
    return plot.render()
