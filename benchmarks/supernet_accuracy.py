"""CIFAR-10 test accuracy of the zoo supernet's largest and smallest network."""

from __future__ import annotations

from inputs import (
    CALIBRATION_COUNT,
    add_data,
    add_supernet,
    console,
    new_parser,
    read_test_images,
    read_training_images,
    real_calibration,
    require_same_classes,
    synthetic_calibration,
)
from report import Section
from rich.progress import track

from ofa_deploy.evaluation import Evaluator
from ofa_deploy.plan import lower
from ofa_deploy.zoo import open_supernet
from profilers.backends import get_backend

SEED = 0
THREADS = 2
LEAST = {"full": 0.91, "smallest": 0.84}


def main() -> None:
    """Measure six accuracies and publish them."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    add_data(parser)
    args = parser.parse_args()
    section = Section("supernet_accuracy", "Supernet accuracy", results=args.results)
    supernet = open_supernet(args.supernet)
    data = read_test_images(args.data)
    require_same_classes(supernet, data)
    space = supernet.space
    plans = {
        "full": lower(space, space.largest()),
        "smallest": lower(space, space.smallest()),
    }
    statistics = {
        "real": real_calibration(read_training_images(args.data), seed=SEED),
        "synthetic": synthetic_calibration(supernet),
        "shared": None,
    }
    accuracies: dict[tuple[str, str], float] = {}
    work = [(kind, name) for kind in statistics for name in plans]
    for kind, name in track(work, "evaluating", console=console, transient=True):
        # A new one each time: prepared inputs of several would fill the memory.
        evaluator = Evaluator(
            supernet,
            data=data,
            calibration=statistics[kind],
            backend=get_backend("openvino-cpu"),
            threads=THREADS,
        )
        accuracies[name, kind] = evaluator.accuracy(plans[name])
    rows = []
    for name, plan in plans.items():
        value = accuracies[name, "real"]
        margin = 1.96 * (value * (1 - value) / len(data)) ** 0.5
        rows.append(
            [
                f"{name} (`{plan.name}`)",
                f"{plan.mac_count / 1e6:.1f}",
                f"{plan.parameter_count / 1e6:.2f}",
                f"{value:.2%} ± {100 * margin:.2f}",
                f"{accuracies[name, 'synthetic']:.2%}",
                f"{accuracies[name, 'shared']:.2%}",
            ]
        )
    section.text(
        f"Top-1 on the {len(data):,} images of the test split, float32 on OpenVINO. "
        f"Batch-norm statistics from {CALIBRATION_COUNT:,} training images (*real*), "
        "from the images that come with the supernet (*synthetic*), or the shared ones "
        "of the training as they are (*none*)."
    )
    headers = ["network", "MMACs", "M parameters", "real", "synthetic", "none"]
    section.table(headers, rows)
    for name, least in LEAST.items():
        value = accuracies[name, "real"]
        section.bar(
            f"{name} network at least {least:.1%} (real): {value:.2%}",
            passed=value >= least,
        )
    section.publish()


if __name__ == "__main__":
    main()
