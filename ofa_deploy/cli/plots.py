"""Pictures, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa_deploy.errors import MissingDependency
from profilers.files import write_atomically

if TYPE_CHECKING:
    from ofa_deploy.probe import OperatorFact, WidthFact

INK, MUTED, GRID, ACCENT, WARM = "#1f2933", "#b8c2cc", "#e4e7eb", "#0b7285", "#d9480f"


def require_plots() -> None:
    """Fail before anything is measured that could not be drawn.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency("matplotlib", extra="plots") from error


def draw_probe(
    operators: Sequence[OperatorFact],
    widths: Sequence[WidthFact],
    *,
    step: int | None,
    title: str,
    out: Path,
) -> None:
    """Operators' costs, and the staircase of widths.

    Args:
        operators: Those that do not run are left out.
        widths: Of a sweep, ascending.
        step: Channels of a step of the staircase; None if there is none.
        title: Over both.
        out: The SVG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_operators(left, [fact for fact in operators if fact.extra_ms is not None])
    _draw_widths(right, widths, step)
    figure.suptitle(title, color=INK, fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    write_atomically(out, content.getvalue())


def _draw_operators(axes: Any, facts: Sequence[OperatorFact]) -> None:
    names = [fact.name for fact in facts]
    axes.barh(
        names,
        [fact.extra_ms for fact in facts],
        xerr=[fact.error_ms for fact in facts],
        color=[WARM if fact.slow else ACCENT for fact in facts],
        ecolor=INK,
        height=0.65,
    )
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    # A dense convolution costs a hundred times as much as an activation.
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    dearest_ms = max((fact.extra_ms or 0.0 for fact in facts), default=0.0)
    decades_ms = [10.0**power for power in range(-2, 4)]
    axes.set_xticks([0.0, *(ms for ms in decades_ms if ms <= dearest_ms)])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("milliseconds added to a block; orange: slow for its work")
    _tidy(axes)


def _draw_widths(axes: Any, facts: Sequence[WidthFact], step: int | None) -> None:
    channels = [fact.channels for fact in facts]
    latency_ms = [fact.quiet_ms for fact in facts]
    axes.plot(channels, latency_ms, drawstyle="steps-pre", color=MUTED, zorder=1)
    for label, colour, kept in (
        ("worth having", ACCENT, True),
        ("as dear as a wider one", WARM, False),
    ):
        chosen = [fact for fact in facts if (fact.dominated_by is None) == kept]
        axes.errorbar(
            [fact.channels for fact in chosen],
            [fact.quiet_ms for fact in chosen],
            yerr=[fact.error_ms for fact in chosen],
            fmt="o",
            markersize=4.5,
            color=colour,
            label=label,
            zorder=2,
        )
    axes.set_ylim(bottom=0)
    steps = "" if step is None else f"; steps of {step}"
    axes.set_xlabel(f"output channels of a 1×1 convolution{steps}")
    axes.set_ylabel("milliseconds")
    axes.legend(frameon=False, loc="upper left")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
