"""Draw the contract section of RESULTS.md: accuracy against certified latency, as SVG.

Needs matplotlib: `pip install 'ofa-deploy[plots]'`.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # before pyplot chooses a screen
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
# Of the section's tables.
COLUMNS = 11
TICKS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
INK, MUTED, ACCENT, WARM = "#1f2933", "#9aa5b1", "#0b7285", "#d9480f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One budget of the table."""

    budget_ms: float
    certified_ms: float
    accuracy: float


def read_points(results: Path) -> dict[str, list[Point]]:
    """The rows of the contract section that ended in a bundle, by runtime."""
    text = results.read_text(encoding="utf-8")
    section = text.partition("<!-- contract -->")[2].partition("<!-- /contract -->")[0]
    found: dict[str, list[Point]] = {}
    for line in section.splitlines():
        if re.fullmatch(r"\*\*[a-z-]+\*\*", line):
            points = found.setdefault(line.strip("*"), [])
        row = line.strip("| ").split(" | ")
        if len(row) == COLUMNS and re.fullmatch(r"[\d.]+", row[0]) and row[3]:
            points.append(
                Point(
                    budget_ms=float(row[0]),
                    certified_ms=float(row[3]),
                    accuracy=float(row[7].rstrip("%")),
                )
            )
    return found


def draw(found: dict[str, list[Point]], out: Path) -> None:
    """Write the picture, a panel for each runtime."""
    plt.rcParams.update({"svg.hashsalt": "ofa-deploy", "font.size": 9})
    figure, panels = plt.subplots(1, len(found), figsize=(10, 3.4), sharey=True)
    for axes, (runtime, points) in zip(panels, found.items(), strict=True):
        draw_panel(axes, points)
        axes.set_title(runtime, fontsize=10, color=INK)
    panels[0].set_ylabel("predicted accuracy, %")
    panels[-1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    lines = out.read_text(encoding="utf-8").splitlines()
    out.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


def draw_panel(axes: Any, points: list[Point]) -> None:
    """One runtime: what was asked for, and what was certified."""
    certified = [point.certified_ms for point in points]
    accuracy = [point.accuracy for point in points]
    for point in points:
        axes.plot(
            [point.certified_ms, point.budget_ms],
            [point.accuracy] * 2,
            color=MUTED,
            linewidth=1.2,
            zorder=1,
        )
    axes.plot(certified, accuracy, color=ACCENT, linewidth=1.5, alpha=0.35, zorder=2)
    axes.scatter(certified, accuracy, color=ACCENT, s=20, zorder=3, label="certified")
    axes.scatter(
        [point.budget_ms for point in points],
        accuracy,
        color=WARM,
        marker="|",
        s=110,
        zorder=3,
        label="budget asked for",
    )
    axes.set_xscale("log")
    low, high = min(certified) * 0.9, max(p.budget_ms for p in points) * 1.1
    axes.set_xlim(low, high)
    shown = [tick for tick in TICKS if low < tick < high]
    axes.set_xticks(shown)
    axes.set_xticklabels([f"{tick:g}" for tick in shown])
    axes.minorticks_off()
    axes.set_xlabel("latency, ms (1 thread)")
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).with_name("RESULTS.md")
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "budgets.svg")
    args = parser.parse_args()
    draw(read_points(args.results), args.out)


if __name__ == "__main__":
    main()
