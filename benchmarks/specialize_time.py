"""How long it takes from a command to a verified bundle, in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inputs import add_supernet, console, new_parser
from report import Section
from rich.progress import track

REPEATS = 3
MAX_FIRST_S = 120.0
MAX_NEXT_S = 30.0
MAX_REFUSAL_S = 10.0

# Profiles even where a table of this machine comes with the package.
FIRST = """
import json, sys
from ofa_deploy import Specializer
supernet, out = sys.argv[1:]
session = Specializer("openvino-cpu", supernet=supernet, reprofile=True)
budget_ms = session.reachable().middle_ms
bundle = session.specialize(budget_ms, out=out)
print(json.dumps([budget_ms, bundle.manifest.config_id]))
"""
# A budget that no network is predicted to meet; and one that can be met by a table that
# promises half of what it measured, so that files must be timed to refuse it.
REFUSALS = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from ofa_deploy import InfeasibleBudget, Specializer
supernet, folder = sys.argv[1:]
session = Specializer("openvino-cpu", supernet=supernet, on_drift="accept")
table, fastest_ms = session.table, session.reachable().fastest_ms
halves = {
    kind: {
        name: replace(entry, quiet_ms=entry.quiet_ms / 2)
        for name, entry in getattr(table, kind).items()
    }
    for kind in ("blocks", "networks")
}
path = Path(folder) / "halves.json"
replace(table, **halves).save(path)
wrong = Specializer("openvino-cpu", supernet=supernet, table=path, on_drift="accept")
seconds = []
for refusing, budget_ms in ((session, fastest_ms / 2), (wrong, fastest_ms * 0.75)):
    start_s = time.perf_counter()
    try:
        refusing.specialize(budget_ms, out=Path(folder) / "refused")
    except InfeasibleBudget:
        seconds.append(time.perf_counter() - start_s)
    else:
        raise SystemExit(f"{budget_ms} ms were met")
print(json.dumps(seconds))
"""
COMMAND_LINE = "from ofa_deploy.cli import main; main()"


def main() -> None:
    """Time a first call and some later ones."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    args = parser.parse_args()
    section = Section("specialize_time", "Time to a bundle", results=args.results)
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name:
        folder = Path(name)
        # The user's own tables are neither read nor replaced.
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        with console.status("no table yet: profiling and specialising"):
            out = str(folder / "first")
            first_s, answer = timed([FIRST, args.supernet, out], environment)
        budget_ms, config_id = json.loads(answer)
        next_s = []
        for repeat in track(
            range(REPEATS), "with the table", console=console, transient=True
        ):
            options = ["--supernet", args.supernet, "--latency-ms", str(budget_ms)]
            out = str(folder / f"next-{repeat}")
            # How long a call takes is asked, wherever this host has drifted to by now.
            options += ["--accept-drift", "--out", out]
            words = [COMMAND_LINE, "specialize", *options]
            next_s.append(timed(words, environment)[0])
        with console.status("budgets that cannot be met"):
            _, answer = timed([REFUSALS, args.supernet, name], environment)
        predicted_s, measured_s = json.loads(answer)
    median_s = statistics.median(next_s)
    section.text(
        "Wall time of a whole process, interpreter and imports included, for a budget "
        f"of {budget_ms:.4f} ms, the geometric middle of what is reachable "
        f"(`{config_id}` at first). Every process times its exported file in five "
        "further ones. Refusals are timed from the call on, with the table; the second "
        "is of a table whose latencies were halved, so that prediction says yes."
    )
    section.table(
        ["start", "seconds", "all runs"],
        [
            ["no table: profile, then specialise", f"{first_s:.1f}", f"{first_s:.1f}"],
            [
                f"table there: `ofa-deploy specialize`, median of {REPEATS}",
                f"{median_s:.1f}",
                ", ".join(f"{seconds:.1f}" for seconds in next_s),
            ],
            ["`InfeasibleBudget`, by prediction", f"{predicted_s:.1f}", ""],
            ["`InfeasibleBudget`, by timing exported files", f"{measured_s:.1f}", ""],
        ],
    )
    section.bar(
        f"without a table at most {MAX_FIRST_S:g} s: {first_s:.1f} s",
        passed=first_s <= MAX_FIRST_S,
    )
    section.bar(
        f"with one at most {MAX_NEXT_S:g} s: {median_s:.1f} s",
        passed=median_s <= MAX_NEXT_S,
    )
    refusal_s = max(predicted_s, measured_s)
    section.bar(
        f"a budget that cannot be met refused in at most {MAX_REFUSAL_S:g} s: "
        f"{refusal_s:.1f} s",
        passed=refusal_s <= MAX_REFUSAL_S,
    )
    section.publish()


def timed(words: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Seconds that `python -c words...` takes, and the last line it prints."""
    start_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start_s
    if done.returncode:
        raise SystemExit(f"the process failed:\n{done.stderr.strip()}")
    return seconds, (done.stdout.splitlines() or [""])[-1]


if __name__ == "__main__":
    main()
