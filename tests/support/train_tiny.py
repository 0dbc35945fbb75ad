"""A training run on the tiny space; as a script, one that a test can kill."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ofa_deploy.dataset import ImageSet
from ofa_deploy.train.progressive import ProgressiveTraining, RunSettings
from ofa_deploy.train.recipe import Phase, Recipe
from tests.support import tiny

RECIPE = Recipe(
    phases=(
        Phase(name="full", epochs=2, peak_learning_rate=0.05, distill=False),
        Phase(
            name="kernel",
            epochs=1,
            warmup_epochs=0.5,
            peak_learning_rate=0.02,
            kernel_choices=3,
        ),
        Phase(
            name="width",
            epochs=1,
            peak_learning_rate=0.02,
            subnet_count=2,
            kernel_choices=3,
            depth_choices=2,
            expand_choices=2,
            sorted_expands=1,
        ),
    ),
    batch_size=12,
    crop_padding=2,
)
# 81 of the 90 images train: 6 steps per epoch.
STEPS_PER_EPOCH = 6


def data() -> ImageSet:
    return tiny.images(per_class=30, seed=11)


def training(
    folder: Path,
    *,
    resume: bool = False,
    recipe: Recipe = RECIPE,
    images: ImageSet | None = None,
    stop_after: str | None = None,
    bf16: bool = False,
) -> ProgressiveTraining:
    """A run that saves after every step."""
    torch.set_num_threads(1)
    return ProgressiveTraining(
        space=tiny.SPACE,
        data=images or data(),
        recipe=recipe,
        settings=RunSettings(
            folder=folder,
            resume=resume,
            checkpoint_seconds=0.0,
            stop_after=stop_after,
        ),
        bf16=bf16,
    )


if __name__ == "__main__":
    training(Path(sys.argv[1])).run()
