"""Draw the budgets section of RESULTS.md: accuracy against measured latency, as SVG.

Needs matplotlib: `pip install 'ofa-deploy[plots]'`.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")  # before pyplot chooses a screen
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
INK, MUTED, ACCENT, WARM = "#1f2933", "#9aa5b1", "#0b7285", "#d9480f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One budget of the table."""

    budget_ms: float
    measured_ms: float
    accuracy: float


def read_points(results: Path) -> list[Point]:
    """The feasible rows of the budgets section."""
    text = results.read_text(encoding="utf-8")
    section = text.partition("<!-- budgets -->")[2].partition("<!-- /budgets -->")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()]
    return [
        Point(
            budget_ms=float(row[0]),
            measured_ms=float(row[6].split()[0]),
            accuracy=float(row[8].rstrip("%")),
        )
        for row in rows
        if len(row) == 10 and re.fullmatch(r"[\d.]+", row[0]) and row[6]
    ]


def draw(points: list[Point], out: Path) -> None:
    """Write the picture."""
    plt.rcParams.update({"svg.hashsalt": "ofa-deploy", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    for point in points:
        axes.plot(
            [point.measured_ms, point.budget_ms],
            [point.accuracy] * 2,
            color=MUTED,
            linewidth=1.2,
            zorder=1,
        )
    measured = [point.measured_ms for point in points]
    accuracy = [point.accuracy for point in points]
    axes.plot(measured, accuracy, color=ACCENT, linewidth=1.5, alpha=0.35, zorder=2)
    axes.scatter(measured, accuracy, color=ACCENT, s=34, zorder=3, label="measured")
    axes.scatter(
        [point.budget_ms for point in points],
        accuracy,
        color=WARM,
        marker="|",
        s=150,
        zorder=3,
        label="budget asked for",
    )
    axes.set_xscale("log")
    ticks = [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]
    low, high = min(measured) * 0.9, max(p.budget_ms for p in points) * 1.1
    axes.set_xlim(low, high)
    axes.set_xticks([tick for tick in ticks if low < tick < high])
    axes.set_xticklabels([f"{tick:g}" for tick in ticks if low < tick < high])
    axes.minorticks_off()
    axes.set_xlabel("latency of the exported file, ms (OpenVINO, 1 thread)")
    axes.set_ylabel("predicted accuracy, %")
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    lines = out.read_text(encoding="utf-8").splitlines()
    out.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


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
