"""What the commands print at the end, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ofa_deploy.bundle import Bundle
from ofa_deploy.constraints import MEGABYTE, Verdict, in_words
from ofa_deploy.feasibility import CostRange, ReachableRange
from ofa_deploy.fleet import Fleet
from ofa_deploy.fronts import FrontNetwork
from ofa_deploy.held_out import HeldOutQuality
from ofa_deploy.predict.latency import LatencyPredictor
from ofa_deploy.probe import OperatorFact, WidthFact
from ofa_deploy.profiling import LevelChange
from ofa_deploy.search.dominated_widths import promotion
from profilers.doctor import Diagnosis
from profilers.table import LatencyTable

# The quiet level of a machine that holds still is found again within this.
SAME_LEVEL_RATIO = 0.03
SHOWN_NETWORKS = 12  # of a front
WIDTH_BAR = 40  # characters of the slowest width's bar


def show_bundle(console: Console, bundle: Bundle) -> None:
    """A bundle's figures, one a line."""
    manifest = bundle.manifest
    measured, accuracy = manifest.measured, manifest.accuracy
    notes = ["shared host: indicative"] if measured.indicative else []
    if measured.anchor_model_ms is not None:
        notes.append("held against the anchor model")
    rows = [
        ("bundle", str(bundle.path)),
        ("model", f"{manifest.config_id}  ({manifest.model_file})"),
        *(
            ("kept" if place == 0 else "", _verdict(verdict))
            for place, verdict in enumerate(manifest.verdicts)
        ),
        (
            "binding",
            f"{manifest.binding.constraint}, {1 - manifest.binding.used_share:.1%} "
            "room",
        ),
        (
            "measured",
            f"{measured.quiet_ms:.4g} ms ± {measured.standard_error_ratio:.1%} in the "
            "quiet state" + (f" ({', '.join(notes)})" if notes else ""),
        ),
        ("", _percentiles(bundle)),
        (
            "predicted",
            f"{manifest.predicted.ms:.4g} ms "
            f"({manifest.predicted.low_ms:.4g}–{manifest.predicted.high_ms:.4g})",
        ),
        (
            "accuracy",
            f"{accuracy.value:.2%} {accuracy.kind} "
            f"({accuracy.low:.2%}–{accuracy.high:.2%}, {accuracy.image_count} images)",
        ),
        (
            "parity",
            f"error {manifest.parity.max_relative_error:.1e}, the same top class on "
            f"{manifest.parity.top1_agreement:.0%} of "
            f"{manifest.parity.image_count} images",
        ),
        (
            "size",
            f"{manifest.cost.mac_count / 1e6:.1f} M MACs, "
            f"{manifest.cost.parameter_count / 1e6:.2f} M parameters, input "
            f"{manifest.resolution}×{manifest.resolution}",
        ),
        (
            "device",
            f"{manifest.device.cpu_model}, {manifest.runtime.backend} "
            f"{manifest.runtime.version}, {manifest.runtime.threads} thread(s)",
        ),
    ]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, text)
    console.print(table)


def _verdict(verdict: Verdict) -> str:
    found, limit = verdict.told(verdict.bound), verdict.told(verdict.limit)
    if verdict.constraint == "accuracy":
        return f"accuracy {found} ({verdict.evidence}), at least {limit} was asked for"
    return f"{verdict.constraint} up to {found}, at most {limit} was asked for"


def _percentiles(bundle: Bundle) -> str:
    measured = bundle.manifest.measured
    parts = [f"median {measured.median_ms:.4g}"]
    if measured.p90_ms is not None:
        parts.append(f"p90 {measured.p90_ms:.4g}")
    if measured.p95_ms is not None:
        parts.append(f"p95 {measured.p95_ms:.4g}")
    if measured.p99_ms is not None:
        parts.append(f"p99 {measured.p99_ms:.4g}")
    return (
        f"{', '.join(parts)} ms over {measured.sample_count} runs in "
        f"{measured.process_count} fresh processes"
    )


def show_bundle_json(bundle: Bundle) -> None:
    """The manifest and the path, on standard output."""
    content = json.loads(bundle.manifest.to_json())
    content["path"] = str(bundle.path)
    print(json.dumps(content, indent=2, sort_keys=True))


