"""`ofa-deploy train`: the command around progressive shrinking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ofa_deploy.cli.progress import StageBar, load_with_progress
from ofa_deploy.errors import (
    DataError,
    MissingDependency,
    TrainingError,
)
from ofa_deploy.manifest import MAX_THREADS
from ofa_deploy.named_spaces import named_space
from ofa_deploy.work_folder import require_outside, working_alone
from profilers.backends import get_backend
from profilers.backends.base import Backend
from profilers.device import available_cores

if TYPE_CHECKING:
    from ofa_deploy.train.progressive import ProgressiveTraining, TrainingProgress


def train(
    *,
    data_path: Path,
    space_name: str,
    out: Path,
    resume: bool,
    skip_bad: bool,
    epochs_scale: float,
    batch_size: int | None,
    stop_after: str | None,
    threads: int | None,
    console: Console,
    as_json: bool,
) -> None:
    """Train a supernet, with a line per epoch and a bar for the rest.

    Args:
        data_path: Images; see `load_images`.
        space_name: One of `SPACE_NAMES`, or a JSON file.
        out: Folder of the run.
        resume: Continue the run that is there.
        skip_bad: Leave out images that are damaged.
        epochs_scale: Factor of every phase's epochs.
        batch_size: Images per step; None for the recipe's.
        stop_after: Name of the phase to stop after; None for the last.
        threads: Of the CPU; None for all that the process may use.
        console: For people; a quiet one if `as_json`.
        as_json: Print the epochs and the supernet's folder as lines of JSON.

    Raises:
        TrainingError: A number makes no sense, or the run cannot be continued.
        DataError: The images cannot be used.
    """
    # What is wrong is told before the images are read, which may take minutes.
    threads = available_cores() if threads is None else threads
    if not 1 <= threads <= MAX_THREADS:
        raise TrainingError(f"threads={threads} must be from 1 to {MAX_THREADS}")
    named_space(space_name)
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("PyTorch", extra="train") from error
    from dataclasses import replace

    from ofa_deploy.train.allocator import keep_freed_memory
    from ofa_deploy.train.precision import prefers_bf16
    from ofa_deploy.train.progressive import (
        SUPERNET_FOLDER,
        ProgressiveTraining,
        RunSettings,
    )
    from ofa_deploy.train.recipe import default_recipe

    recipe = default_recipe().scaled(epochs_scale)
    if batch_size is not None:
        recipe = replace(recipe, batch_size=batch_size)
    settings = RunSettings(folder=out, resume=resume, stop_after=stop_after)
    settings.require_startable(recipe)
    require_outside("out", out, data_path)
    torch.set_num_threads(threads)
    keep_freed_memory()
    data = load_with_progress(data_path, skip_bad=skip_bad, console=console)
    height, width = data.images.shape[1:3]
    if height != width:
        raise DataError(
            f"images are {width}×{height}; training needs square ones: crop them first"
        )
    with _writing(out), working_alone(out):
        training = ProgressiveTraining(
            space=named_space(space_name, class_count=len(data.class_names)),
            data=data,
            recipe=recipe,
            settings=settings,
            bf16=prefers_bf16(),
        )
        _run(training, console=console, as_json=as_json)
        console.print(f"trained in {training.elapsed_s / 60:.0f} min; results in {out}")
        if training.is_complete:
            _finish(training, out=out, threads=threads, console=console)
    if as_json:
        folder = str(out / SUPERNET_FOLDER) if training.is_complete else None
        print(json.dumps({"supernet": folder}))


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say where a disk was full, or closed, and how to go on."""
    try:
        yield
    except BrokenPipeError as error:
        raise TrainingError(
            "nobody reads any more what is printed, so the run was stopped; with "
            "--resume it goes on from its checkpoint"
        ) from error
    except OSError as error:
        raise TrainingError(
            f"the run cannot be written to {out}: {error}. Free space, and run this "
            "again; once there is a checkpoint, with --resume: it goes on from there"
        ) from error


def _run(training: ProgressiveTraining, *, console: Console, as_json: bool) -> None:
    with Progress(
        TextColumn("{task.fields[phase]}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
        disable=as_json,  # a bar would swallow what is printed on a terminal
    ) as bar:
        task = bar.add_task("train", phase="starting", detail="", total=None)

        def show(now: TrainingProgress) -> None:
            bar.update(
                task,
                completed=now.step,
                total=now.steps,
                phase=f"{now.phase} {now.epoch}/{now.epochs}",
                detail=(
                    f"loss {now.loss:.3f}  {now.images_per_s:.0f} images/s  "
                    f"ETA {now.eta_s / 60:.0f} min"
                ),
            )
            epoch, rest = divmod(now.step, training.steps_per_epoch)
            if epoch and not rest:
                console.print(_epoch_text(now, epoch))
                if as_json:
                    line = _epoch_json(now, epoch, elapsed_s=training.elapsed_s)
                    print(line, flush=True)

        training.run(show)


def _epoch_text(now: TrainingProgress, epoch: int) -> str:
    shown = "  ".join(f"{k} {v:.2%}" for k, v in now.accuracies.items())
    return (
        f"{now.phase} {epoch}/{now.epochs}  loss {now.loss:.3f}  validation {shown}  "
        f"{now.images_per_s:.0f} images/s  ETA {now.eta_s / 60:.0f} min"
    )


def _epoch_json(now: TrainingProgress, epoch: int, *, elapsed_s: float) -> str:
    """The keys are those of the run's own log."""
    content = {
        "phase": now.phase,
        "epoch": epoch,
        "loss": now.loss,
        "validation": now.accuracies,
        "elapsed_s": elapsed_s,
    }
    return json.dumps(content, sort_keys=True)


def _finish(
    training: ProgressiveTraining, *, out: Path, threads: int, console: Console
) -> None:
    """Make what specialising needs besides the weights."""
    from ofa_deploy.train.finish import finish_supernet
    from ofa_deploy.train.precision import prefers_bf16
    from ofa_deploy.train.progressive import SUPERNET_FOLDER

    with StageBar(console) as bar:
        finish_supernet(
            out,
            training=training.images.training,
            validation=training.images.validation,
            backend=_installed_backend(),
            threads=threads,
            seed=training.recipe.seed,
            bf16=prefers_bf16(),
            progress=bar.advance_stage,
        )
    console.print(f"the supernet is complete: {out / SUPERNET_FOLDER}")


def _installed_backend() -> Backend:
    """OpenVINO where it is installed, since it is faster; else ONNX Runtime."""
    for name in ("openvino-cpu", "onnxruntime-cpu"):
        backend = get_backend(name)
        try:
            backend.runtime(threads=1)
        except MissingDependency:
            continue
        return backend
    raise MissingDependency("ONNX Runtime", extra="openvino")
