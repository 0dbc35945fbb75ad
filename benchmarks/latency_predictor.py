"""How well latencies of unseen networks of the ImageNet space are predicted."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from inputs import Journal, add_work, console, new_parser
from report import Section

from ofa_deploy.cli.progress import StageBar
from ofa_deploy.families import mbv3
from ofa_deploy.held_out import HeldOutQuality, evaluate_predictor
from ofa_deploy.predict.evaluation import PredictionQuality, judge
from ofa_deploy.predict.latency import (
    Calibration,
    LatencyPredictor,
    calibration,
    fit_latency_predictor,
)
from ofa_deploy.profiling import PROFILE_SETTINGS, profile_space
from ofa_deploy.space import SearchSpace
from ofa_deploy.table_files import find_table, table_name
from profilers.backends import get_backend
from profilers.device import this_device
from profilers.table import LatencyTable

SEED = 5
BACKENDS = ("openvino-cpu", "onnxruntime-cpu", "litert-cpu")
SETTINGS = replace(PROFILE_SETTINGS, seed=SEED)
# The networks that 5 draws were seen before weights could change with the resolution.
JUDGING = replace(PROFILE_SETTINGS, seed=6)
SPEED_SAMPLE = 1_000_000
LEAST = {"within_10": 0.99, "within_5": 0.90, "kendall_tau": 0.95}
MAX_RMSPE = 0.03
MAX_MINUTES = 15.0
LEAST_PER_S = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found on one runtime.

    Args:
        backend: Its name.
        quality: On networks held out.
        own: On the table's own random networks, each by a fit without it; None where
            there are too few.
        networks: Measured to fit the predictor.
        blocks: Measured for it.
        minutes: That took, all in all; NaN where it was interrupted.
        created_at: When the table was made.
    """

    backend: str
    quality: HeldOutQuality
    own: PredictionQuality | None
    networks: int
    blocks: int
    minutes: float
    created_at: str


def main() -> None:
    """Profile, measure held-out networks twice, publish."""
    parser = new_parser(__doc__)
    add_work(parser)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    add_networks(parser)
    args = parser.parse_args()
    section = Section(
        "latency_predictor",
        "Latency predictor",
        results=args.results,
        packages=("ai-edge-litert",),
    )
    space = mbv3.imagenet(width=1.0)
    rows = [examine(space, backend, args) for backend in args.backends]
    publish(section, space, rows, time_predictions(space, args))


def add_networks(parser: argparse.ArgumentParser) -> None:
    """Ask how many networks a table has, and by how many it is judged."""
    parser.add_argument("--networks", type=int, default=180, help="to fit with")
    parser.add_argument("--held-out", type=int, default=120, help="to judge by")


def examine(space: SearchSpace, backend_name: str, args: argparse.Namespace) -> Row:
    """Everything about one runtime."""
    table, minutes = table_of(space, backend_name, args)
    # Of this table: its date is part of the name.
    made = table.created_at.replace(":", "")
    with StageBar(console) as bar:
        quality = evaluate_predictor(
            space,
            table,
            count=args.held_out,
            settings=JUDGING,
            folder=folder_of(args) / f"held-out-{JUDGING.seed}-{backend_name}-{made}",
            reporter=bar,
        )
    return Row(
        backend=backend_name,
        quality=quality,
        own=judge_own(calibration(space, table)),
        networks=len(table.networks),
        blocks=len(table.blocks),
        minutes=minutes,
        created_at=table.created_at,
    )


def judge_own(known: Calibration) -> PredictionQuality | None:
    """A table's random networks against fits without them."""
    measured_ms = known.measured_ms[known.random]
    if len(measured_ms) < 2:
        return None
    return judge(measured_ms / known.left_out()[known.random], measured_ms)


def table_of(
    space: SearchSpace, backend_name: str, args: argparse.Namespace
) -> tuple[LatencyTable, float]:
    """The table in the work folder, measured now if there is none; and its minutes."""
    backend = get_backend(backend_name)
    runtime = backend.runtime(threads=1)
    rows = Journal(args.work / "latency_predictor.jsonl")
    device = this_device(accelerator=backend.accelerator())
    folder = folder_of(args)
    found = find_table(space, device, runtime, folders=(folder,))
    name = table_name(space, device, runtime)
    key = {"table": name, "networks": args.networks}
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        journal_path = folder / f"{name}.journal"
        resumed = journal_path.exists()
        start_s = time.monotonic()
        with StageBar(console) as bar:
            bar.begin(f"profiling {backend_name}")
            table = profile_space(
                space,
                backend=backend,
                threads=1,
                settings=SETTINGS,
                journal_path=journal_path,
                network_count=args.networks,
                progress=bar.advance,
            )
        # Of a run that was interrupted, only its last part is known.
        minutes = None if resumed else (time.monotonic() - start_s) / 60
        rows.add({**key, "minutes": minutes})
        table.save(folder / name)
        found = table, folder / name
    told = [row["minutes"] for row in rows.rows if key.items() <= row.items()]
    return found[0], float("nan" if not told or told[-1] is None else told[-1])