def show_range(console: Console, reachable: ReachableRange) -> None:
    """What a space reaches on this machine."""
    console.print(
        f"reachable here: {reachable.fastest_ms:.4g} ms (fastest)  "
        f"{reachable.median_ms:.4g} ms (median)  "
        f"{reachable.slowest_ms:.4g} ms (slowest)"
    )


def show_feasibility(console: Console, rows: Sequence[CostRange]) -> None:
    """What can be reached of each thing, and whether what is asked for can be."""
    table = Table("predicted", "best", "median", "worst", "asked for", "", box=None)
    for row in rows:
        shown = [
            in_words(row.constraint, value)
            for value in (row.best, row.median, row.worst)
        ]
        asked = "" if row.limit is None else in_words(row.constraint, row.limit)
        told = (
            ""
            if row.limit is None
            else "possible"
            if row.satisfiable
            else "not predicted"
        )
        table.add_row(row.constraint, *shown, asked, told)
    console.print(table)


def show_frontier(console: Console, networks: Sequence[FrontNetwork]) -> None:
    """Some networks of a front, evenly spread over its latencies."""
    fast = [n for n in networks if n.on_latency_front]
    count = min(SHOWN_NETWORKS, len(fast))
    places = [round(i * (len(fast) - 1) / max(1, count - 1)) for i in range(count)]
    table = Table("latency, ms", "accuracy", "weights, MB", "network", box=None)
    for place in places:
        network = fast[place]
        table.add_row(
            f"{network.latency_ms:.4g}",
            f"{network.accuracy:.2%}",
            f"{network.weight_bytes / MEGABYTE:.3g}",
            network.config_id,
        )
    console.print(table)
    console.print(
        f"{count} of {len(fast)} networks that none is both faster and more accurate "
        f"than; {len(networks)} with size as well. All by prediction"
    )


def show_fleet(console: Console, fleet: Fleet) -> None:
    """Who runs what, and what sharing costs."""
    table = Table(
        *("device", "budget, ms", "measured, ms", "model", "accuracy", "alone"),
        box=None,
    )
    for member in fleet.members:
        table.add_row(
            member.device,
            f"{member.latency_ms:.4g}",
            f"{member.measured_ms:.4g}",
            f"{member.model_number}: {member.config_id}",
            f"{member.accuracy:.2%}",
            f"{member.accuracy_alone:.2%}",
        )
    console.print(table)
    console.print(
        f"{fleet.model_count} networks for {len(fleet.members)} devices, in "
        f"{fleet.path}; *alone* is predicted of the network that a device would get "
        "for itself"
    )


def show_table(
    console: Console,
    table: LatencyTable,
    predictor: LatencyPredictor,
    *,
    minutes: float,
) -> None:
    """A latency table in short, and the minutes that the command took."""
    measurements = [*table.blocks.values(), *table.networks.values()]
    unstable = [m.name for m in measurements if m.stability.verdict == "unstable"]
    console.print(
        f"{len(table.blocks)} blocks and {len(table.networks)} networks of "
        f"{table.space_name} on {table.device.cpu_model} with "
        f"{table.runtime.backend} {table.runtime.version}, measured {table.created_at}"
    )
    console.print(
        f"predictor error on networks it had not seen: {predictor.residual_ratio:.1%}; "
        f"{len(unstable)} of {len(measurements)} measurements are not stable"
    )
    drift = table.drift
    console.print(
        f"drift: {drift.flagged_count} of {drift.window_count} windows by more than "
        f"2 %, {drift.largest_ratio:.1%} at most; taken out of the latencies, and "
        f"{drift.discarded_count} windows beyond 5 % do not count"
    )
    share = promotion(predictor.space, predictor.slot_ms).dominated_share
    console.print(
        f"{share:.0%} of the widths cost no less than a wider one: only a limit on "
        "size makes them worth having"
    )
    console.print(f"this command took {minutes:.1f} minutes")
    for name, reason in table.failures.items():
        console.print(f"could not be measured: {name}: {reason}")
    if table.conditions_after.shared_host:
        console.print("shared host: the figures are indicative")


def show_level(console: Console, change: LevelChange | None) -> None:
    """Say so where the machine is faster or slower than when it was measured last."""
    if change is None:
        return
    ratios = {"the anchor": change.anchor_ratio, "networks": change.network_ratio}
    off = {name: ratio - 1 for name, ratio in ratios.items() if ratio is not None}
    if all(abs(one) <= SAME_LEVEL_RATIO for one in off.values()):
        return
    told = ", ".join(f"{name} {one:+.1%}" for name, one in off.items())
    console.print(
        f"times against the table of {change.since}: {told}. The machine itself has "
        "changed its speed. These latencies speak of how it is now; if it is often "
        "faster, measure again then"
    )


