"""Commands on bundles: check, bench, assert-latency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from ofa_deploy.bundle import Bundle
from ofa_deploy.cli.progress import StageBar
from ofa_deploy.errors import DeviceError
from ofa_deploy.rebench import Rebench, rebench

FAILED = 1


def check(path: Path, *, console: Console, as_json: bool) -> None:
    """Check digests and outputs."""
    with Bundle.open(path) as opened:
        report = opened.check()
    if as_json:
        print(json.dumps(asdict(report), indent=2, sort_keys=True))
        return
    console.print(
        f"{path} is intact: every digest matches; outputs on this machine are "
        f"within {report.max_relative_error:.1e} of the reference, the same top "
        f"class on {report.top1_agreement:.0%} of {report.image_count} images"
    )


def bench(path: Path, *, console: Console, quiet: Console, as_json: bool) -> None:
    """Time a bundle again, and show it beside what its manifest says."""
    with Bundle.open(path) as bundle, StageBar(quiet if as_json else console) as bar:
        found = rebench(bundle, reporter=bar)
    if as_json:
        print(json.dumps(_as_json(bundle, found), indent=2, sort_keys=True))
        return
    then, now = bundle.manifest.measured, found.measurement
    table = Table("", "manifest", "now", "", box=None)
    for label, before, after in (
        ("quiet state, ms", then.quiet_ms, now.quiet_ms),
        ("median of all runs, ms", then.median_ms, now.median_ms),
        ("p90, ms", then.p90_ms, now.p90_ms),
        ("p95, ms", then.p95_ms, now.p95_ms),
        ("p99, ms", then.p99_ms, now.percentile_ms(99)),
        ("first inference, ms", then.first_inference_ms, now.first_inference_ms),
        ("load, ms", then.load_ms, now.load_ms),
        ("memory, MB", then.memory_mb, now.memory_mb),
    ):
        table.add_row(label, _figure(before), _figure(after), _change(before, after))
    console.print(table)
    _tell(console, found)


def assert_latency(
    path: Path,
    *,
    max_ms: float,
    percentile: int | None,
    console: Console,
    quiet: Console,
    as_json: bool,
) -> None:
    """Fail unless a bundle's model, timed now, keeps a latency.

    Raises:
        typer.Exit: With code 1 if it does not.
    """
    with Bundle.open(path) as bundle, StageBar(quiet if as_json else console) as bar:
        found = rebench(bundle, latency_ms=max_ms, percentile=percentile, reporter=bar)
    verdict = found.verdict
    met = verdict is not None and verdict.met
    if as_json:
        content = {**_as_json(bundle, found), "met": met}
        print(json.dumps(content, indent=2, sort_keys=True))
    else:
        _tell(console, found)
    if not met:
        raise typer.Exit(FAILED)


def budgets_by_device(texts: Sequence[str]) -> dict[str, float]:
    """What `device=ms` texts name.

    Raises:
        DeviceError: A text is not of that form, or a device is named twice.
    """
    budgets_ms: dict[str, float] = {}
    for text in texts:
        # The device may have an equals sign of its own: openvino-cpu?threads=2=0.5.
        device, _, budget = text.rpartition("=")
        try:
            latency_ms = float(budget)
        except ValueError:
            device = ""
        if not device:
            raise DeviceError(
                f"--device {text}: give a device and its budget in milliseconds, such "
                "as openvino-cpu=0.5"
            )
        if device in budgets_ms:
            raise DeviceError(f"--device {device} is given twice; name each once")
        budgets_ms[device] = latency_ms
    return budgets_ms


def _tell(console: Console, found: Rebench) -> None:
    for difference in found.elsewhere:
        console.print(f"the manifest's timing was taken elsewhere: {difference}")
    for reason in found.measurement.stability.reasons:
        console.print(f"not stable: {reason}")
    if found.measurement.indicative:
        console.print("shared host: the figures are indicative")
    if found.level_told:
        console.print(found.level_told)
    verdict = found.verdict
    if verdict is not None:
        console.print(
            f"{'kept' if verdict.met else 'NOT kept'}: up to {verdict.bound:.4g} ms, "
            f"its uncertainty included; at most {verdict.limit:.4g} ms is allowed"
        )


def _as_json(bundle: Bundle, found: Rebench) -> dict[str, object]:
    now = found.measurement
    return {
        "path": str(bundle.path),
        "config_id": bundle.manifest.config_id,
        "then": asdict(bundle.manifest.measured),
        "now": {
            "quiet_ms": now.quiet_ms,
            "anchor_model_ms": now.anchor_model_ms,
            "anchor_found_ms": now.anchor_found_ms,
            "standard_error_ratio": now.standard_error_ratio,
            "median_ms": now.median_ms,
            "p90_ms": now.p90_ms,
            "p95_ms": now.p95_ms,
            "p99_ms": now.percentile_ms(99),
            "first_inference_ms": now.first_inference_ms,
            "load_ms": now.load_ms,
            "memory_mb": now.memory_mb,
            "process_count": now.process_count,
            "sample_count": len(now.samples_ns),
            "conditions": asdict(now.conditions),
            "indicative": now.indicative,
            "instability": list(now.stability.reasons),
        },
        "elsewhere": list(found.elsewhere),
        "verdict": None if found.verdict is None else asdict(found.verdict),
    }


def _figure(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or not before:
        return ""
    return f"{after / before - 1:+.1%}"
