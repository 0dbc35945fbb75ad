"""The page: cards, plots and tables in one HTML file without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

import numpy as np

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.constraints import Verdict, binding
from ofa_deploy.predict.latency import LatencyPredictor
from ofa_deploy.report.charts import (
    ChosenPoint,
    draw_blocks,
    draw_front,
    draw_histogram,
    draw_predicted,
    draw_staircase,
)
from ofa_deploy.report.facts import (
    LeftOut,
    block_shares,
    chosen_point,
    front_points,
    left_out,
    width_lines,
)
from ofa_deploy.search.pareto import Front
from profilers.device import Conditions
from profilers.fresh import FreshMeasurement
from profilers.table import LatencyTable

REPORT_FILE = "report.html"
# Nothing is fetched, and what is in the page is all that runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Html(str):
    """Text that is markup already; all other text is escaped."""

    __slots__ = ()


Rows = Sequence[tuple[str, str]]


def bundle_report(
    network: VerifiedNetwork,
    *,
    predictor: LatencyPredictor,
    table: LatencyTable,
    front: Front,
) -> str:
    """What was chosen, and how it was shown.

    Args:
        network: Verified; all its constraints are met.
        predictor: That it was chosen by.
        table: That the predictor is of.
        front: Of the space.
    """
    space, config = predictor.space, network.config
    chosen = chosen_point(network)
    points = front_points(space, front)
    seen = left_out(space, table)
    latency = [v for v in network.verdicts if v.constraint == "latency"]
    budget_ms = latency[0].limit if latency else None
    sections = [
        plot(
            "Accuracy over latency",
            "The predicted Pareto front, darker with more weights, and the chosen "
            "network as measured. Click a network to read its name.",
            draw_front(points, chosen=chosen, budget_ms=budget_ms)
            + '<p id="picked"></p>',
        ),
        _predicted_section(predictor, table, seen, chosen),
        plot(
            "Where the milliseconds go",
            "What each block adds to this network, by the predictor; the line is what "
            "it took when timed alone.",
            draw_blocks(block_shares(predictor, table, config)),
        ),
        _staircase_section(predictor, table, config.resolution),
        *measured_sections(network, table),
    ]
    return page(
        f"{space.name} on {table.runtime.backend}",
        config.id,
        measured_cards(network),
        sections,
    )


def measured_cards(network: VerifiedNetwork) -> list[tuple[str, str]]:
    """What was measured of a network, in four figures."""
    measured, least = network.measurement, binding(network.verdicts)
    note = " · shared host: indicative" if measured.indicative else ""
    return [
        (f"{measured.quiet_ms:.4g} ms", f"measured, quiet state{note}"),
        (f"{network.accuracy.value:.2%}", f"top-1, {network.accuracy.kind}"),
        (f"{network.exported.loaded_bytes / 1e6:.3g} MB", "model file"),
        (
            f"{1 - least.used_share:.1%}",
            f"room to the binding limit: {least.constraint}",
        ),
    ]


def measured_sections(network: VerifiedNetwork, table: LatencyTable) -> list[str]:
    """How a network was shown to keep its limits.

    Args:
        network: Verified.
        table: What it was chosen by.
    """
    measured, asked = network.measurement, network.constraints
    latency = [v for v in network.verdicts if v.constraint == "latency"]
    budget_ms = latency[0].limit if latency else None
    return [
        plot(
            "All timed runs",
            f"{len(measured.samples_ns):,} runs in {measured.process_count} fresh "
            "processes, whatever state the machine was in.",
            draw_histogram(
                np.array(measured.samples_ns) / 1e6,
                quiet_ms=measured.quiet_ms,
                budget_ms=budget_ms,
                budget_text=f"{asked.latency_label}: {budget_ms or 0:.4g} ms",
            ),
        ),
        _table(
            "Verdicts",
            [_verdict_row(v, asked.latency_label) for v in network.verdicts],
        ),
        _table(
            "Candidates",
            [
                (
                    candidate.config_id,
                    f"predicted {candidate.predicted_ms:.4g} ms, timed against the "
                    f"others {candidate.confirmed_ms:.4g} ms"
                    + (
                        ""
                        if candidate.certified_ms is None
                        else f", certified up to {candidate.certified_ms:.4g} ms"
                    ),
                )
                for candidate in network.candidates
            ],
        ),
        _table(
            "Measurement",
            [
                (
                    "quiet state",
                    f"{measured.quiet_ms:.4g} ms ± {measured.standard_error_ratio:.1%}",
                ),
                *_level(measured),
                ("median of all runs", f"{measured.median_ms:.4g} ms"),
                *(
                    (f"p{percentile}", f"{value:.4g} ms")
                    for percentile in (90, 95, 99)
                    if (value := measured.percentile_ms(percentile)) is not None
                ),
                ("between processes", f"{measured.process_spread_ratio:.1%}"),
                ("first inference", f"{measured.first_inference_ms:.4g} ms"),
                ("load", f"{measured.load_ms:.4g} ms"),
                ("memory", _megabytes(measured.memory_mb)),
                (
                    "stability",
                    "; ".join(measured.stability.reasons) or "stable",
                ),
            ],
        ),
        _table("Conditions", _conditions(measured.conditions)),
        _table("Device and table", _device(table)),
    ]


def front_report(
    *, predictor: LatencyPredictor, table: LatencyTable, front: Front
) -> str:
    """What a space offers on a device, by prediction."""
    space = predictor.space
    points = front_points(space, front)
    fastest, best = points[0], points[-1]
    sections = [
        plot(
            "Accuracy over latency",
            "The predicted Pareto front, darker with more weights. Click a network to "
            "read its name.",
            draw_front(points, chosen=None, budget_ms=None) + '<p id="picked"></p>',
        ),
        _predicted_section(predictor, table, left_out(space, table), None),
        _staircase_section(predictor, table, space.middle().resolution),
        _table("Conditions while profiling", _conditions(table.conditions_after)),
        _table("Device and table", _device(table)),
    ]
    cards = [
        (f"{len(front.genomes):,}", "networks on the front"),
        (f"{fastest.latency_ms:.4g} ms", f"fastest, {fastest.accuracy:.2%}"),
        (f"{best.accuracy:.2%}", f"most accurate, {best.latency_ms:.4g} ms"),
    ]
    return page(
        f"{space.name} on {table.runtime.backend}",
        "predicted; a bundle's file is measured",
        cards,
        sections,
    )


def _predicted_section(
    predictor: LatencyPredictor,
    table: LatencyTable,
    seen: LeftOut,
    chosen: ChosenPoint | None,
) -> str:
    residuals = predictor.residuals
    some = residuals.count < len(seen.names)
    return plot(
        "Predicted against measured",
        f"{len(table.networks)} networks, each predicted without its own measurement: "
        f"{f'the {residuals.count} drawn at random ' if some else ''}"
        f"off by {residuals.rms:.1%} (root mean square). Dashed: the 95 % interval.",
        draw_predicted(
            seen.predicted_ms,
            seen.measured_ms,
            seen.names,
            low_ratio=residuals.low,
            high_ratio=residuals.high,
            chosen=chosen,
        ),
    )


def _staircase_section(
    predictor: LatencyPredictor, table: LatencyTable, resolution: int
) -> str:
    lines = width_lines(predictor.space, table, resolution=resolution)
    if not lines:
        return ""
    return plot(
        "Channel staircase",
        f"Blocks timed alone at {resolution}×{resolution} images, by their width. "
        "Orange: a wider one costs no more.",
        draw_staircase(lines),
    )


def _verdict_row(verdict: Verdict, latency_label: str) -> tuple[str, str]:
    kind, word = ("yes", "kept") if verdict.met else ("no", "not kept")
    found, limit = verdict.told(verdict.bound), verdict.told(verdict.limit)
    side = "at least" if verdict.constraint == "accuracy" else "at most"
    upper = ", its uncertainty included" if verdict.constraint == "latency" else ""
    return (
        latency_label if verdict.constraint == "latency" else verdict.constraint,
        Html(
            f'<span class="{kind}">{word}</span>: '
            + escape(
                f"{found}{upper}, {verdict.evidence}; {side} {limit} was asked for"
            )
        ),
    )


def _conditions(conditions: Conditions) -> Rows:
    def told(value: float | str | None, unit: str = "") -> str:
        if value is None:
            return "not known"
        return f"{value:.4g}{unit}" if isinstance(value, float) else f"{value}{unit}"

    return [
        ("governor", told(conditions.governor)),
        ("frequency", told(conditions.frequency_mhz, " MHz")),
        ("temperature", told(conditions.temperature_c, " °C")),
        ("load average", told(conditions.load_average)),
        ("cores allowed", told(conditions.affinity_core_count)),
        ("cores by quota", told(conditions.cgroup_quota_cores)),
        (
            "shared host",
            "yes: figures are indicative" if conditions.shared_host else "no",
        ),
    ]


def _device(table: LatencyTable) -> Rows:
    runtime = table.runtime
    return [
        ("device", table.device.cpu_model),
        (
            "runtime",
            f"{runtime.backend} {runtime.version}, {runtime.threads} thread(s), "
            f"{runtime.precision}",
        ),
        ("table measured", table.created_at[:16]),
        ("blocks, networks", f"{len(table.blocks)}, {len(table.networks)}"),
        (
            "drift while profiling",
            f"{table.drift.flagged_count} of {table.drift.window_count} windows by "
            f"more than 2 %, {table.drift.largest_ratio:.1%} at most",
        ),
    ]


def _level(measured: FreshMeasurement) -> list[tuple[str, str]]:
    """What the quiet latency is held against, if a model was timed beside it."""
    if measured.anchor_model_ms is None or measured.anchor_found_ms is None:
        return []
    told = (
        f"the anchor model at {measured.anchor_model_ms:.4g} ms; beside the file it "
        f"took {measured.anchor_found_ms:.4g} ms"
    )
    return [("held against", told)]


def _megabytes(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g} MB"


def plot(title: str, text: str, content: str) -> str:
    """A section with a picture; title and text are escaped, the content is markup."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _table(title: str, rows: Rows) -> str:
    """Two columns; labels are text."""
    cells = "".join(
        f"<tr><th>{escape(label)}</th>"
        f"<td>{cell if isinstance(cell, Html) else escape(cell)}</td></tr>"
        for label, cell in rows
    )
    return f"<section><h2>{escape(title)}</h2><table>{cells}</table></section>"


def page(
    title: str,
    subtitle: str,
    cards: Sequence[tuple[str, str]],
    sections: Sequence[str],
) -> str:
    """The whole page.

    Args:
        title: At the top.
        subtitle: Below it.
        cards: Figures, each with its label.
        sections: Markup.
    """
    folder = files("ofa_deploy.report")
    style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in cards
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f'<div class="cards">{shown}</div><div class="plots">{"".join(sections)}</div>'
        f'<div id="tip"></div><script>{script}</script></body></html>\n'
    )
