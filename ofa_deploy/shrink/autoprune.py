"""AutoPrune: auxiliary parameters decide, on images that no weights are trained on.

Source: X. Xiao, Z. Wang, S. Rajasekaran, "AutoPrune: Automatic Network Pruning by
Regularizing Auxiliary Parameters", NeurIPS 2019. Weights are trained on one part of the
training images; after each step of theirs the auxiliary parameters take one on the
other part, by the sign rule (see `masks`), and feel the price. Nothing is pruned for
good: what was removed keeps its weights, and comes back when it is missed. A network
that is brought may have been trained on all of the images before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.errors import TrainingError
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.logits import logits_of
from ofa_deploy.train.precision import prefers_bf16
from ofa_deploy.train.recipe import Recipe

# Of a network that learns nothing any more.
LEAST_GRADIENT = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Deciding:
    """What auxiliary parameters are trained with.

    Args:
        images: Of their own, where the method trains the weights on others.
        resolution: Height and width of the inputs.
        label_smoothing: Of their loss.
        bf16: Use bfloat16 autocast.
    """

    images: TrainingImages
    resolution: int
    label_smoothing: float
    bf16: bool

    @classmethod
    def of(cls, images: TrainingImages, recipe: Recipe, *, resolution: int) -> Deciding:
        """As the weights are trained by a recipe."""
        return cls(
            images=images,
            resolution=resolution,
            label_smoothing=recipe.label_smoothing,
            bf16=prefers_bf16(),
        )

    def loss(self, module: nn.Module, step: int) -> Tensor:
        """Of a network on a step's batch, cut and mixed as those of the weights are.

        Raises:
            TrainingError: It is no number.
        """
        # Another stream than that of the weights' steps, [seed, 0, step].
        rng = np.random.default_rng([self.images.seed, 1, step])
        torch.manual_seed(int(rng.integers(2**63)))
        inputs, targets = self.images.batch(
            0, step, resolution=self.resolution, rng=rng
        )
        logits = logits_of(module, inputs, bf16=self.bf16)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(
                f"the loss on the images that decide is {float(loss.detach())} at step "
                f"{step}; lower the learning rate and start again, or look at the "
                "weights that were brought. The last good checkpoint, if any, is kept"
            )
        return loss


class Pull(Protocol):
    """What pulls at auxiliary parameters besides the task: of channels, or weights."""

    @property
    def module(self) -> nn.Module:
        """The network, with its masks."""

    @property
    def latents(self) -> list[nn.Parameter]:
        """The auxiliary parameters."""

    @property
    def latent_rates(self) -> Sequence[float]:
        """Their learning rates now."""

    @property
    def momentum(self) -> float:
        """Of their optimiser."""

    def flags(self) -> Tensor:
        """Of everything that can go, one after the other, whether it is kept."""

    def loss(self) -> Tensor:
        """Added to the loss of the auxiliary parameters."""

    def weights_loss(self) -> Tensor:
        """Added to the loss of the weights."""

    def after_step(self) -> None:
        """Called after every step of the auxiliary parameters."""

    def facts(self) -> dict[str, object]:
        """See `Regulariser`."""

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """See `Regulariser`."""

    def remarks(self) -> tuple[str, ...]:
        """See `Regulariser`."""

    def state(self) -> dict[str, Tensor]:
        """See `Regulariser`."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Regulariser`."""


