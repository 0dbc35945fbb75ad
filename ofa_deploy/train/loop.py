"""Training one plain network in one phase: resumable, step by step.

What the supernet's training is to a supernet, this is to a network of its own: a dense
one, one that is being pruned, one that is fine-tuned. A run that is killed at any time
continues from `checkpoint.safetensors` to the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ofa_deploy.errors import TrainingError
from ofa_deploy.nn.memory_format import store_channels_last, store_plainly
from ofa_deploy.train.checkpoint import (
    Checkpoint,
    Position,
    read_checkpoint,
    require_finite,
    write_checkpoint,
)
from ofa_deploy.train.distill import knowledge_loss, supernet_loss
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.logits import logits_of
from ofa_deploy.train.optimizer import HybridOptimizer
from ofa_deploy.train.recipe import Recipe, learning_rate
from profilers.files import remove_leftovers, write_atomically

CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE = "log.jsonl"
# In checkpoints, beside the regulariser's state.
LOSSES = "epoch_losses"


class Regulariser(Protocol):
    """What a pruning method adds to the training of a network."""

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rates of its own parameters, by their names in the network."""

    def loss(self) -> Tensor:
        """Added to every step's loss."""

    def after_step(self) -> None:
        """Called after every step of the optimiser."""

    def facts(self) -> dict[str, object]:
        """What the log keeps of an epoch, as JSON can hold it."""

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """Channels kept and all channels of each group, by name."""

    def remarks(self) -> tuple[str, ...]:
        """What people should know of the training so far."""

    def state(self) -> dict[str, Tensor]:
        """What it keeps from step to step besides its parameters."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""


class NoRegulariser:
    """Training and nothing else."""

    @property
    def rates(self) -> Mapping[str, float]:
        """See `Regulariser`."""
        return {}

    def loss(self) -> Tensor:
        """See `Regulariser`."""
        return torch.zeros(())

    def after_step(self) -> None:
        """See `Regulariser`."""

    def facts(self) -> dict[str, object]:
        """See `Regulariser`."""
        return {}

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """See `Regulariser`."""
        return {}

    def remarks(self) -> tuple[str, ...]:
        """See `Regulariser`."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """See `Regulariser`."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Regulariser`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopProgress:
    """What a progress bar shows.

    Args:
        epoch: From 1.
        epochs: In all.
        step: Steps done.
        steps: In all.
        loss: Mean of the epoch so far.
        images_per_s: Training images per second, this sitting.
        eta_s: Until the end.
        accuracy: On the held-out images after the last epoch, 0..1; None before.
        kept: Channels kept and all channels of each group, by name, where a method
            removes any.
        remarks: What people should know of the training so far.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_s: float
    eta_s: float
    accuracy: float | None
    kept: Mapping[str, tuple[int, int]]
    remarks: tuple[str, ...]


class TrainingLoop:
    """A network's training by the only phase of a recipe; `run` takes it to its end.

    Args:
        network: Trained in place; from `(N, 3, resolution, resolution)` to logits.
        images: Training images and those held out.
        recipe: Of one phase, without a teacher.
        resolution: Height and width of the inputs.
        folder: Keeps checkpoint and log; None to keep nothing. What is in it is
            continued.
        bf16: Use bfloat16 autocast; worth it where the CPU has it.
        regulariser: What a pruning method adds.
        teacher: Whose class probabilities are learned besides the labels, weighted as
            the recipe says; in eval mode afterwards, and else as it was.
        checkpoint_seconds: Time between checkpoints.
        clock: Seconds, monotonic.

    Raises:
        TrainingError: The folder holds a run of another recipe, other data, or another
            network.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        images: TrainingImages,
        recipe: Recipe,
        resolution: int,
        folder: Path | None,
        bf16: bool,
        regulariser: Regulariser | None = None,
        teacher: nn.Module | None = None,
        checkpoint_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(recipe.phases) != 1:
            raise TrainingError(
                f"the recipe has {len(recipe.phases)} phases; a network is trained in 1"
            )
        self._modules = [one for one in (network, teacher) if one is not None]
        self.network = network
        self.images = images
        self.recipe = recipe
        self.resolution = resolution
        self.folder = folder
        self.regulariser: Regulariser = regulariser or NoRegulariser()
        self._teacher = teacher
        self._bf16 = bf16
        self._checkpoint_seconds = checkpoint_seconds
        self._clock = clock
        self._started_s = clock()
        self._elapsed_before_s = 0.0
        self._step = 0
        # Of the epoch's steps so far.
        self._loss_sum, self._loss_count = 0.0, 0
        self._accuracy: float | None = None
        self._optimizer = self._begin()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder / CHECKPOINT_FILE)
            if (folder / CHECKPOINT_FILE).exists():
                self._restore(read_checkpoint(folder / CHECKPOINT_FILE))
            # Of epochs that end after the checkpoint, and are trained again.
            self._cut_log(self._step // images.batches_per_epoch)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.recipe.phases[0].epochs * self.images.batches_per_epoch

    @property
    def elapsed_s(self) -> float:
        """Training time over all sittings."""
        return self._elapsed_before_s + self._clock() - self._started_s

    def run(self, progress: Callable[[LoopProgress], None] | None = None) -> float:
        """Train to the end; returns the accuracy on the held-out images, 0..1.

        Raises:
            TrainingError: The loss is no number; the last checkpoint is kept.
        """
        momentum = self._optimizer.momentum()
        self._optimizer = self._begin()  # of weights where they are now
        self._optimizer.restore_momentum(momentum)
        try:
            # Every step seeds torch's generator; whoever calls has it as it was.
            with torch.random.fork_rng(devices=[]):
                return self._run(progress)
        finally:
            for module in self._modules:
                store_plainly(module)

    def _begin(self) -> HybridOptimizer:
        """Store the weights as they are trained, and make what steps them there."""
        for module in self._modules:
            store_channels_last(module)
        return HybridOptimizer(self.network, self.recipe, rates=self.regulariser.rates)

    def _run(self, progress: Callable[[LoopProgress], None] | None) -> float:
        saved_s = told_s = began_s = self._clock()
        began_step = self._step
        per_epoch = self.images.batches_per_epoch
        if self._loss_count and self._step % per_epoch == 0:
            self._end_epoch()  # which was interrupted
        for step in range(self._step, self.steps):
            self._loss_sum += self._train_step(step)
            self._loss_count += 1
            loss = self._loss_sum / self._loss_count
            self._step = step + 1
            ends_epoch = self._step % per_epoch == 0
            if ends_epoch:
                self._end_epoch()
            if ends_epoch or self._clock() - saved_s >= self._checkpoint_seconds:
                self._save()
                saved_s = self._clock()
            now_s = self._clock()
            if progress and (ends_epoch or step % 10 == 0 or now_s - told_s > 1):
                told_s = now_s
                rate = (self._step - began_step) / (now_s - began_s)
                progress(self._report(loss, rate))
        if self._accuracy is None:
            self._accuracy = self.validate()
        return self._accuracy

    def _end_epoch(self) -> None:
        self._accuracy = self.validate()
        self._log(self._loss_sum / self._loss_count)
        self._loss_sum, self._loss_count = 0.0, 0

    @torch.no_grad()
    def validate(self) -> float:
        """Share of held-out images whose class is predicted, 0..1."""
        self.network.eval()
        correct = total = 0
        batches = self.images.plain_batches(
            self.images.validation,
            resolution=self.resolution,
            most=len(self.images.validation),
        )
        for inputs, labels in batches:
            correct += int((self._logits(inputs).argmax(1) == labels).sum())
            total += len(labels)
        return correct / total

    def _train_step(self, step: int) -> float:
        rng = np.random.default_rng([self.recipe.seed, 0, step])
        inputs, targets = self.images.batch(
            0, step, resolution=self.resolution, rng=rng
        )
        epoch = step / self.images.batches_per_epoch
        self._optimizer.set_learning_rate(learning_rate(self.recipe.phases[0], epoch))
        self._optimizer.zero_grad()
        self.network.train()
        # Of what is random in the network itself, such as dropout.
        torch.manual_seed(int(rng.integers(2**63)))
        loss = self._loss(self._logits(inputs), targets, self._taught(inputs))
        total = loss + self.regulariser.loss()
        if not math.isfinite(float(total.detach())):
            raise TrainingError(
                f"the loss is {float(total.detach())} at step {step}; lower the "
                "learning rate and start again. The last good checkpoint is kept"
            )
        total.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.regulariser.after_step()
        return float(loss.detach())

    def _loss(self, logits: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
        recipe = self.recipe
        if taught is not None and recipe.temperature is not None:
            return knowledge_loss(
                logits,
                targets,
                taught,
                temperature=recipe.temperature,
                teacher_share=recipe.teacher_share,
                label_smoothing=recipe.label_smoothing,
            )
        return supernet_loss(
            logits,
            targets,
            soft_targets=None if taught is None else taught.softmax(1),
            label_smoothing=recipe.label_smoothing,
            distillation_ratio=recipe.distillation_ratio,
        )

    @torch.no_grad()
    def _taught(self, inputs: Tensor) -> Tensor | None:
        """The teacher's logits, `(N, classes)`; None without one."""
        if self._teacher is None:
            return None
        self._teacher.eval()
        return logits_of(self._teacher, inputs, bf16=self._bf16)

    def _logits(self, inputs: Tensor) -> Tensor:
        return logits_of(self.network, inputs, bf16=self._bf16)

    # -- state -------------------------------------------------------------------------

    def _restore(self, checkpoint: Checkpoint) -> None:
        position = checkpoint.position
        position.require(
            recipe_sha256=self.recipe.sha256(0),
            data_sha256=self.images.sha256,
            folder=self.folder,
            cure="continue with the same, or name another folder",
        )
        try:
            self.network.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            raise TrainingError(
                f"{self.folder} holds a run of another network: {error}. Continue with "
                "the same, or name another folder"
            ) from error
        self._step = position.step
        self._elapsed_before_s = position.elapsed_s
        self._optimizer.restore_momentum(checkpoint.momentum)
        extra = dict(checkpoint.extra)
        if (losses := extra.pop(LOSSES, None)) is not None:
            self._loss_sum, self._loss_count = float(losses[0]), int(losses[1])
        self.regulariser.restore(extra)

    def _cut_log(self, epochs: int) -> None:
        """Leave out what the log says of epochs that will be trained again."""
        if self.folder is None or not (self.folder / LOG_FILE).exists():
            return
        lines = (self.folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
        kept = "".join(f"{line}\n" for line in lines[:epochs])
        write_atomically(self.folder / LOG_FILE, kept.encode())

    def _save(self) -> None:
        if self.folder is None:
            return
        state = self.network.state_dict()
        require_finite(state, when=f"after step {self._step}")
        position = Position(
            phase=0,
            step=self._step,
            recipe_sha256=self.recipe.sha256(0),
            data_sha256=self.images.sha256,
            elapsed_s=self.elapsed_s,
        )
        checkpoint = Checkpoint(
            position=position,
            weights=state,
            momentum=self._optimizer.momentum(),
            extra={**self.regulariser.state(), LOSSES: self._losses()},
        )
        write_checkpoint(self.folder / CHECKPOINT_FILE, checkpoint)

    def _losses(self) -> Tensor:
        """Sum and count of the epoch's losses so far."""
        return torch.tensor([self._loss_sum, self._loss_count], dtype=torch.float64)

    def _log(self, loss: float) -> None:
        if self.folder is None or self._accuracy is None:
            return
        line = {
            "epoch": self._step // self.images.batches_per_epoch,
            "loss": round(loss, 4),
            "validation": round(self._accuracy, 4),
            "elapsed_s": round(self.elapsed_s, 1),
            **self.regulariser.facts(),
        }
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _report(self, loss: float, steps_per_s: float) -> LoopProgress:
        epochs, per_epoch = self.recipe.phases[0].epochs, self.images.batches_per_epoch
        return LoopProgress(
            epoch=min(self._step // per_epoch + 1, epochs),
            epochs=epochs,
            step=self._step,
            steps=self.steps,
            loss=loss,
            images_per_s=steps_per_s * self.recipe.batch_size,
            eta_s=(self.steps - self._step) / steps_per_s,
            accuracy=self._accuracy,
            kept=self.regulariser.kept(),
            remarks=self.regulariser.remarks(),
        )
