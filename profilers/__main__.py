"""Command line of the device's side: `python -m profilers {measure,work,doctor}`.

`measure` is what `profilers.fresh` starts; it writes one line of JSON to stdout. `work`
is what `profilers.execute` starts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from profilers.backends import get_backend
from profilers.backends.base import random_inputs
from profilers.codec import decode_settings
from profilers.doctor import examine
from profilers.errors import DeployError
from profilers.fresh import ProcessReport
from profilers.json_reader import parse_json
from profilers.measure import ModelUnderTest, measure_models
from profilers.worker import work

__all__ = ["main"]

EXIT_REFUSED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(prog="profilers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="time one model, report as JSON")
    measure.add_argument("model", type=Path)
    measure.add_argument("--backend", required=True)
    measure.add_argument("--threads", type=int, required=True)
    measure.add_argument("--settings", required=True, help="MeasureSettings as JSON")
    commands.add_parser("work", help="do the assignment on stdin; for execute()")
    commands.add_parser("doctor", help="say what disturbs measuring on this device")
    parsed = parser.parse_args(arguments)
    if parsed.command == "work":
        return work()
    try:
        if parsed.command == "doctor":
            return _doctor()
        report = _measure(
            parsed.model,
            backend_name=parsed.backend,
            threads=parsed.threads,
            settings_text=parsed.settings,
        )
    except DeployError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(report.to_json())
    return 0


def _measure(
    model: Path, *, backend_name: str, threads: int, settings_text: str
) -> ProcessReport:
    settings = decode_settings(parse_json(settings_text))
    rng = np.random.default_rng(settings.seed)
    backend = get_backend(backend_name)
    # The runtime's own start-up is the process's cost, not the model's.
    backend.runtime(threads=threads)
    start_ns = time.perf_counter_ns()
    with backend.load(model, threads=threads) as session:
        loaded_ns = time.perf_counter_ns()
        inputs = random_inputs(session, rng)
        first_ns = time.perf_counter_ns()
        session.run(inputs)
        done_ns = time.perf_counter_ns()
    run = measure_models(
        [ModelUnderTest(name=model.name, model=model)],
        backend=backend,
        threads=threads,
        settings=settings,
        rng=rng,
    )
    return ProcessReport(
        load_ms=max(1, loaded_ns - start_ns) / 1e6,
        first_inference_ms=max(1, done_ns - first_ns) / 1e6,
        run=run,
    )


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
    sys.exit(main())