def folder_of(args: argparse.Namespace) -> Path:
    """Of the files that belong to this number of networks."""
    work: Path = args.work
    return work / f"{args.networks}-networks-{args.held_out}-held-out"


def time_predictions(space: SearchSpace, args: argparse.Namespace) -> float:
    """Networks predicted per second, in one call."""
    table, _ = table_of(space, args.backends[0], args)
    predictor: LatencyPredictor = fit_latency_predictor(space, table)
    genomes = space.sample(SPEED_SAMPLE, np.random.default_rng(SEED))
    predictor.predict_ms(genomes[:1000])
    start_s = time.perf_counter()
    predictor.predict_ms(genomes)
    return SPEED_SAMPLE / (time.perf_counter() - start_s)


def publish(
    section: Section, space: SearchSpace, rows: list[Row], per_s: float
) -> None:
    """Lines of quality and of noise for each runtime, then the bars."""
    section.text(
        f"`{space.name}`, resolutions {space.resolutions[0]}–{space.resolutions[-1]}, "
        "1 thread, quiet-state latencies. *predicted*: networks that the predictor had "
        "not seen, against the mean of two measurements of each, brought to the level "
        "of the anchor that the table speaks of. *noise*: one of these against the "
        "other; a perfect predictor would show half of its RMSPE. *own*: the table's "
        "random networks, each by a fit without it, against one measurement. *off by*: "
        "with its sign, + where the predicted one (of *noise*, the first one) is "
        "slower; what *own* does not show of it is a difference between the runs."
    )
    section.table(
        [
            "runtime",
            "",
            "n",
            "RMSPE %",
            "±5 %",
            "±10 %",
            "Kendall tau",
            "fastest fifth off by %",
            "slowest fifth off by %",
            "in 95 % interval",
            "below 95 % bound",
            "networks, blocks measured",
            "minutes",
            "left out",
            "measured at",
        ],
        [line for row in rows for line in lines(row)],
    )
    for row in rows:
        quality = row.quality.predicted
        passed = quality.rmspe <= MAX_RMSPE and all(
            getattr(quality, field) >= least for field, least in LEAST.items()
        )
        section.bar(
            f"{row.backend}: within 10 % {quality.within_10:.1%} (99 %), within 5 % "
            f"{quality.within_5:.1%} (90 %), RMSPE {quality.rmspe:.1%} (3 %), tau "
            f"{quality.kendall_tau:.3f} (0.95)",
            passed=passed,
        )
        section.bar(
            f"{row.backend}: {row.networks} networks, {row.minutes:.1f} minutes from "
            f"nothing (300, {MAX_MINUTES:g})",
            passed=row.networks <= 300 and row.minutes <= MAX_MINUTES,
        )
    section.bar(
        f"{per_s / 1e6:.1f} million networks predicted per second on one core (1)",
        passed=per_s >= LEAST_PER_S,
    )
    section.publish()


def lines(row: Row) -> list[list[str]]:
    """The table rows of a runtime."""
    return [
        [
            row.backend if what == "predicted" else "",
            what,
            f"{quality.count}",
            f"{100 * quality.rmspe:.2f}",
            f"{quality.within_5:.1%}",
            f"{quality.within_10:.1%}",
            f"{quality.kendall_tau:.3f}",
            f"{100 * quality.fastest_off:+.1f}",
            f"{100 * quality.slowest_off:+.1f}",
            f"{row.quality.coverage:.1%}" if what == "predicted" else "",
            f"{row.quality.below_upper:.1%}" if what == "predicted" else "",
            f"{row.networks}, {row.blocks}" if what == "predicted" else "",
            f"{row.minutes:.1f}" if what == "predicted" else "",
            f"{row.quality.left_out}" if what == "predicted" else "",
            row.created_at[:16] if what == "predicted" else "",
        ]
        for what, quality in (
            ("predicted", row.quality.predicted),
            ("own", row.own),
            ("noise", row.quality.noise),
        )
        if quality is not None
    ]


if __name__ == "__main__":
    main()
