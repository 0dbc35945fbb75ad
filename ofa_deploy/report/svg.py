"""Plots as SVG: axes, and marks that tell what they are when pointed at.

Written out here because a plotting library's scripts are four megabytes in each file,
and every bundle has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

TICK_COUNT = 6
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 64, 18, 14, 46
# Of the range, left free at either end.
PADDING = 0.04


def padded(values: Iterable[float], *, zero: bool = False) -> tuple[float, float]:
    """A range that holds all values, with room around them.

    Args:
        values: At least one.
        zero: Whether it begins at 0.
    """
    found = list(values)
    low, high = min(found), max(found)
    if zero:
        return 0.0, (high or 1.0) * (1 + PADDING)
    room = PADDING * (high - low) or abs(high) * PADDING or 1.0
    return low - room, high + room


def ticks(low: float, high: float, *, count: int = TICK_COUNT) -> list[float]:
    """Round values in a range, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


@dataclass(slots=True, kw_only=True)
class Plot:
    """An SVG in the making.

    Args:
        name: The element's id.
        label: What it shows, for those who cannot see it.
        x_label: Under the horizontal axis.
        y_label: Beside the vertical one.
        x_range: From left to right.
        y_range: From bottom to top.
        width: In pixels.
        height: Likewise.
        margin_left: Likewise, for what stands left of the axis.
    """

    name: str
    label: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 620
    height: int = 360
    margin_left: int = MARGIN_LEFT
    _marks: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Pixel of a horizontal value."""
        low, high = self.x_range
        inside = self.width - self.margin_left - MARGIN_RIGHT
        return self.margin_left + (value - low) / (high - low) * inside

    def y(self, value: float) -> float:
        """Pixel of a vertical value."""
        low, high = self.y_range
        inside = self.height - MARGIN_TOP - MARGIN_BOTTOM
        return self.height - MARGIN_BOTTOM - (value - low) / (high - low) * inside

    def point(
        self, x: float, y: float, *, kind: str, tip: str, radius: float = 3.5
    ) -> None:
        """A dot."""
        self._add(
            f'<circle class="{kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" '
            f'r="{radius:g}" {_tip(tip)}/>'
        )

    def bar(
        self, x: tuple[float, float], y: tuple[float, float], *, kind: str, tip: str
    ) -> None:
        """A rectangle between two corners."""
        left, right = sorted((self.x(x[0]), self.x(x[1])))
        top, bottom = sorted((self.y(y[0]), self.y(y[1])))
        self._add(
            f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" '
            f'width="{max(0.5, right - left):.1f}" '
            f'height="{max(0.5, bottom - top):.1f}" {_tip(tip)}/>'
        )

    def line(
        self, xs: Sequence[float], ys: Sequence[float], *, kind: str, tip: str = ""
    ) -> None:
        """A line through points."""
        path = " ".join(
            f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True)
        )
        self._add(f'<polyline class="{kind}" points="{path}" {_tip(tip)}/>')

    def vertical(self, x: float, *, kind: str, text: str) -> None:
        """A line from bottom to top, with its name at the upper end."""
        low, high = self.x_range
        if not low <= x <= high:
            return
        self.line((x, x), self.y_range, kind=kind, tip=text)
        end = x > low + 0.75 * (high - low)
        self._add(
            f'<text class="{kind}-text" x="{self.x(x) + (-5 if end else 5):.1f}" '
            f'y="{MARGIN_TOP + 12}" text-anchor="{"end" if end else "start"}">'
            f"{escape(text)}</text>"
        )

    def text(self, x: float, y: float, text: str, *, anchor: str = "start") -> None:
        """Words at a place."""
        self._add(
            f'<text x="{self.x(x):.1f}" y="{self.y(y):.1f}" text-anchor="{anchor}" '
            f'dominant-baseline="middle">{escape(text)}</text>'
        )

    def render(self, *, y_ticks: bool = True) -> str:
        """The element."""
        parts = [
            f'<svg id="{self.name}" role="img" aria-label="{escape(self.label)}" '
            f'viewBox="0 0 {self.width} {self.height}">'
        ]
        bottom, right = self.height - MARGIN_BOTTOM, self.width - MARGIN_RIGHT
        for value in ticks(*self.x_range):
            x = self.x(value)
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{MARGIN_TOP}" '
                f'y2="{bottom}"/><text class="tick" x="{x:.1f}" y="{bottom + 17}" '
                f'text-anchor="middle">{value:g}</text>'
            )
        for value in ticks(*self.y_range) if y_ticks else ():
            y, left = self.y(value), self.margin_left
            parts.append(
                f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text class="tick" x="{left - 7}" y="{y:.1f}" '
                f'text-anchor="end" dominant-baseline="middle">{value:g}</text>'
            )
        middle_x = (self.margin_left + right) / 2
        middle_y = (MARGIN_TOP + bottom) / 2
        parts.append(
            f'<text class="label" x="{middle_x:.0f}" y="{self.height - 8}" '
            f'text-anchor="middle">{escape(self.x_label)}</text>'
            f'<text class="label" x="14" y="{middle_y:.0f}" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle_y:.0f})">{escape(self.y_label)}</text>'
        )
        return "".join([*parts, *self._marks, "</svg>"])

    def _add(self, mark: str) -> None:
        self._marks.append(mark)


def _tip(text: str) -> str:
    return f'data-tip="{escape(text)}"' if text else ""
