"""How long `make demo` takes from a clean clone, and how large its environment is."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from inputs import console, new_parser
from report import Section

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = ".venv-demo"
MAX_MINUTES = 4.0
MAX_MB = 700


def main() -> None:
    """Clone, run the demo as a new user would, publish."""
    args = new_parser(__doc__).parse_args()
    section = Section("demo_time", "Time of the demo", results=args.results)
    rows, slowest_s, largest_mb = [], 0.0, 0
    for start, cached in (
        ("profiling anew", False),
        ("the table in the package", True),
    ):
        with (
            tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name,
            console.status(f"make demo, {start}"),
        ):
            seconds, megabytes = run_demo(Path(name), with_tables=cached)
        rows.append([start, f"{seconds:.0f}", str(megabytes)])
        slowest_s, largest_mb = max(slowest_s, seconds), max(largest_mb, megabytes)
    section.text(
        "`make demo` in a new clone, with an empty cache of tables: environment, "
        "installation, latency table, bundle. Packages come from the index, or from "
        "pip's cache."
    )
    section.table(["latency table", "seconds", "environment, MB"], rows)
    section.bar(
        f"at most {MAX_MINUTES:g} minutes: {slowest_s / 60:.1f}",
        passed=slowest_s <= 60 * MAX_MINUTES,
    )
    section.bar(
        f"environment of at most {MAX_MB} MB: {largest_mb}",
        passed=largest_mb <= MAX_MB,
    )
    section.publish()


def run_demo(folder: Path, *, with_tables: bool) -> tuple[float, int]:
    """Seconds of the demo in a clone, and megabytes of its environment."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    if not with_tables:
        for table in (clone / "latency_tables").glob("*.json"):
            table.unlink()
    start_s = time.perf_counter()
    done = subprocess.run(
        ["make", "demo"],
        cwd=clone,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start_s
    if done.returncode:
        raise SystemExit(f"make demo failed:\n{done.stdout}\n{done.stderr}")
    return seconds, megabytes_of(clone / ENVIRONMENT)


def megabytes_of(folder: Path) -> int:
    """Of all files below, without counting links."""
    files = (file for file in folder.rglob("*") if not file.is_symlink())
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6)


if __name__ == "__main__":
    main()
