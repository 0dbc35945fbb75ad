"""Training what a method left of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from ofa_deploy.shrink.masks import MaskedNetwork
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LoopProgress, Regulariser, TrainingLoop
from ofa_deploy.train.precision import prefers_bf16
from ofa_deploy.train.recipe import Recipe

TrainingCallback = Callable[[str, LoopProgress], None]


def ignore_progress(stage: str, progress: LoopProgress) -> None:
    """Do nothing with a training's progress."""


def freeze(masked: MaskedNetwork, kept: Sequence[Tensor]) -> None:
    """Keep these channels of each group, for good: masks are no longer trained."""
    for mask, indices in zip(masked.masks, kept, strict=True):
        mask.keep_only(indices)
        mask.latent.requires_grad_(False)


def finetune(
    network: nn.Module,
    *,
    resolution: int,
    recipe: Recipe,
    images: TrainingImages,
    folder: Path | None,
    teacher: nn.Module | None = None,
    regulariser: Regulariser | None = None,
    on_progress: TrainingCallback = ignore_progress,
) -> float:
    """Train what is left of a network; returns its accuracy on the held-out images.

    Args:
        network: What is left, trained in place.
        resolution: Height and width of its inputs.
        recipe: Of one phase.
        images: To train on.
        folder: Keeps the run, which is continued; None to keep nothing.
        teacher: Whose class probabilities are learned, too.
        regulariser: What is added to the loss.
        on_progress: Called with what is trained, and how far it is.
    """
    loop = TrainingLoop(
        network,
        images=images.for_recipe(recipe),
        recipe=recipe,
        resolution=resolution,
        folder=folder,
        bf16=prefers_bf16(),
        regulariser=regulariser,
        teacher=teacher,
    )
    return loop.run(lambda progress: on_progress("fine-tuning", progress))
