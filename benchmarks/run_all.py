"""Run every benchmark, one after the other, and say which bars were passed.

Of those that train in stages only the report is run, and only where what it reports on
is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from inputs import DATA_VARIABLE, add_data
from report import MISSED, ORDER, PASSED

FOLDER = Path(__file__).parent
# What the last training stages of a benchmark leave: without them there is no report.
LAST_TRAINED = {
    "branches": ["weights/pas-dense.safetensors"],
    "pas": ["weights/pas-milliseconds"],
    "legr": ["weights/legr-latency"],
    "autoprune": ["weights/vgg-filters.safetensors", "weights/vgg-weights.safetensors"],
    "tas": ["weights/tas-latency-2.safetensors"],
}


def main() -> int:
    """Run them; 0 if every script that ran did so to its end, and passed every bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER)
    args = parser.parse_args()
    environment = {**os.environ, DATA_VARIABLE: str(args.data.resolve())}
    summary: list[str] = []
    failed = False
    for name in ORDER:
        if name not in args.only:
            continue
        lasts = LAST_TRAINED.get(name, [])
        missing = [last for last in lasts if not (FOLDER / last).exists()]
        if missing:
            which = f"benchmarks/{missing[0]}"
            why = f"{which} is missing; `{name}.py --help` tells its stages"
            summary.append(f"{name}: left out, {why}")
            continue
        print(f"\n=== {name} ===\n", flush=True)
        start_s = time.perf_counter()
        code, bars = run(name, environment)
        seconds = time.perf_counter() - start_s
        failed = failed or code != 0 or any(line.startswith(MISSED) for line in bars)
        state = "ran" if code == 0 else f"FAILED with exit code {code}"
        summary += [f"{name}: {state}, {seconds:.0f} s", *(f"  {b}" for b in bars)]
    print("\n=== summary ===\n")
    print("\n".join(summary))
    return int(failed)


def run(name: str, environment: dict[str, str]) -> tuple[int, list[str]]:
    """Run one script, showing what it prints; its exit code and its bars."""
    bars = []
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if line.startswith((PASSED, MISSED)):
                bars.append(line.rstrip())
    return process.returncode, bars


if __name__ == "__main__":
    sys.exit(main())
