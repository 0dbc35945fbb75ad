"""Trainings that take hours: what they leave in the repository, and what they tell.

Weights are kept as float16, so that the next stage can start on another machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import add_data, add_work, console, new_parser, read_test_images
from numpy.typing import NDArray
from report import RESULTS_FILE
from safetensors import safe_open
from safetensors.numpy import load_file, save
from torch import Tensor, nn
from under_way import fetch, forget

from ofa_deploy.cli.progress import StageBar, load_with_progress
from ofa_deploy.dataset import ImageSet
from ofa_deploy.evaluation import top1_accuracy
from ofa_deploy.nn.onnx_module import write_module
from ofa_deploy.preprocess import Normalisation, prepare
from ofa_deploy.shrink.extract import extract_module
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.target import Target
from ofa_deploy.train.allocator import keep_freed_memory
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LOG_FILE, LoopProgress, TrainingLoop
from ofa_deploy.train.precision import prefers_bf16
from ofa_deploy.train.recipe import Phase, Recipe
from profilers.backends import get_backend
from profilers.files import write_atomically
from profilers.measure import measure_models
from profilers.measurement import MeasureSettings, ModelUnderTest

HERE = Path(__file__).parent
# A folder for what a try of all stages leaves, each of one epoch of a few images.
DRY_RUN = os.environ.get("OFA_DEPLOY_DRY_RUN")
LOGS, WEIGHTS = (Path(DRY_RUN or HERE) / name for name in ("logs", "weights"))
DRY_COUNT = 2_000
RESOLUTION = 32
SETTINGS = MeasureSettings.certify(seed=5)
# Of what teachers know. Five epochs of the plain network of `pas.py`, taught by class
# probabilities and labels alike: 90.1 % of the held-out images; at 2: 90.8; at 4: 90.6.
TEMPERATURE = 2.0
# Of a difference of accuracies: what is beyond is of the arithmetic, and would decide
# where a bar is met exactly.
DIGITS = 6
# Of the last minute, above which nothing is timed; what came before fades slowly.
MOST_LOAD, MOST_WAIT_S = 0.7, 600.0

Weights = dict[str, NDArray[np.float32]]


def one_cycle(
    name: str,
    *,
    epochs: int,
    peak_learning_rate: float,
    cutmix_share: float = 0.25,
    distortion: float = 0.0,
    temperature: float | None = None,
) -> Recipe:
    """A recipe of one phase; with a temperature, if it is to have a teacher."""
    if DRY_RUN:
        epochs = 1
    phase = Phase(
        name=name,
        epochs=epochs,
        warmup_epochs=min(2.0, epochs / 4),
        peak_learning_rate=peak_learning_rate,
        distill=False,
        cutmix_share=cutmix_share,
        distortion=distortion,
    )
    return Recipe(phases=(phase,), temperature=temperature)


def run_stage(
    doc: str | None,
    stages: Mapping[str, Callable[[argparse.Namespace], None]],
    *,
    seeds: Sequence[int] = (),
) -> None:
    """Run one stage, as the command line says; the last one if it says none.

    Args:
        doc: What the script says of itself.
        stages: By their names, in their order.
        seeds: With which the stages that train many networks train each.
    """
    parser = new_parser(doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_data(parser)
    add_work(parser)
    names = list(stages)
    parser.add_argument("stage", choices=names, nargs="?", default=names[-1])
    if seeds:
        parser.add_argument(
            "--seeds",
            type=int,
            nargs="+",
            choices=seeds,
            default=seeds,
            help="of stages that train many networks, these alone: two processes of a "
            "thread each (OMP_NUM_THREADS=1) take a fifth less than one of two",
        )
    args = parser.parse_args()
    if DRY_RUN:
        args.results, args.work = (
            Path(DRY_RUN) / name for name in (RESULTS_FILE.name, "work")
        )
        args.results.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RESULTS_FILE, args.results)
    fetch(args.work)
    keep_freed_memory()
    stages[args.stage](args)


def training_set(args: argparse.Namespace) -> ImageSet:
    """The training images, with those that validate."""
    path = args.data / "train.zip"
    return _few(load_with_progress(path, skip_bad=False, console=console))


def test_set(args: argparse.Namespace) -> ImageSet:
    """The images that only reports look at."""
    return _few(read_test_images(args.data))


def test_inputs(test: ImageSet, normalisation: Normalisation) -> NDArray[np.float32]:
    """Their images, as networks take them."""
    return prepare(test.images, resolution=RESOLUTION, normalisation=normalisation)


def _few(images: ImageSet) -> ImageSet:
    if not DRY_RUN:
        return images
    picked = np.random.default_rng(0).permutation(len(images))[:DRY_COUNT]
    return images.take(np.sort(picked))


def keep(
    name: str,
    arrays: Mapping[str, NDArray[Any]],
    logs: Mapping[str, Path],
    *,
    origin: str = "",
) -> None:
    """Put a result where it is committed; weights as float16.

    Args:
        name: Of the result.
        arrays: Of it.
        logs: Of its trainings, by what to add to the name.
        origin: What it came from, by which `is_kept` knows it.
    """
    for suffix, log in logs.items():
        keep_log(f"{name}{suffix}", log)
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    # Whatever the order in memory is: safetensors writes memory as it is.
    halves = {
        key: np.ascontiguousarray(
            array.astype(np.float16) if array.dtype == np.float32 else array
        )
        for key, array in arrays.items()
    }
    content = save(halves, metadata={"origin": origin})
    write_atomically(WEIGHTS / f"{name}.safetensors", content)


def keep_log(name: str, log: Path) -> None:
    """Put the log of a training that is finished where it is committed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log, LOGS / f"{name}.jsonl")
    forget(log.parent)