def show_quality(console: Console, quality: HeldOutQuality) -> None:
    """A predictor's errors on networks measured for this, beside the noise floor."""
    table = Table("", "RMSPE", "±5 %", "±10 %", "Kendall tau", box=None)
    told = {
        "predicted against measured": quality.predicted,
        "measured against measured again": quality.noise,
    }
    for name, found in told.items():
        table.add_row(
            name,
            f"{found.rmspe:.1%}",
            f"{found.within_5:.0%}",
            f"{found.within_10:.0%}",
            f"{found.kendall_tau:.3f}",
        )
    console.print(table)
    console.print(
        f"{quality.predicted.count} networks that the predictor had not seen: "
        f"{quality.coverage:.0%} of them in its 95 % interval, "
        f"{quality.below_upper:.0%} below its 95 % upper bound"
    )
    if quality.left_out:
        console.print(f"{quality.left_out} more could not be measured")


def show_table_json(
    table: LatencyTable,
    reachable: ReachableRange,
    quality: HeldOutQuality | None,
    change: LevelChange | None,
    *,
    minutes: float,
) -> None:
    """What is reachable and what is to be known of the table, on standard output."""
    measurements = [*table.blocks.values(), *table.networks.values()]
    content = {
        **asdict(reachable),
        "block_count": len(table.blocks),
        "network_count": len(table.networks),
        "minutes": minutes,
        "failures": dict(table.failures),
        "unstable": {
            m.name: list(m.stability.reasons)
            for m in measurements
            if m.stability.verdict == "unstable"
        },
        "drift": asdict(table.drift),
        "indicative": table.conditions_after.shared_host,
        "level_change": None if change is None else asdict(change),
        "held_out": None if quality is None else asdict(quality),
    }
    print(json.dumps(content, indent=2, sort_keys=True))


def show_operators(console: Console, facts: Sequence[OperatorFact]) -> None:
    """What each operator costs beside a 1x1 convolution."""
    table = Table("operator", "adds ms", "GMAC/s", "fused", "", box=None)
    for fact in facts:
        if fact.extra_ms is None or fact.error_ms is None:
            table.add_row(fact.name, "", "", "", f"does not run: {fact.problem}")
            continue
        rate = fact.giga_macs_per_s
        table.add_row(
            fact.name,
            f"{fact.extra_ms:.4f} ± {fact.error_ms:.4f}",
            "" if rate is None else f"{rate:.1f}",
            {True: "yes", False: "no", None: "not told"}[fact.fused],
            "; ".join(filter(None, ("slow" if fact.slow else "", fact.fallback))),
        )
    console.print(table)


def show_widths(
    console: Console, facts: Sequence[WidthFact], *, step: int | None
) -> None:
    """The staircase of widths, with a bar for each one's latency."""
    console.print(
        "no steps: every channel less saves time"
        if step is None
        else f"channels come in steps of {step}; widths in between cost as much"
    )
    slowest_ms = max(fact.quiet_ms for fact in facts)
    table = Table("channels", "ms", "", "", box=None)
    for fact in facts:
        table.add_row(
            str(fact.channels),
            f"{fact.quiet_ms:.4f}",
            "█" * round(WIDTH_BAR * fact.quiet_ms / slowest_ms),
            "" if fact.dominated_by is None else f"as dear as {fact.dominated_by}",
        )
    console.print(table)


def show_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """What this machine is, and what will spoil a measurement."""
    device = diagnosis.device
    console.print(
        f"{device.cpu_model} ({device.arch}), {diagnosis.core_count} usable cores, "
        f"{device.memory_mb / 1024:.0f} GiB, fingerprint {device.fingerprint}"
    )
    for backend in diagnosis.backends:
        state = backend.version or f"missing: {backend.problem}"
        console.print(f"  {backend.name}: {state}")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in diagnosis.findings:
        colour = colours[finding.severity]
        console.print(Text.assemble((finding.severity, colour), "  ", finding.text))
        if finding.cure:
            console.print(f"    {finding.cure}", style="dim")
