"""Searching widths while a network is trained, and tuning what was found.

Whatever the price: MACs, or a device's milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ofa_deploy.shrink.cost import Price
from ofa_deploy.shrink.masks import MaskedNetwork
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.pas import PasSettings, PruningAsSearch
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LoopProgress, TrainingLoop
from ofa_deploy.train.precision import prefers_bf16
from ofa_deploy.train.recipe import Phase, Recipe

Told = Callable[[str, LoopProgress], None]


def nobody(stage: str, progress: LoopProgress) -> None:
    """Told of a training's progress, and does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkRecipe:
    """How a network is shrunk.

    Args:
        search: Training while widths are searched; of one phase.
        finetune: Training of what was found; of one phase.
        latent_rate: See `PasSettings`.
        flip_share: Share of the search's steps in which the price alone would remove a
            channel of the layer that it pulls at hardest.
        floor: Channels that every group keeps, rounded up to a multiple of the step.
        step: Channel counts are multiples of this; None measures what the runtime's
            kernels work in.
    """

    search: Recipe
    finetune: Recipe
    latent_rate: float = 0.02
    flip_share: float = 0.3
    floor: int = 8
    step: int | None = None


def default_shrink_recipe(
    *, search_epochs: int = 10, finetune_epochs: int = 30, batch_size: int = 256
) -> ShrinkRecipe:
    """Search at a low rate, then fine-tune at a higher one.

    Args:
        search_epochs: Passes over the data while widths are searched.
        finetune_epochs: Passes afterwards.
        batch_size: Images per step.
    """

    def recipe(name: str, epochs: int, rate: float) -> Recipe:
        phase = Phase(
            name=name,
            epochs=epochs,
            warmup_epochs=min(1.0, epochs / 4),
            peak_learning_rate=rate,
            distill=False,
            cutmix_share=0.25,
        )
        return Recipe(phases=(phase,), batch_size=batch_size)

    return ShrinkRecipe(
        search=recipe("search", search_epochs, 0.02),
        finetune=recipe("finetune", finetune_epochs, 0.05),
    )


def search_widths(
    own: OwnNetwork,
    *,
    price: Price,
    target_share: float,
    recipe: ShrinkRecipe,
    step: int,
    images: TrainingImages,
    folder: Path | None,
    told: Told = nobody,
) -> MaskedNetwork:
    """Train a network with masks until they cost about a share of the whole.

    Args:
        own: Trained in place.
        price: Of channel counts.
        target_share: Of the whole network's price.
        recipe: How; its search.
        step: Channel counts are to be multiples of this.
        images: To train on.
        folder: Keeps the run, which is continued; None to keep nothing.
        told: Of progress.

    Raises:
        SpaceError: The target is no share, or below what floors cost.
        TrainingError: The loss is no number, or the folder holds another run.
    """
    masked = own.masked()
    images = images.for_recipe(recipe.search)
    steps = recipe.search.phases[0].epochs * images.batches_per_epoch
    regulariser = PruningAsSearch(
        masked,
        price=price,
        settings=PasSettings(
            target_share=target_share,
            latent_rate=recipe.latent_rate,
            steps_to_flip=max(1, round(recipe.flip_share * steps)),
            momentum=recipe.search.momentum,
            floor=aligned_floor(recipe, step),
            step=step,
        ),
    )
    loop = TrainingLoop(
        masked.module,
        images=images,
        recipe=recipe.search,
        resolution=own.resolution,
        folder=folder,
        bf16=prefers_bf16(),
        regulariser=regulariser,
    )
    loop.run(lambda progress: told("searching widths", progress))
    return masked


def aligned_floor(recipe: ShrinkRecipe, step: int) -> int:
    """The recipe's floor of channels, as a multiple of the step."""
    return math.ceil(recipe.floor / step) * step


def freeze(masked: MaskedNetwork, kept: Sequence[Tensor]) -> None:
    """Keep these channels of each group, for good: masks are no longer trained."""
    for mask, indices in zip(masked.masks, kept, strict=True):
        mask.keep_only(indices)
        mask.latent.requires_grad_(False)


def finetune(
    own: OwnNetwork,
    masked: MaskedNetwork,
    *,
    recipe: Recipe,
    images: TrainingImages,
    folder: Path | None,
    told: Told = nobody,
) -> float:
    """Train what frozen masks leave; returns its accuracy on the held-out images.

    Args:
        own: The network.
        masked: Its frozen form, trained in place.
        recipe: Of one phase.
        images: To train on.
        folder: Keeps the run, which is continued; None to keep nothing.
        told: Of progress.
    """
    loop = TrainingLoop(
        masked.module,
        images=images.for_recipe(recipe),
        recipe=recipe,
        resolution=own.resolution,
        folder=folder,
        bf16=prefers_bf16(),
    )
    return loop.run(lambda progress: told("fine-tuning", progress))