def kept(name: str) -> Weights:
    """A result's arrays, weights as float32."""
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run the stage that leaves it first")
    arrays: dict[str, Any] = load_file(path)
    return {
        key: array.astype(np.float32) if array.dtype == np.float16 else array
        for key, array in arrays.items()
    }


def keep_facts(name: str, content: Mapping[str, Any]) -> None:
    """Put what a stage found out where it is committed, as JSON."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_atomically(LOGS / f"{name}.json", text.encode())


def kept_facts(name: str) -> dict[str, Any]:
    """What `keep_facts` was given."""
    path = LOGS / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run the stage that leaves it first")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def arrays_of(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Parameters and statistics of a module."""
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def digest(arrays: Mapping[str, NDArray[Any]], *others: object) -> str:
    """Name of what a training starts from: another start is never continued.

    Args:
        arrays: Of a network.
        others: What else decides it, such as a recipe.
    """
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).tobytes())
    for other in others:
        found.update(repr(other).encode())
    return found.hexdigest()[:12]


def origin_of(network: nn.Module, recipe: Recipe, teacher: nn.Module | None) -> str:
    """Digest of all that decides a training."""
    taught_by = [] if teacher is None else sizes_of(teacher)
    return digest(arrays_of(network), recipe.sha256(0), taught_by)


def sizes_of(teacher: nn.Module) -> list[str]:
    """Of its arrays, in few digits: what is calibrated has others on other machines."""
    arrays = arrays_of(teacher).values()
    return [f"{np.abs(a).sum(dtype=np.float64):.3g}" for a in arrays]


def loaded(module: nn.Module, arrays: Mapping[str, NDArray[Any]]) -> nn.Module:
    """A module with arrays that `arrays_of` gave."""
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    module.load_state_dict(state)
    return module.eval()


def owned(module: nn.Module, images: TrainingImages) -> OwnNetwork:
    """A trained network, ready to be shrunk."""
    return OwnNetwork.of(
        module,
        resolution=RESOLUTION,
        normalisation=images.normalisation,
        class_names=images.training.class_names,
    )


def narrowed(own: OwnNetwork, arrays: Mapping[str, NDArray[Any]]) -> nn.Module:
    """What is left of a network: `kept.0`, … say which channels, the others what."""
    rest = dict(arrays)
    count = len(own.graph.groups)
    indices = [torch.from_numpy(rest.pop(f"kept.{k}")) for k in range(count)]
    return loaded(extract_module(own.module, own.graph, indices), rest)


def kept_counts(name: str, own: OwnNetwork) -> Tensor:
    """Channels of each group that a kept result has left of a network."""
    arrays = kept(name)
    counts = [len(arrays[f"kept.{k}"]) for k in range(len(own.graph.groups))]
    return torch.tensor(counts, dtype=torch.float64)


def is_kept(name: str, origin: str) -> bool:
    """Whether a result is there, that came from this."""
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, framework="numpy") as file:
        return bool((file.metadata() or {}).get("origin") == origin)


