"""Command line of the device's side: `python -m profilers COMMAND`.

`time`, `layers` and `doctor` are for people. `measure` is what `profilers.fresh`
starts; it writes one line of JSON to stdout, as `layers --json` does. `backend` is what
`profilers.doctor` starts, and `work` what `profilers.execute` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from profilers.backends import backend_names, get_backend
from profilers.backends.base import random_inputs
from profilers.codec import decode_settings, encode_flat, encode_visit
from profilers.device import read_conditions, this_device
from profilers.doctor import examine, start_backend
from profilers.errors import DeployError
from profilers.fresh import ProcessReport
from profilers.json_reader import Json, parse_json
from profilers.layers import LAYER_RUNS, encode_layers, profile_layers
from profilers.measure import ModelUnderTest, measure_models
from profilers.memory import MemoryGauge
from profilers.pace import Pace
from profilers.process import own_stdout
from profilers.timing import TIERS, Timing, time_models
from profilers.worker import work

__all__ = ["main"]

EXIT_REFUSED = 1
EXIT_INTERRUPTED = 130
SHOWN_PERCENTILES = (50, 90, 99)


def main(
    arguments: Sequence[str] | None = None,
    *,
    take_stdout: Callable[[], Callable[[str], None]] = lambda: print,
) -> int:
    """Run a command; return the exit code.

    Args:
        arguments: None takes the process's.
        take_stdout: Gives what reports to other processes are written with; called
            before a runtime is started.
    """
    parser = argparse.ArgumentParser(prog="profilers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="time one model, report as JSON")
    measure.add_argument("model", type=Path)
    measure.add_argument("--backend", required=True)
    measure.add_argument("--threads", type=_count, required=True)
    measure.add_argument("--settings", required=True, help="MeasureSettings as JSON")
    measure.add_argument(
        "--beside", type=Path, metavar="MODEL", help="anchor model to time with it"
    )
    measure.add_argument("--rate", type=_rate, metavar="HZ", help="runs per second")
    measure.add_argument(
        "--sustained",
        type=_sustained,
        default=0.0,
        metavar="SECONDS",
        help="load before the first timed run",
    )
    timing = commands.add_parser("time", help="time model files, show a table")
    timing.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    timing.add_argument("--backend", required=True, choices=backend_names())
    timing.add_argument("--threads", type=_count, default=1)
    timing.add_argument("--tier", choices=list(TIERS), default="confirm")
    timing.add_argument(
        "--limit",
        type=_seconds,
        metavar="SECONDS",
        help="after which a process that gives no sign of life is stopped; of the "
        "tier certify: any process",
    )
    timing.add_argument("--json", action="store_true", help="with the raw samples")
    layers = commands.add_parser("layers", help="time a model's layers, show a table")
    layers.add_argument("model", type=Path)
    layers.add_argument("--backend", required=True, choices=backend_names())
    layers.add_argument("--threads", type=_count, default=1)
    layers.add_argument("--runs", type=_count, default=LAYER_RUNS)
    layers.add_argument("--json", action="store_true")
    backend = commands.add_parser("backend", help="start a runtime, say its version")
    backend.add_argument("name", choices=backend_names())
    commands.add_parser("work", help="do the assignment on stdin; for execute()")
    commands.add_parser("doctor", help="say what disturbs measuring on this device")
    parsed = parser.parse_args(arguments)
    if parsed.command == "work":
        return work()
    try:
        if parsed.command == "doctor":
            return _doctor()
        if parsed.command == "backend":
            tell = take_stdout()
            tell(json.dumps(dataclasses.asdict(start_backend(parsed.name))))
            return 0
        if parsed.command == "time":
            return _time(parsed)
        if parsed.command == "layers":
            return _layers(parsed, take_stdout() if parsed.json else print)
        tell = take_stdout()
        report = _measure(
            parsed.model,
            backend_name=parsed.backend,
            threads=parsed.threads,
            settings_text=parsed.settings,
            beside=parsed.beside,
            pace=Pace(rate_hz=parsed.rate, sustained_s=parsed.sustained),
        )
    except (DeployError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    tell(report.to_json())
    return 0


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; give a whole number from 1 on")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise argparse.ArgumentTypeError(f"{text!r}; give a number of seconds above 0")
    return seconds


def _rate(text: str) -> float:
    return _paced(text, "rate_hz")


def _sustained(text: str) -> float:
    return _paced(text, "sustained_s")


def _paced(text: str, field: str) -> float:
    try:
        value = float(text)
        Pace(**{field: value})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return value


def _measure(
    model: Path,
    *,
    backend_name: str,
    threads: int,
    settings_text: str,
    beside: Path | None,
    pace: Pace,
) -> ProcessReport:
    settings = decode_settings(parse_json(settings_text))
    rng = np.random.default_rng(settings.seed)
    backend = get_backend(backend_name)
    # The runtime's own start-up is the process's cost, not the model's.
    backend.runtime(threads=threads)
    gauge = MemoryGauge()
    start_ns = time.perf_counter_ns()
    with backend.load(model, threads=threads) as session:
        loaded_ns = time.perf_counter_ns()
        inputs = random_inputs(session, rng)
        first_ns = time.perf_counter_ns()
        session.run(inputs)
        done_ns = time.perf_counter_ns()
        session.run(inputs)
        memory_mb = gauge.peak_growth_mb()
    models = [ModelUnderTest(name=model.name, model=model)]
    if beside is not None:
        models.append(ModelUnderTest(name=f"beside {model.name}", model=beside))
    run = measure_models(
        models,
        backend=backend,
        threads=threads,
        settings=settings,
        rng=rng,
        pace=pace,
    )
    return ProcessReport(
        load_ms=max(1, loaded_ns - start_ns) / 1e6,
        first_inference_ms=max(1, done_ns - first_ns) / 1e6,
        memory_mb=memory_mb,
        run=run,
    )


def _time(parsed: argparse.Namespace) -> int:
    timings = time_models(
        parsed.models,
        backend=parsed.backend,
        threads=parsed.threads,
        tier=parsed.tier,
        limit_s=parsed.limit,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if parsed.json:
        print(json.dumps(_report(parsed, timings), indent=2))
    else:
        _show_timings(timings)
    return EXIT_REFUSED if any(timing.problem for timing in timings) else 0


def _report(parsed: argparse.Namespace, timings: Sequence[Timing]) -> dict[str, Json]:
    conditions = read_conditions()
    runtime = get_backend(parsed.backend).runtime(threads=parsed.threads)
    return {
        "runtime": encode_flat(runtime),
        "device": encode_flat(this_device()),
        "conditions": encode_flat(conditions),
        "indicative": conditions.shared_host,
        "tier": parsed.tier,
        "models": [_as_json(timing) for timing in timings],
    }


def _as_json(timing: Timing) -> dict[str, Json]:
    stability = timing.stability
    return {
        "model": str(timing.model),
        "problem": timing.problem,
        "quiet_ms": timing.quiet_ms,
        "standard_error_ratio": timing.standard_error_ratio,
        "reasons": None if stability is None else list(stability.reasons),
        "visits": [encode_visit(visit) for visit in timing.visits],
    }


def _show_progress(done: int, planned: int) -> None:
    print(f"\r{done}/{planned} visits", end="", file=sys.stderr, flush=True)


def _show_timings(timings: Sequence[Timing]) -> None:
    width = max(len(str(timing.model)) for timing in timings)
    print(f"{'model':{width}}  quiet ms   error       p50       p90       p99  verdict")
    for timing in timings:
        name = f"{timing.model!s:{width}}"
        if timing.problem or timing.quiet_ms is None or timing.stability is None:
            print(f"{name}  not timed: {timing.problem}")
            continue
        percentiles = (timing.percentile_ms(p) for p in SHOWN_PERCENTILES)
        shown = "  ".join("       -" if v is None else f"{v:8.4f}" for v in percentiles)
        verdict = "; ".join((timing.stability.verdict, *timing.stability.reasons))
        error = f"{timing.standard_error_ratio or 0:6.1%}"
        print(f"{name}  {timing.quiet_ms:8.4f}  {error}  {shown}  {verdict}")
    if read_conditions().shared_host:
        print("shared host: the figures are indicative")


def _layers(parsed: argparse.Namespace, tell: Callable[[str], None]) -> int:
    layers = profile_layers(
        parsed.model,
        backend_name=parsed.backend,
        threads=parsed.threads,
        runs=parsed.runs,
    )
    if parsed.json:
        tell(encode_layers(layers))
        return 0
    total_ms = sum(layer.median_ms for layer in layers)
    width = max(len(layer.name) for layer in layers)
    print(f"{'layer':{width}}        ms  share  kind")
    for layer in layers:
        share = layer.median_ms / total_ms if total_ms else 0.0
        print(
            f"{layer.name:{width}}  {layer.median_ms:8.4f}  {share:5.1%}  {layer.kind}"
        )
    print("profiling costs time itself: compare layers with each other")
    return 0


def _doctor() -> int:
    diagnosis = examine()
    device = diagnosis.device
    print(f"{device.cpu_model}, {device.arch}, {device.core_count} cores")
    for status in diagnosis.backends:
        print(f"{status.name}: {status.version or status.problem}")
    for finding in diagnosis.findings:
        cure = f" -> {finding.cure}" if finding.cure else ""
        print(f"{finding.severity}: {finding.text}{cure}")
    return 0 if diagnosis.fit else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main(take_stdout=own_stdout))
