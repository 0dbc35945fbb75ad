"""What the benchmarks start from: options, images, supernet, networks, journals."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import RESULTS_FILE
from rich.console import Console

from ofa_deploy.cli.progress import StageBar, load_with_progress
from ofa_deploy.dataset import ImageSet, split_validation
from ofa_deploy.export.onnx import emit_network
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import materialise
from ofa_deploy.pipeline import DEFAULT_SUPERNET, Specializer
from ofa_deploy.plan import NetworkPlan, lower
from ofa_deploy.reporting import Silent
from ofa_deploy.space import SearchSpace
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.train.recipe import default_recipe
from profilers.measure import measure_models
from profilers.measurement import MeasurementRun, MeasureSettings, ModelUnderTest

DATA_VARIABLE = "OFA_DEPLOY_CIFAR10"
CALIBRATION_COUNT = 2_000
console = Console(stderr=True, highlight=False)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--results", type=Path, default=RESULTS_FILE, help="file to put the section in"
    )
    return parser


def add_supernet(parser: argparse.ArgumentParser) -> None:
    """Let another supernet be named than the one of the zoo."""
    parser.add_argument(
        "--supernet",
        default=DEFAULT_SUPERNET,
        help="name in the zoo, or folder of a trained supernet",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Ask for the folder of CIFAR-10."""
    known = os.environ.get(DATA_VARIABLE)
    parser.add_argument(
        "--data",
        type=Path,
        default=known,
        required=known is None,
        metavar="DIR",
        help=f"folder with train.zip and test.zip; default: ${DATA_VARIABLE}",
    )


def add_work(parser: argparse.ArgumentParser) -> None:
    """Ask for the folder of what makes a run resume."""
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/benchmarks"),
        metavar="DIR",
        help="folder of journals, from which an interrupted run resumes",
    )


def read_test_images(folder: Path) -> ImageSet:
    """The test split."""
    return load_with_progress(folder / "test.zip", skip_bad=False, console=console)


def read_training_images(folder: Path) -> ImageSet:
    """The training images without those that training validates on."""
    data = load_with_progress(folder / "train.zip", skip_bad=False, console=console)
    return split_validation(data, fraction=default_recipe().validation_fraction)[0]


def real_calibration(training: ImageSet, *, seed: int) -> NDArray[np.uint8]:
    """Training images for batch-norm statistics, `(n, H, W, 3)` uint8."""
    order = np.random.default_rng(seed).permutation(len(training))
    return training.images[order[:CALIBRATION_COUNT]]


def synthetic_calibration(supernet: StoredSupernet) -> NDArray[np.uint8]:
    """The images that come with the supernet, `(n, H, W, 3)` uint8."""
    if supernet.calibration is None:
        raise SystemExit("the supernet has no calibration images of its own")
    return supernet.calibration


def require_same_classes(supernet: StoredSupernet, data: ImageSet) -> None:
    """Refuse images whose labels mean something else."""
    if data.class_names != supernet.class_names:
        raise SystemExit(
            f"the images have classes {data.class_names}, the supernet "
            f"{supernet.class_names}"
        )


def random_plans(space: SearchSpace, *, count: int, seed: int) -> list[NetworkPlan]:
    """Different networks, each choice drawn uniformly."""
    drawn = space.sample(4 * count, np.random.default_rng(seed))
    configs = dict.fromkeys(space.decode(row) for row in drawn)
    return [lower(space, config) for config in list(configs)[:count]]


def fused_model(supernet: StoredSupernet, plan: NetworkPlan) -> bytes:
    """A network as ONNX, to be timed: its statistics are not recalibrated."""
    weights = fuse(materialise(supernet.weights, plan), plan)
    return emit_network(plan, weights, form="fused")


def open_session(device: str, supernet: str) -> Specializer:
    """A session with this machine's table, measured now if there is none yet."""
    with StageBar(console) as bar:
        session = Specializer(device, supernet=supernet, reporter=bar)
    session.reporter = Silent()
    return session


def time_models(
    session: Specializer,
    models: list[ModelUnderTest],
    *,
    settings: MeasureSettings,
) -> MeasurementRun:
    """One shuffled run, in the quiet state that the session's table speaks of."""
    with StageBar(console) as bar:
        bar.begin("timing")
        return measure_models(
            models,
            backend=session.backend,
            threads=session.target.threads,
            settings=settings,
            progress=bar.advance,
            rng=np.random.default_rng(settings.seed),
            beta=session.table.beta,
            anchor_reference_ns=session.table.anchor_reference_ns,
        )


class Journal:
    """Rows of JSON in a file, one a line, that survive a kill.

    Args:
        path: The file; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    continue  # the line that a kill cut off

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, in memory and in the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line that a kill cut off stays alone
                    file.write(b"\n")
            file.write((json.dumps(row) + "\n").encode())
        self.rows.append(row)