def trainings_of(prefix: str) -> list[list[str]]:
    """Name, epochs and minutes of all trainings whose logs begin so."""
    logs = {
        log.stem: [json.loads(line) for line in log.read_text().splitlines()]
        for log in sorted(LOGS.glob(f"{prefix}*.jsonl"))
    }
    for path in sorted(LOGS.glob(f"{prefix}*.json")):  # of bundles
        history = json.loads(path.read_text())
        for part in ("search", "finetune"):
            lines = history.get(part) or [None]
            if isinstance(lines[-1], dict) and "epoch" in lines[-1]:
                logs[f"{path.stem}-{part}"] = lines
    return [
        [
            name.removeprefix(prefix).replace("-", ", "),
            " + ".join(f"{last['epoch']}" for last in lasts),
            f"{sum(last['elapsed_s'] for last in lasts) / 60:.0f}",
        ]
        for name, lines in logs.items()
        if (lasts := last_lines(lines))
    ]


def last_lines(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each training in a log: one that misses a budget is followed by another."""
    following = [line["epoch"] for line in log[1:]] + [0]
    return [
        line
        for line, after in zip(log, following, strict=True)
        if after <= line["epoch"]
    ]


class Lines:
    """A line an epoch, besides the bar."""

    def __init__(self, bar: StageBar) -> None:
        self._bar = bar

    def __call__(self, stage: str, progress: LoopProgress) -> None:
        """See `finetuning.TrainingCallback`."""
        self._bar.advance_stage(stage, progress.step, progress.steps)
        done, rest = divmod(progress.step, progress.steps // progress.epochs)
        if rest or progress.accuracy is None:
            return
        print(
            f"{stage}: epoch {done} of {progress.epochs}, loss "
            f"{progress.loss:.3f}, validation {progress.accuracy:.4f}, "
            f"{progress.images_per_s:.0f} images/s, {progress.eta_s / 60:.0f} min left "
            f"{[count for count, _ in progress.kept.values()]} "
            + "; ".join(progress.remarks),
            flush=True,
        )


def train(
    network: nn.Module,
    stage: str,
    *,
    images: TrainingImages,
    recipe: Recipe,
    work: Path,
    teacher: nn.Module | None = None,
    bf16: bool | None = None,
) -> Path:
    """Train a network, or go on with it; returns the folder of its log.

    Args:
        network: Trained in place.
        stage: For people.
        images: To train on.
        recipe: How.
        work: Gets a folder for the run: another start, recipe or teacher has another.
        teacher: Whose knowledge is learned, too.
        bf16: Whether it computes in bfloat16; None where that is faster here.
    """
    folder = work / f"{stage}-{origin_of(network, recipe, teacher)}"
    loop = TrainingLoop(
        network,
        images=images.for_recipe(recipe),
        recipe=recipe,
        resolution=RESOLUTION,
        folder=folder,
        bf16=prefers_bf16() if bf16 is None else bf16,
        teacher=teacher,
    )
    with StageBar(console) as bar:
        lines = Lines(bar)
        loop.run(lambda progress: lines(stage, progress))
    return folder


def log_of(folder: Path) -> Path:
    """The log that a training left."""
    return folder / LOG_FILE


def onnx_of(module: nn.Module) -> bytes:
    """As it is deployed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = Target(backend="onnxruntime-cpu", threads=1)
        file = write_module(module, resolution=RESOLUTION, target=target, folder=folder)
        return (folder / file).read_bytes()


def accuracy_of(model: bytes, inputs: NDArray[np.float32], test: ImageSet) -> float:
    """Top-1 of an ONNX model, on ONNX Runtime."""
    with (
        StageBar(console) as bar,
        get_backend("onnxruntime-cpu").load(model, threads=2) as session,
    ):
        bar.begin("testing")
        return top1_accuracy(
            session, inputs, test.labels, batch_size=1, progress=bar.advance
        )


def wait_until_idle() -> None:
    """Until nothing else has run here for a minute."""
    end_s = time.monotonic() + MOST_WAIT_S
    while os.getloadavg()[0] > MOST_LOAD and not DRY_RUN:
        if time.monotonic() > end_s:
            raise SystemExit(f"the load is {os.getloadavg()[0]:.2f}; stop what runs")
        print(f"the load is {os.getloadavg()[0]:.2f}; waiting for {MOST_LOAD}")
        time.sleep(20)


def time_on(
    backend_name: str, models: Mapping[str, Path | bytes], *, threads: int = 1
) -> dict[str, float]:
    """Quiet-state milliseconds of models, timed against each other; alone here."""
    wait_until_idle()
    with StageBar(console) as bar:
        bar.begin(f"timing on {backend_name}")
        run = measure_models(
            [ModelUnderTest(name=name, model=model) for name, model in models.items()],
            backend=get_backend(backend_name),
            threads=threads,
            settings=SETTINGS,
            rng=np.random.default_rng(SETTINGS.seed),
            progress=bar.advance,
        )
    return {found.name: found.quiet_ms for found in run.measurements}
