"""Whether two full profiles, an hour apart, find the same latencies."""

from __future__ import annotations

import argparse
import datetime
import time

import numpy as np
from inputs import add_supernet, add_work, console, new_parser
from numpy.typing import NDArray
from report import Section
from rich.progress import track

from ofa_deploy.cli.progress import StageBar
from ofa_deploy.profiling import profile_space
from ofa_deploy.space import SearchSpace
from ofa_deploy.zoo import open_supernet
from profilers.backends import get_backend
from profilers.measurement import Measurement, MeasureSettings
from profilers.table import LatencyTable

SETTINGS = MeasureSettings.screen(seed=7)
APART_S = 3600
LEAST_WITHIN_3, LEAST_WITHIN_6 = 0.90, 0.99

Floats = NDArray[np.float64]


def main() -> None:
    """Profile, wait for the rest of the hour, profile again, publish."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    add_work(parser)
    parser.add_argument("--backend", default="openvino-cpu")
    args = parser.parse_args()
    section = Section("repeatability", "Repeatability", results=args.results)
    space = open_supernet(args.supernet).space
    first = profile(space, args, number=1)
    wait_until(made_at(first) + APART_S)
    second = profile(space, args, number=2)
    publish(section, args.backend, first, second)


def profile(
    space: SearchSpace, args: argparse.Namespace, *, number: int
) -> LatencyTable:
    """The table in the work folder, measured now if there is none."""
    path = args.work / f"repeatability-{args.backend}-{number}.json"
    if path.exists():
        return LatencyTable.load(path)
    args.work.mkdir(parents=True, exist_ok=True)
    with StageBar(console) as bar:
        bar.begin(f"profile {number}")
        table = profile_space(
            space,
            backend=get_backend(args.backend),
            threads=1,
            settings=SETTINGS,
            journal_path=path.with_suffix(".journal"),
            progress=bar.advance,
        )
    table.save(path)
    return table


def made_at(table: LatencyTable) -> float:
    """Seconds since the epoch."""
    return datetime.datetime.fromisoformat(table.created_at).timestamp()


def wait_until(end_s: float) -> None:
    """Wait with a bar, the machine left alone."""
    left = max(0, round(end_s - time.time()))
    for _ in track(range(left), "waiting", console=console, transient=True):
        time.sleep(1)


def publish(
    section: Section, backend: str, first: LatencyTable, second: LatencyTable
) -> None:
    """Differences of the quiet-state latencies, beside those of plain medians."""
    ones, others = entries(first), entries(second)
    names = sorted(ones.keys() & others.keys())
    # Another run, another quiet level of the anchor: brought to the first one's.
    shift = (first.anchor_reference_ns / second.anchor_reference_ns) ** second.beta
    quiet = differences(
        [ones[name].quiet_ms for name in names],
        [others[name].quiet_ms * shift for name in names],
    )
    plain = differences(
        [ones[name].median_ms for name in names],
        [others[name].median_ms for name in names],
    )
    apart_min = (made_at(second) - made_at(first)) / 60
    section.text(
        f"Two full profiles of `{first.space_name}` on {backend}, 1 thread, "
        f"{apart_min:.0f} minutes apart: {len(names)} blocks and networks, the quiet "
        f"level of the anchor {first.anchor_reference_ns / 1e6:.4f} and "
        f"{second.anchor_reference_ns / 1e6:.4f} ms."
    )
    section.table(
        ["latency", "within 3 %", "within 6 %", "median", "90th percentile", "largest"],
        [row("quiet state", quiet), row("plain median", plain)],
    )
    for limit, least in ((0.03, LEAST_WITHIN_3), (0.06, LEAST_WITHIN_6)):
        share = float((quiet <= limit).mean())
        section.bar(
            f"within {limit:.0%} for at least {least:.0%} of the entries: {share:.1%}",
            passed=share >= least,
        )
    section.publish()


def entries(table: LatencyTable) -> dict[str, Measurement]:
    """Blocks and networks by names that tell them apart."""
    blocks = {f"block {name}": entry for name, entry in table.blocks.items()}
    return {**blocks, **table.networks}


def differences(ones: list[float], others: list[float]) -> Floats:
    """Relative, without sign."""
    ratio: Floats = np.array(others) / np.array(ones)
    return np.abs(ratio - 1)


def row(label: str, found: Floats) -> list[str]:
    """A line of the table."""
    return [
        label,
        f"{(found <= 0.03).mean():.1%}",
        f"{(found <= 0.06).mean():.1%}",
        f"{np.median(found):.2%}",
        f"{np.quantile(found, 0.9):.2%}",
        f"{found.max():.2%}",
    ]


if __name__ == "__main__":
    main()
