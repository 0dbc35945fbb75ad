"""What calibrating on synthetic images costs, over random sub-networks."""

from __future__ import annotations

import argparse

import numpy as np
from inputs import (
    CALIBRATION_COUNT,
    Journal,
    add_data,
    add_supernet,
    add_work,
    console,
    new_parser,
    random_plans,
    read_test_images,
    read_training_images,
    real_calibration,
    require_same_classes,
    synthetic_calibration,
)
from numpy.typing import NDArray
from report import Section
from rich.progress import Progress

from ofa_deploy.evaluation import Evaluator
from ofa_deploy.plan import NetworkPlan
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.zoo import open_supernet
from profilers.backends import get_backend

SEED = 1
THREADS = 2
KINDS = ("real", "synthetic", "none")
MAX_GAP_POINTS = 0.5

Accuracies = dict[tuple[str, str], float]


def main() -> None:
    """Measure what the journal lacks, and publish."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    add_data(parser)
    add_work(parser)
    parser.add_argument("--count", type=int, default=24, help="sub-networks")
    args = parser.parse_args()
    section = Section("calibration", "Calibration images", results=args.results)
    supernet = open_supernet(args.supernet)
    plans = random_plans(supernet.space, count=args.count, seed=SEED)
    accuracies = measure(args, supernet, plans)
    publish(section, plans, accuracies)


def measure(
    args: argparse.Namespace, supernet: StoredSupernet, plans: list[NetworkPlan]
) -> Accuracies:
    """Accuracies by network and kind of statistics; the journal's are kept."""
    journal = Journal(args.work / "calibration.jsonl")
    found = {
        (row["id"], row["kind"]): float(row["accuracy"])
        for row in journal.rows
        if row["supernet"] == supernet.sha256
    }
    missing = [
        (kind, plan)
        for kind in KINDS
        for plan in plans
        if (plan.name, kind) not in found
    ]
    if not missing:
        return found
    data = read_test_images(args.data)
    require_same_classes(supernet, data)
    images: dict[str, NDArray[np.uint8] | None] = {
        "real": real_calibration(read_training_images(args.data), seed=SEED),
        "synthetic": synthetic_calibration(supernet),
        "none": None,
    }
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(missing))
        for kind in KINDS:
            # One kind after the other: an evaluator keeps its inputs in memory.
            evaluator = Evaluator(
                supernet,
                data=data,
                calibration=images[kind],
                backend=get_backend("openvino-cpu"),
                threads=THREADS,
            )
            for plan in (plan for wanted, plan in missing if wanted == kind):
                value = evaluator.accuracy(plan)
                key = {"id": plan.name, "kind": kind, "supernet": supernet.sha256}
                journal.add({**key, "accuracy": value})
                found[plan.name, kind] = value
                bar.advance(task)
    return found


def publish(section: Section, plans: list[NetworkPlan], accuracies: Accuracies) -> None:
    """Summary, then every network."""
    points = {
        kind: np.array([100 * accuracies[plan.name, kind] for plan in plans])
        for kind in KINDS
    }
    section.text(
        f"Test accuracy of {len(plans)} random sub-networks, in percent, with "
        f"batch-norm statistics from {CALIBRATION_COUNT:,} training images (*real*), "
        "from the images that come with the supernet (*synthetic*), or the shared ones "
        "of the training as they are (*none*). The gap is real minus the other."
    )
    gaps = {kind: points["real"] - points[kind] for kind in KINDS}
    section.table(
        ["statistics", "mean", "std", "mean gap", "std of gap", "largest gap"],
        [
            [
                kind,
                f"{points[kind].mean():.2f}",
                f"{points[kind].std():.2f}",
                f"{gaps[kind].mean():.2f}",
                f"{gaps[kind].std():.2f}",
                f"{gaps[kind].max():.2f}",
            ]
            for kind in KINDS
        ],
    )
    section.table(
        ["network", "MMACs", *KINDS, "gap to synthetic"],
        [
            [
                f"`{plan.name}`",
                f"{plan.mac_count / 1e6:.1f}",
                *(f"{points[kind][index]:.2f}" for kind in KINDS),
                f"{gaps['synthetic'][index]:.2f}",
            ]
            for index, plan in enumerate(plans)
        ],
    )
    gap = float(gaps["synthetic"].mean())
    section.bar(
        f"synthetic images cost at most {MAX_GAP_POINTS} points on average: {gap:.2f}",
        passed=gap <= MAX_GAP_POINTS,
    )
    section.publish()


if __name__ == "__main__":
    main()