class AutoPrune:
    """A `Regulariser` that trains masks on images of their own.

    Args:
        pull: The price's; of a network whose masks have the sign rule.
        deciding: What the masks are trained with.
    """

    def __init__(self, pull: Pull, *, deciding: Deciding) -> None:
        self.pull, self.deciding = pull, deciding
        self._latents = pull.latents
        for latent in self._latents:
            latent.requires_grad_(False)
        self._optimizer = torch.optim.SGD(
            [{"params": [latent]} for latent in self._latents], momentum=pull.momentum
        )
        self._step = 0
        self._flips = 0

    # -- as a regulariser --------------------------------------------------------------

    @property
    def rates(self) -> Mapping[str, float]:
        """See `Regulariser`: masks are not stepped with the weights."""
        return {}

    def loss(self) -> Tensor:
        """See `Regulariser`: weights do not feel the price."""
        return self.pull.weights_loss()

    def after_step(self) -> None:
        """The masks' own step, on their own images."""
        before = self.pull.flags()
        groups = self._optimizer.param_groups
        for group, rate in zip(groups, self.pull.latent_rates, strict=True):
            group["lr"] = rate
        with only_trained(self.pull.module, self._latents):
            self._optimizer.zero_grad()
            loss = self.deciding.loss(self.pull.module, self._step)
            torch.autograd.backward(loss + self.pull.loss())
            self._optimizer.step()
        self._flips += int((self.pull.flags() != before).sum())
        self.pull.after_step()
        self._step += 1

    def facts(self) -> dict[str, object]:
        """See `Regulariser`; with the channels that fell or rose in between."""
        flips, self._flips = self._flips, 0
        return {**self.pull.facts(), "flips": flips}

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """See `Regulariser`."""
        return self.pull.kept()

    def remarks(self) -> tuple[str, ...]:
        """See `Regulariser`."""
        return self.pull.remarks()

    def state(self) -> dict[str, Tensor]:
        """See `Regulariser`."""
        momentum = {
            f"momentum.{index}": self._optimizer.state[latent]["momentum_buffer"]
            for index, latent in enumerate(self._latents)
            if self._optimizer.state[latent].get("momentum_buffer") is not None
        }
        counts = torch.tensor([self._step, self._flips])
        return {**self.pull.state(), **momentum, "masks_steps": counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Regulariser`."""
        if "masks_steps" not in state:
            raise TrainingError(
                "the search that is to be continued was of another method; name "
                "another folder"
            )
        self.pull.restore(state)
        self._step, self._flips = (int(count) for count in state["masks_steps"])
        for index, latent in enumerate(self._latents):
            if f"momentum.{index}" in state:
                buffer = state[f"momentum.{index}"].clone()
                self._optimizer.state[latent]["momentum_buffer"] = buffer


@contextmanager
def only_trained(
    module: nn.Module, parameters: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Gradients for some parameters of a network, and for nothing else of it.

    Args:
        module: The network.
        parameters: Of it.
    """
    others = [p for p in module.parameters() if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for parameter in others:
            parameter.requires_grad_(True)


def wandering_rate(
    gradient: float, *, way: float, steps: int, momentum: float
) -> float:
    """Rate at which the task alone takes a parameter so far, by chance.

    Args:
        gradient: Of the task, of a typical parameter; its sign changes from step to
            step.
        way: How far.
        steps: In how many.
        momentum: Of the optimiser.
    """
    by_one = max(gradient, LEAST_GRADIENT) / (1 - momentum)
    return way / (by_one * math.sqrt(steps))


def task_gradients(
    module: nn.Module,
    latents: Sequence[nn.Parameter],
    deciding: Deciding,
    *,
    batches: int = 4,
) -> list[float]:
    """Root mean squares of the task's gradients of auxiliary parameters, of one batch.

    Of each tensor of them; 0 of a layer that is not called.

    Args:
        module: The network, with its masks.
        latents: Their parameters.
        deciding: What they are trained with.
        batches: To average over.

    Raises:
        TrainingError: One is no number.
    """
    squares = torch.zeros(len(latents), dtype=torch.float64)
    training = module.training
    module.eval()  # or batch norms' statistics would move
    try:
        for step in range(batches):
            with only_trained(module, latents):
                found: Sequence[Tensor | None] = torch.autograd.grad(
                    deciding.loss(module, step), latents, allow_unused=True
                )
            for index, gradient in enumerate(found):
                if gradient is not None:
                    squares[index] += gradient.double().square().mean() / batches
    finally:
        module.train(training)
    if not squares.isfinite().all():
        raise TrainingError(
            "the task's gradients of what is to be removed are no numbers; look at the "
            "weights that were brought"
        )
    return squares.sqrt().tolist()


def typical_gradient(
    gradients: Sequence[float], latents: Sequence[nn.Parameter]
) -> float:
    """Of any auxiliary parameter that the task tells something; 0 if there is none.

    Args:
        gradients: Root mean squares, of each tensor of them.
        latents: These.
    """
    squares, count = 0.0, 0
    for latent, gradient in zip(latents, gradients, strict=True):
        if gradient > 0:
            squares += latent.numel() * gradient**2
            count += latent.numel()
    return math.sqrt(squares / count) if count else 0.0
