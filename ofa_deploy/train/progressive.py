"""Progressive shrinking: train the full network, then ever smaller parts of it.

A run is a folder. `checkpoint.safetensors` is its whole state; a run that is killed at
any moment continues from there to the same weights, step by step, as if it had not been
killed. `phase-NAME.safetensors` is what a phase ended with, rounded to float16: these
small files alone let another machine go on with the next phase, again to the same
weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import DeployError, TrainingError, few_of
from ofa_deploy.nn.supernet import Supernet, new_supernet, sort_channels
from ofa_deploy.plan import NetworkPlan, all_blocks, lower
from ofa_deploy.space import SearchSpace, SubnetConfig
from ofa_deploy.space_file import decode_space, encode_space, space_sha256
from ofa_deploy.stored import StoredSupernet, read_supernet, write_supernet
from ofa_deploy.train.checkpoint import (
    Checkpoint,
    Position,
    read_checkpoint,
    require_finite,
    write_checkpoint,
)
from ofa_deploy.train.distill import supernet_loss
from ofa_deploy.train.evaluate import (
    accuracy,
    apply_statistics,
    collect_statistics,
    recalibrate_supernet,
)
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.logits import logits_of
from ofa_deploy.train.optimizer import HybridOptimizer
from ofa_deploy.train.recipe import Phase, Recipe, learning_rate, restrict
from ofa_deploy.work_folder import LOCK_FILE
from profilers.files import remove_leftovers, write_atomically
from profilers.json_reader import read_json

CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE = "log.jsonl"
RECIPE_FILE = "recipe.json"
SPACE_FILE = "space.json"
SUPERNET_FOLDER = "supernet"
_MONITOR_CALIBRATION = 1_000
_MONITOR_VALIDATION = 2_500


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """What a progress bar shows.

    Args:
        phase: Name of the current phase.
        epoch: Of the phase, from 1.
        epochs: Of the phase.
        step: Steps done in the phase.
        steps: Of the phase.
        loss: Mean of the epoch so far, per sub-network.
        images_per_s: Training images per second, this sitting.
        eta_s: Until the end of the last phase.
        accuracies: Validation accuracy by network name, 0..1, after the last epoch.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_s: float
    eta_s: float
    accuracies: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How to run, without any effect on the result.

    Args:
        folder: Of the run.
        resume: Continue what is in the folder.
        checkpoint_seconds: Time between checkpoints.
        stop_after: Name of the phase after which to stop; None for the last.
    """

    folder: Path
    resume: bool = False
    checkpoint_seconds: float = 60.0
    stop_after: str | None = None

    def require_startable(self, recipe: Recipe) -> None:
        """Refuse what a run cannot start with.

        Raises:
            TrainingError: The folder is not empty, or there is no such phase.
        """
        names = [phase.name for phase in recipe.phases]
        if self.stop_after not in (None, *names):
            raise TrainingError(
                f"no phase {self.stop_after!r}; the recipe has {', '.join(names)}"
            )
        if self.resume:
            if not self.states(recipe):
                raise TrainingError(
                    f"{self.folder} holds no run to resume; start it without --resume, "
                    "in a new or empty folder"
                )
        elif self.folder.exists() and not self.folder.is_dir():
            raise TrainingError(f"{self.folder} is a file; name a folder for the run")
        elif self.folder.exists() and any(map(_is_of_a_run, self.folder.iterdir())):
            raise TrainingError(
                f"{self.folder} is not empty; pass --resume to continue the run in it, "
                "or name another folder"
            )

    def states(self, recipe: Recipe) -> list[Path]:
        """Files that the run can go on from, the latest first.

        Where only phases' results were copied, there is no checkpoint among them.
        """
        results = [self.phase_result(phase) for phase in reversed(recipe.phases)]
        return [p for p in (self.folder / CHECKPOINT_FILE, *results) if p.exists()]

    def phase_result(self, phase: Phase) -> Path:
        """The file of what a phase ended with."""
        return self.folder / f"phase-{phase.name}.safetensors"


class ProgressiveTraining:
    """A run: supernet, optimiser and position; `run` takes it to its end.

    Args:
        space: What to train.
        data: Training images; the recipe's share of them is held out.
        recipe: The schedule.
        settings: Where and how.
        bf16: Use bfloat16 autocast; worth it where the CPU has it.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        data: ImageSet,
        recipe: Recipe,
        settings: RunSettings,
        bf16: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if space.head.class_count != len(data.class_names):
            raise TrainingError(
                f"space {space.name} has {space.head.class_count} classes, the data "
                f"{len(data.class_names)}; write the data's number as head.class_count "
                "of the space's file"
            )
        all_blocks(space)  # or one that cannot be built would be met after many epochs
        settings.require_startable(recipe)
        self.space = space
        self.recipe = recipe
        self.settings = settings
        self.images = TrainingImages(data, recipe)
        self._bf16 = bf16
        self._clock = clock
        self._elapsed_before_s = 0.0
        self._started_s = clock()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.supernet = new_supernet(space)
        self._teachers: tuple[Supernet, ...] = ()
        self._phase_index = 0
        self._step = 0
        self._accuracies: dict[str, float] = {}
        self._optimizer = HybridOptimizer(self.supernet, self.recipe)
        self._open_folder()

    # -- state -----------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """Training time over all sittings."""
        return self._elapsed_before_s + self._clock() - self._started_s

    @property
    def is_complete(self) -> bool:
        """Whether the last phase is done."""
        return self._phase_index == len(self.recipe.phases)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass."""
        return self.images.batches_per_epoch

    def _open_folder(self) -> None:
        folder = self.settings.folder
        folder.mkdir(parents=True, exist_ok=True)
        for phase in self.recipe.phases:
            remove_leftovers(self.settings.phase_result(phase))
        remove_leftovers(folder / CHECKPOINT_FILE)
        if self.settings.resume:
            self._require_same_space()
            self._restore(self._latest_checkpoint())
            self._cut_log()
        else:
            self._enter_phase(0)  # first: with its checkpoint the run can be resumed
        for name, content in (
            (RECIPE_FILE, asdict(self.recipe)),
            (SPACE_FILE, encode_space(self.space)),
        ):
            if not (folder / name).exists():
                text = json.dumps(content, indent=2, sort_keys=True)
                write_atomically(folder / name, text.encode())

    def _latest_checkpoint(self) -> Checkpoint:
        latest, *earlier = self.settings.states(self.recipe)
        return read_checkpoint(
            latest,
            cure=f"delete it, and resume: the run goes on from {earlier[0].name}"
            if earlier
            else "start again in a new folder",
        )

    def _require_same_space(self) -> None:
        """Spaces of equal tensors may still differ, in strides or resolutions."""
        path = self.settings.folder / SPACE_FILE
        if path.exists():
            space = read_json(path, decode_space, otherwise="start a new folder")
            if space != self.space:
                raise TrainingError(
                    f"{self.settings.folder} holds a run of another space, "
                    f"{space.name}; resume with the same, or start a new folder"
                )

    def _told_changes(self) -> str:
        """What the recipe in the folder says otherwise, in words; empty if nothing."""
        path = self.settings.folder / RECIPE_FILE
        try:
            before = _by_name(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return ""  # the checkpoint alone decides
        now = _by_name(json.loads(json.dumps(asdict(self.recipe))))
        changed = [
            f"{name} {before.get(name)} → {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        return f" ({few_of(changed)})" if changed else ""

    def _restore(self, checkpoint: Checkpoint) -> None:
        position = checkpoint.position
        recipe_sha256 = self.recipe.sha256(position.phase)
        is_other = recipe_sha256 != position.recipe_sha256
        told = self._told_changes() if is_other else ""
        position.require(
            recipe_sha256=recipe_sha256,
            data_sha256=self.images.sha256,
            space_sha256=space_sha256(self.space),
            folder=self.settings.folder,
            cure=f"resume with the same{told}, or start a new folder",
        )
        try:
            self.supernet.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            raise TrainingError(
                f"{self.settings.folder} holds a run of another space: {error}. "
                "Continue with the same, or name another folder"
            ) from error
        self._phase_index, self._step = position.phase, position.step
        self._elapsed_before_s = position.elapsed_s
        self._optimizer = HybridOptimizer(self.supernet, self.recipe)
        self._optimizer.restore_momentum(checkpoint.momentum)
        self._teachers = self._load_teachers()

    def _position(self) -> Position:
        return Position(
            phase=self._phase_index,
            step=self._step,
            recipe_sha256=self.recipe.sha256(self._phase_index),
            data_sha256=self.images.sha256,
            elapsed_s=self.elapsed_s,
            space_sha256=space_sha256(self.space),
        )

    def _save(self) -> None:
        weights = self.supernet.state_dict()
        require_finite(weights, when=self._when)
        write_checkpoint(
            self.settings.folder / CHECKPOINT_FILE,
            Checkpoint(
                position=self._position(),
                weights=weights,
                momentum=self._optimizer.momentum(),
            ),
        )

    @property
    def _when(self) -> str:
        phase = self.recipe.phases[: self._phase_index + 1][-1]
        return f"after step {self._step} of phase {phase.name}"

    def _load_teachers(self) -> tuple[Supernet, ...]:
        """Of the current phase; once all are done, of the last."""
        if not self._phase_index:
            return ()
        named = self.recipe.phases[: self._phase_index + 1][-1].teachers
        return tuple(
            self._load_teacher(phase)
            for phase in self.recipe.phases
            if phase.name in (named or (self.recipe.phases[0].name,))
        )

    def _load_teacher(self, phase: Phase) -> Supernet:
        teacher = new_supernet(self.space)
        state = read_checkpoint(
            self.settings.phase_result(phase),
            cure="later phases learn from it: put an undamaged copy in its place, or "
            "start again in a new folder",
        )
        teacher.load_state_dict(state.weights)
        # Batch statistics, as published: they suit every resolution.
        return teacher.train()

    # -- phases ----------------------------------------------------------------

    def run(self, progress: Callable[[TrainingProgress], None] | None = None) -> None:
        """Train to the end, or to the end of `settings.stop_after`."""
        if self._stops():  # before this call
            return
        while self._phase_index < len(self.recipe.phases):
            phase = self.recipe.phases[self._phase_index]
            self._run_phase(phase, progress)
            self._write_phase_result(phase)
            self._enter_phase(self._phase_index + 1)
            if self._stops():
                return
        self._export()

    def _stops(self) -> bool:
        """Whether the phase is done after which to stop, and others are not."""
        done = [phase.name for phase in self.recipe.phases[: self._phase_index]]
        return self.settings.stop_after in done and not self.is_complete

    def _export(self) -> None:
        """Write the finished supernet as specialising reads it.

        One with the same weights is left as it is: more may have been added to it.
        """
        folder = self.settings.folder / SUPERNET_FOLDER
        tensors = self.supernet.state_dict()
        weights = {k: v.detach().float().numpy() for k, v in tensors.items()}
        if not _holds(folder, weights):
            write_supernet(
                folder,
                StoredSupernet(
                    space=self.space,
                    weights=weights,
                    normalisation=self.images.normalisation,
                    class_names=self.images.training.class_names,
                ),
            )

    def _enter_phase(self, index: int) -> None:
        """Do what happens once before a phase's first step, and save."""
        self._phase_index, self._step = index, 0
        self._teachers = self._load_teachers()
        self._optimizer = HybridOptimizer(self.supernet, self.recipe)
        if index < len(self.recipe.phases):
            phase = self.recipe.phases[index]
            if phase.sorted_expands is not None:
                sort_channels(self.supernet, supported_expands=phase.sorted_expands)
        self._save()

    def _write_phase_result(self, phase: Phase) -> None:
        weights = {k: v.detach().half() for k, v in self.supernet.state_dict().items()}
        require_finite(weights, when=f"{self._when}, in float16")
        # So that this run and one that starts from the file stay equal.
        self.supernet.load_state_dict(weights)
        result = Checkpoint(position=self._position(), weights=weights, momentum={})
        write_checkpoint(self.settings.phase_result(phase), result)

    def _run_phase(
        self, phase: Phase, progress: Callable[[TrainingProgress], None] | None
    ) -> None:
        steps = phase.epochs * self.steps_per_epoch
        saved_s = began_s = self._clock()
        began_step, loss_sum, loss_count = self._step, 0.0, 0
        for step in range(self._step, steps):
            loss_sum += self._train_step(phase, step)
            loss_count += 1
            self._step = step + 1
            now_s = self._clock()
            ends_epoch = self._step % self.steps_per_epoch == 0
            if ends_epoch:
                self._accuracies = self._monitor()
                self._log(phase, loss_sum / loss_count)
            if ends_epoch or now_s - saved_s >= self.settings.checkpoint_seconds:
                self._save()
                saved_s = now_s
            if progress and (ends_epoch or step % 10 == 0):
                rate = (self._step - began_step) / (self._clock() - began_s)
                progress(self._report(phase, loss_sum / loss_count, rate))
            if ends_epoch:
                loss_sum, loss_count = 0.0, 0

    def _report(
        self, phase: Phase, loss: float, steps_per_s: float
    ) -> TrainingProgress:
        steps = phase.epochs * self.steps_per_epoch
        weights = [_step_cost(p) for p in self.recipe.phases]
        current = weights[self._phase_index]
        remaining = (steps - self._step) + sum(
            later.epochs * self.steps_per_epoch * cost / current
            for later, cost in zip(
                self.recipe.phases[self._phase_index + 1 :],
                weights[self._phase_index + 1 :],
                strict=True,
            )
        )
        return TrainingProgress(
            phase=phase.name,
            epoch=min(self._step // self.steps_per_epoch + 1, phase.epochs),
            epochs=phase.epochs,
            step=self._step,
            steps=steps,
            loss=loss,
            images_per_s=steps_per_s * self.recipe.batch_size,
            eta_s=remaining / steps_per_s,
            accuracies=dict(self._accuracies),
        )

    # -- steps -----------------------------------------------------------------

    def _train_step(self, phase: Phase, step: int) -> float:
        """One optimiser step; returns the mean loss of its sub-networks."""
        rng = np.random.default_rng([self.recipe.seed, self._phase_index, step])
        space = restrict(self.space, phase)
        resolution = int(rng.choice(self.space.resolutions))
        inputs, targets = self.images.batch(
            self._phase_index, step, resolution=resolution, rng=rng
        )
        soft_targets = self._teach(inputs, resolution) if phase.distill else None
        rate = learning_rate(phase, step / self.steps_per_epoch)
        self._optimizer.set_learning_rate(rate)
        self._optimizer.zero_grad()
        total = 0.0
        for config in _sample(space, phase, rng):
            plan = lower(self.space, replace(config, resolution=resolution))
            loss = supernet_loss(
                self._logits(self.supernet, inputs, plan),
                targets,
                soft_targets=soft_targets,
                label_smoothing=self.recipe.label_smoothing,
                distillation_ratio=self.recipe.distillation_ratio,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self._optimizer.step()
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total} at step {step} of phase {phase.name}; start "
                "again with larger batches, or in Python with a recipe whose "
                "peak_learning_rate is lower"
            )
        return total / phase.subnet_count

    @torch.no_grad()
    def _teach(self, inputs: Tensor, resolution: int) -> Tensor:
        """Class probabilities `(n, classes)`, the mean of the teachers'."""
        config = replace(self.space.largest(), resolution=resolution)
        plan = lower(self.space, config)
        told = [self._logits(teacher, inputs, plan) for teacher in self._teachers]
        return torch.stack(told).softmax(2).mean(0)

    def _logits(self, network: Supernet, inputs: Tensor, plan: NetworkPlan) -> Tensor:
        network.train()
        return logits_of(network, inputs, plan, bf16=self._bf16)

    # -- monitoring ------------------------------------------------------------

    def _monitor(self) -> dict[str, float]:
        """Validation accuracy of the largest and the smallest network in training."""
        phase = self.recipe.phases[self._phase_index]
        space = restrict(self.space, phase)
        # In the full phase the space holds one network per resolution.
        configs = {"largest": space.largest(), "smallest": space.smallest()}
        shared = collect_statistics(self.supernet)
        result = {}
        for name, config in configs.items():
            plan = lower(self.space, config)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bf16):
                calibration = self.images.plain_batches(
                    self.images.training,
                    resolution=plan.resolution,
                    most=_MONITOR_CALIBRATION,
                )
                recalibrate_supernet(self.supernet, plan, (x for x, _ in calibration))
                validation = self.images.plain_batches(
                    self.images.validation,
                    resolution=plan.resolution,
                    most=_MONITOR_VALIDATION,
                )
                result[name] = accuracy(self.supernet, plan, validation)
        apply_statistics(self.supernet, shared)
        return result

    def _cut_log(self) -> None:
        """Leave out what the log says of epochs that will be trained again."""
        path = self.settings.folder / LOG_FILE
        if not path.exists():
            return
        places = {phase.name: place for place, phase in enumerate(self.recipe.phases)}
        here = (self._phase_index, self._step // self.steps_per_epoch)
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if (places[entry["phase"]], entry["epoch"]) <= here:
                    kept.append(f"{line}\n")
            except (ValueError, KeyError, TypeError):  # of a kill or a full disk
                continue
        write_atomically(path, "".join(kept).encode())

    def _log(self, phase: Phase, loss: float) -> None:
        line = {
            "phase": phase.name,
            "epoch": self._step // self.steps_per_epoch,
            "loss": round(loss, 4),
            "validation": {k: round(v, 4) for k, v in self._accuracies.items()},
            "elapsed_s": round(self.elapsed_s, 1),
        }
        with (self.settings.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _is_of_a_run(path: Path) -> bool:
    """Whether a file is more than a lock, or a part of one whose writing was killed."""
    return path.name != LOCK_FILE and not path.name.startswith(f".{CHECKPOINT_FILE}.")


def _holds(folder: Path, weights: Mapping[str, NDArray[np.float32]]) -> bool:
    """Whether a supernet with these weights is in a folder, undamaged."""
    try:
        stored = read_supernet(folder).weights
    except DeployError:
        return False
    return stored.keys() == weights.keys() and all(
        np.array_equal(stored[name], array) for name, array in weights.items()
    )


def _sample(
    space: SearchSpace, phase: Phase, rng: np.random.Generator
) -> list[SubnetConfig]:
    """The sub-networks of one step."""
    ends = [space.largest(), space.smallest()] if phase.sandwich else []
    rows = space.sample(phase.subnet_count - len(ends), rng)
    return [*ends, *map(space.decode, rows)]


def _step_cost(phase: Phase) -> float:
    """Rough cost of a step, in full networks trained; only the ETA reads it."""
    narrowed = (phase.depth_choices != 1) + (phase.expand_choices != 1)
    teacher = 0.3 if phase.distill else 0.0
    return teacher + phase.subnet_count * (1.0, 0.75, 0.5)[narrowed]


def _by_name(recipe: dict[str, Any]) -> dict[str, object]:
    """Settings of a recipe from JSON; those of phases behind the phase's name."""
    settings = dict(recipe)
    for phase in settings.pop("phases"):
        settings |= {f"{phase['name']}.{key}": value for key, value in phase.items()}
    return settings
