"""Whether full profiles, an hour or more apart, find the same latencies."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from inputs import add_work, console, new_parser
from latency_predictor import BACKENDS, add_networks, table_of
from numpy.typing import NDArray
from report import Section
from rich.progress import track

from ofa_deploy.cli.progress import StageBar
from ofa_deploy.families import mbv3
from ofa_deploy.profiling import anchor_network, profile_space
from ofa_deploy.space import SearchSpace, SubnetConfig
from ofa_deploy.table_files import open_table
from profilers.backends import get_backend
from profilers.device import this_device
from profilers.measurement import Measurement
from profilers.summary import fit_visits
from profilers.table import LatencyTable

APART_S = 3600
LEAST_WITHIN_3, LEAST_WITHIN_6 = 0.90, 0.99

Floats = NDArray[np.float64]


def main() -> None:
    """Profile each runtime, and again after an hour or more each; publish."""
    parser = new_parser(__doc__)
    add_work(parser)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    add_networks(parser)
    parser.add_argument(
        "--profiles",
        type=int,
        default=2,
        help="of each runtime at least, the first among them",
    )
    args = parser.parse_args()
    section = Section(
        "repeatability",
        "Repeatability",
        results=args.results,
        packages=("ai-edge-litert",),
    )
    space = mbv3.imagenet(width=1.0)
    profiles = {
        backend: [table_of(space, backend, args)[0]] for backend in args.backends
    }
    for number in range(2, args.profiles + 1):
        for backend, tables in profiles.items():
            tables.append(again(space, backend, args, tables[0], number))
    for backend, tables in profiles.items():
        # Whatever else was made is shown, too: none is left out.
        while path_of(backend, args, tables[0], len(tables) + 1).exists():
            tables.append(again(space, backend, args, tables[0], len(tables) + 1))
    publish(section, space, list(profiles.values()))


def again(
    space: SearchSpace,
    backend_name: str,
    args: argparse.Namespace,
    first: LatencyTable,
    number: int,
) -> LatencyTable:
    """The same blocks and networks, an hour later at the earliest."""
    path = path_of(backend_name, args, first, number)
    backend = get_backend(backend_name)
    if path.exists():
        device = this_device(accelerator=backend.accelerator())
        return open_table(path, space, device, backend.runtime(threads=1))
    wait_until(first.created_s + APART_S)
    with StageBar(console) as bar:
        bar.begin(f"profiling {backend_name} again")
        table = profile_space(
            space,
            backend=backend,
            threads=1,
            settings=first.settings,
            journal_path=path.with_suffix(".journal"),
            networks=[SubnetConfig.from_id(name) for name in first.networks],
            progress=bar.advance,
        )
    table.save(path)
    return table


def path_of(
    backend_name: str, args: argparse.Namespace, first: LatencyTable, number: int
) -> Path:
    """Of a later profile; the first one's date is part of its name."""
    work: Path = args.work
    return work / f"again-{backend_name}-{first.created_s:.0f}-{number}.json"


def wait_until(end_s: float) -> None:
    """Wait with a bar, the machine left alone."""
    left = max(0, round(end_s - time.time()))
    for _ in track(range(left), "waiting", console=console, transient=True):
        time.sleep(1)


def publish(
    section: Section, space: SearchSpace, profiles: list[list[LatencyTable]]
) -> None:
    """Differences of the quiet-state latencies, beside those of plain medians."""
    anchor = anchor_network(space)
    section.text(
        f"Full profiles of `{space.name}`, 1 thread, each at least {APART_S // 60} "
        "minutes after the first, which it is compared with. *quiet state*: as the "
        "tables give it, each at its own run's quiet level; *at one level*: brought to "
        "the first one's level of the anchor model; *plain median*: of all runs. "
        "*noise floor*: every other visit of the first profile against the rest, "
        "fitted apart: the same minutes, with half of the visits."
    )
    section.table(
        ["runtime", "profile", "measured at", "anchor, ms", "anchor model, ms"],
        [
            [
                table.runtime.backend,
                f"{number}",
                table.created_at[:16],
                f"{table.anchor_reference_ns / 1e6:.4f}",
                f"{table.networks[anchor].quiet_ms:.4f}",
            ]
            for tables in profiles
            for number, table in enumerate(tables, start=1)
        ],
    )
    rows, bars = [], []
    for first, *later in profiles:
        backend = first.runtime.backend
        for kind in ("blocks", "networks"):
            ones: Mapping[str, Measurement] = getattr(first, kind)
            for number, table in enumerate(later, start=2):
                others: Mapping[str, Measurement] = getattr(table, kind)
                shift = (
                    first.networks[anchor].quiet_ms / table.networks[anchor].quiet_ms
                )
                for what, field, factor in (
                    ("quiet state", "quiet_ms", 1.0),
                    ("at one level", "quiet_ms", shift),
                    ("plain median", "median_ms", 1.0),
                ):
                    found = differences(ones, others, field=field, factor=factor)
                    rows.append(row([backend, kind, f"{number}", what], found))
                    if what == "quiet state":
                        bars.append((f"{backend}, {kind}, profile {number}", found))
            rows.append(row([backend, kind, "", "noise floor"], halves_apart(ones)))
    section.table(
        [
            *("runtime", "", "profile", "latency", "n"),
            *("≤ 3 %", "≤ 6 %", "median", "90 %", "largest"),
        ],
        rows,
    )
    for label, found in bars:
        share_3, share_6 = ((found <= limit).mean() for limit in (0.03, 0.06))
        section.bar(
            f"{label}: within 3 % {share_3:.1%} ({LEAST_WITHIN_3:.0%}), within 6 % "
            f"{share_6:.1%} ({LEAST_WITHIN_6:.0%})",
            passed=bool(share_3 >= LEAST_WITHIN_3 and share_6 >= LEAST_WITHIN_6),
        )
    section.publish()


def differences(
    ones: Mapping[str, Measurement],
    others: Mapping[str, Measurement],
    *,
    field: str,
    factor: float,
) -> Floats:
    """Relative, without sign, of what both hold."""
    names = sorted(ones.keys() & others.keys())
    first = np.array([getattr(ones[name], field) for name in names])
    second = np.array([getattr(others[name], field) for name in names])
    difference: Floats = np.abs(factor * second / first - 1)
    return difference


def halves_apart(ones: Mapping[str, Measurement]) -> Floats:
    """Relative differences, without sign, between a profile's odd and even visits."""
    odd, even = (
        fit_visits([entry.visits[start::2] for entry in ones.values()]).effect_log
        for start in (0, 1)
    )
    difference: Floats = np.abs(np.expm1(odd - even))
    return difference


def row(labels: list[str], found: Floats) -> list[str]:
    """A line of the table."""
    return [
        *labels,
        f"{len(found)}",
        f"{(found <= 0.03).mean():.1%}",
        f"{(found <= 0.06).mean():.1%}",
        f"{np.median(found):.2%}",
        f"{np.quantile(found, 0.9):.2%}",
        f"{found.max():.2%}",
    ]


if __name__ == "__main__":
    main()
