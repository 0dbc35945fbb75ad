"""The methods behind one call: each finds an order in which channels go."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ofa_deploy.batches import evaluation_batch
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import MissingDependency, TrainingError
from ofa_deploy.shrink.autoprune import (
    AutoPrune,
    Deciding,
    task_gradients,
    typical_gradient,
    wandering_rate,
)
from ofa_deploy.shrink.candidates import CandidateImages, warn_if_few
from ofa_deploy.shrink.cost import LayerPrices, full_counts
from ofa_deploy.shrink.finetuning import TrainingCallback, ignore_progress
from ofa_deploy.shrink.legr import Member, Population, RankingSearch
from ofa_deploy.shrink.masks import (
    INITIAL_LATENT,
    THRESHOLD,
    MaskedNetwork,
    insert_masks,
)
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.pas import LatentOrder, PasSettings, PruningAsSearch
from ofa_deploy.shrink.ranking import ChannelOrder
from ofa_deploy.shrink.recipe import ChannelMethod, ShrinkRecipe
from ofa_deploy.shrink.resume_store import remembered
from ofa_deploy.shrink.shrinking import short_digest
from ofa_deploy.shrink.stages import shallower
from ofa_deploy.shrink.tas import (
    Passes,
    Preflight,
    TransformableSearch,
    preflight,
)
from ofa_deploy.shrink.tas_network import SearchedNetwork, insert_distributions
from ofa_deploy.shrink.tas_order import LikeliestOrder
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LOG_FILE, Regulariser, TrainingLoop
from ofa_deploy.train.precision import prefers_bf16
from profilers.device import available_cores
from profilers.files import write_atomically
from profilers.process import end_with

SEARCHING = "searching widths"
# Of tas, for people.
DECIDING_SETTING = "recipe.tas.deciding_share"
FAMILY_FILE = "family.json"
# Channels of which the task says less than this share of what it says of a typical one
# move no faster for that: the price pulls as hard as the fastest of all layers bear,
# and would hardly pull at the others.
LEAST_OF_TYPICAL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What a method found.

    Args:
        masked: The network, with its masks; trained further, by methods that train.
        order: In which channels go.
        own: What channels go from: the network, or what is left of its depth.
        fresh: Whether what is left is trained from nothing.
        depths: Of each stage whose depth was searched: name, blocks, those kept.
        family: What the order leaves at some prices, where the method judged that.
    """

    masked: MaskedNetwork
    order: ChannelOrder
    own: OwnNetwork
    fresh: bool = False
    depths: tuple[tuple[str, int, int], ...] = ()
    family: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Search:
    """What every method is given.

    Args:
        own: The network; trained in place, by methods that train.
        price: Of channel counts.
        share: Of the whole network's price that is asked for.
        step: Channel counts are multiples of this.
        recipe: How.
        images: To train on.
        held_out: To judge candidates on.
        folder: Keeps the search, which is continued; None to keep nothing.
        on_progress: Called with what is trained, and how far it is.
        judged: Told how many candidates were judged, of how many.
        announced: Told what a search of tas will take, before it begins.
        executor: Judges candidates; None for processes, one a core.
    """

    own: OwnNetwork
    price: LayerPrices
    share: float
    step: int
    recipe: ShrinkRecipe
    images: TrainingImages
    held_out: ImageSet
    folder: Path | None
    on_progress: TrainingCallback = ignore_progress
    judged: Callable[[int, int], None] = lambda done, total: None
    announced: Callable[[Preflight], None] = lambda preflight: None
    executor: Executor | None = None

    def run(self, method: ChannelMethod) -> Found:
        """Search by a method.

        Raises:
            SpaceError: The share is none, or below what floors cost.
            TrainingError: The loss is no number, or the folder holds another search.
        """
        return _METHODS[method](self)

    def floors(self, method: ChannelMethod) -> list[int]:
        """Least channels of each group."""
        return self.recipe.floors(self.own.graph, method=method, step=self.step)

    def pull(
        self, masked: MaskedNetwork, images: TrainingImages, deciding: Deciding
    ) -> PruningAsSearch:
        """The price's pull on masks, as strong as the recipe has it.

        Args:
            masked: The network, as it was brought.
            images: That weights are trained on.
            deciding: What masks are trained with.
        """
        recipe = self.recipe
        steps = recipe.search.phases[0].epochs * images.batches_per_epoch
        decides = [self.own.sha256, images.sha256, steps, recipe.wander_share]
        name = f"latent_rates-{short_digest([str(one) for one in decides])}.json"
        # Gradients differ from machine to machine in their last digits; a search that
        # goes on keeps its rates.
        if recipe.latent_rate is None:
            rates: list[float] = remembered(
                None if self.folder is None else self.folder / name,
                lambda: self._latent_rates(masked, deciding, steps),
            )
        else:
            rates = [recipe.latent_rate] * len(masked.masks)
        return PruningAsSearch(
            masked,
            price=self.price,
            settings=PasSettings(
                target_share=self.share,
                steps_to_flip=max(1, round(recipe.flip_share * steps)),
                momentum=recipe.search.momentum,
                floor=recipe.aligned_floor(self.step),
                step=self.step,
            ),
            latent_rates=rates,
            steps=steps,
        )

    def _latent_rates(
        self, masked: MaskedNetwork, deciding: Deciding, steps: int
    ) -> list[float]:
        """Of each group: the channels of all wander as far in a search.

        Of a group that the task says nothing of, a typical one's.
        """
        latents = [mask.latent for mask in masked.masks]
        gradients = task_gradients(masked.module, latents, deciding)
        typical = typical_gradient(gradients, latents)
        return [
            wandering_rate(
                max(gradient or typical, LEAST_OF_TYPICAL * typical),
                way=self.recipe.wander_share * (INITIAL_LATENT - THRESHOLD),
                steps=steps,
                momentum=self.recipe.search.momentum,
            )
            for gradient in gradients
        ]

    def loop(
        self, module: nn.Module, images: TrainingImages, regulariser: Regulariser
    ) -> TrainingLoop:
        """Training of a network while it is searched, at the step where it stopped."""
        return TrainingLoop(
            module,
            images=images,
            recipe=self.recipe.search,
            resolution=self.own.resolution,
            folder=self.folder,
            bf16=prefers_bf16(),
            regulariser=regulariser,
        )

    def train(self, loop: TrainingLoop) -> None:
        """Train a network to the end of its search."""
        loop.run(lambda progress: self.on_progress(SEARCHING, progress))

    def trained(
        self,
        masked: MaskedNetwork,
        images: TrainingImages,
        regulariser: Regulariser,
    ) -> Found:
        """What training with masks leaves."""
        self.train(self.loop(masked.module, images, regulariser))
        order = LatentOrder(
            latents=masked.latents(), step=self.step, floors=self.floors("pas")
        )
        return Found(masked=masked, order=order, own=self.own)


def _pas(search: Search) -> Found:
    masked = search.own.masked()
    recipe = search.recipe.search
    images = search.images.for_recipe(recipe)
    deciding = Deciding.of(images, recipe, resolution=search.own.resolution)
    return search.trained(masked, images, search.pull(masked, images, deciding))


def _autoprune(search: Search) -> Found:
    own, recipe = search.own, search.recipe
    masked = insert_masks(
        own.module, own.graph, estimator=recipe.estimator, rule="sign"
    )
    of_weights, of_masks = search.images.for_recipe(recipe.search).parted(
        recipe.deciding_share
    )
    deciding = Deciding.of(of_masks, search.recipe.search, resolution=own.resolution)
    pull = search.pull(masked, of_weights, deciding)
    return search.trained(masked, of_weights, AutoPrune(pull, deciding=deciding))


def _legr(search: Search) -> Found:
    own, settings = search.own, search.recipe.legr
    folder = search.folder
    full = float(search.price(full_counts(own.graph)))
    share = search.recipe.lowest_share or search.share
    with _scratch(folder) as images_folder:
        images = CandidateImages.written(
            search.images,
            held_out=search.held_out,
            resolution=own.resolution,
            training_count=settings.training_count,
            validation_count=settings.validation_count,
            folder=images_folder,
            # No image twice, as long as there are others: who knows it by heart says
            # little of a structure.
            tuning_count=settings.tuning_steps * evaluation_batch(own.resolution),
        )
        warn_if_few(own.module, images)
        ranking = RankingSearch(
            own,
            price=search.price,
            most=min(share, search.share) * full,
            step=search.step,
            settings=settings,
            images=images,
            floors=search.floors("legr"),
            folder=folder,
        )

        def count(population: Population) -> None:
            search.judged(population.done, settings.evaluations)

        with _executor(search.executor) as executor, _told_if_broken():
            best = ranking.run(executor, count)
            # Judged once, however many budgets are cut from a ranking.
            family = remembered(
                None if folder is None else folder / FAMILY_FILE,
                lambda: [asdict(one) for one in ranking.family(best, executor)],
            )
    if folder is not None:
        _write_log(folder, ranking.population.history)
    return Found(
        masked=own.masked(),
        order=ranking.order(best),
        own=own,
        family=tuple(
            Member(price=one["price"], counts=tuple(one["counts"]), loss=one["loss"])
            for one in family
        ),
    )


def _tas(search: Search) -> Found:
    own, settings = search.own, search.recipe.tas
    of_weights, of_choices = search.images.for_recipe(search.recipe.search).parted(
        settings.deciding_share, setting=DECIDING_SETTING
    )
    torch.manual_seed(search.recipe.search.seed)
    searched = insert_distributions(
        own.module,
        own.graph,
        image=own.image,
        step=search.step,
        searches_depth=settings.searches_depth,
        fresh=settings.fresh,
    )
    regulariser = TransformableSearch(
        searched,
        price=search.price,
        target_share=search.share,
        settings=settings,
        deciding=Deciding.of(
            of_choices, search.recipe.search, resolution=own.resolution
        ),
        steps=search.recipe.search.phases[0].epochs * of_weights.batches_per_epoch,
    )
    loop = search.loop(searched.module, of_weights, regulariser)
    search.announced(_preflight(search, regulariser))
    search.train(loop)
    price = regulariser.price
    depths = price.depths_near(search.share * price.full, tolerance=settings.tolerance)
    return likeliest(own, searched, depths=depths, step=search.step)


def _preflight(search: Search, regulariser: TransformableSearch) -> Preflight:
    """What is left of a search will take, and training what it finds."""
    own, recipe = search.own, search.recipe.finetune_of("tas")
    images = search.images.for_recipe(recipe)
    training = Passes(
        module=own.module,
        deciding=Deciding.of(images, recipe, resolution=own.resolution),
        count=recipe.phases[0].epochs * images.batches_per_epoch,
    )
    teaching = [replace(training, learns=False)] if search.recipe.distill else []
    return preflight([regulariser.passes], [training, *teaching])


def likeliest(
    own: OwnNetwork, searched: SearchedNetwork, *, depths: Sequence[int], step: int
) -> Found:
    """What is left of a network by what is likeliest in its searched form.

    Args:
        own: The network.
        searched: Its form with distributions.
        depths: Of its stages.
        step: Widths are multiples of this.
    """
    left = own.left_of(shallower(own.module, searched.stages, depths))
    widths = {
        group.name: distribution
        for group, distribution in zip(
            own.graph.groups, searched.width_distributions, strict=True
        )
    }
    chosen = [widths[group.name] for group in left.graph.groups]
    return Found(
        masked=left.masked(),
        order=LikeliestOrder(
            graph=left.graph,
            choices=[one.choices for one in chosen],
            probabilities=[one.probabilities.detach() for one in chosen],
            step=step,
        ),
        own=left,
        fresh=True,
        depths=tuple(
            (stage.name, stage.blocks, depth)
            for stage, depth in zip(searched.stages, depths, strict=True)
        ),
    )


_METHODS: Mapping[ChannelMethod, Callable[[Search], Found]] = {
    "pas": _pas,
    "legr": _legr,
    "autoprune": _autoprune,
    "tas": _tas,
}


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder / "images"
        return
    with TemporaryDirectory(prefix="ofa-deploy-") as name:
        yield Path(name)


@contextmanager
def _executor(given: Executor | None) -> Iterator[Executor]:
    """What was given, or processes of our own: one a core, one thread each."""
    if given is not None:
        yield given
        return
    try:
        from loky import ProcessPoolExecutor
    except ImportError as error:
        raise MissingDependency("loky", extra="shrink") from error
    executor = ProcessPoolExecutor(
        available_cores(),
        env={"OMP_NUM_THREADS": "1"},
        # Else those of a call that was killed go on, and disturb what comes next.
        initializer=end_with,
        initargs=(os.getpid(),),
    )
    try:
        yield executor
    except BaseException:
        executor.shutdown(kill_workers=True)  # nobody waits for what is queued
        raise
    executor.shutdown()


@contextmanager
def _told_if_broken() -> Iterator[None]:
    """Says what to do if its processes end before their work is done."""
    try:
        yield
    except BrokenExecutor as error:
        raise TrainingError(
            f"a process that judges candidates ended: {error}. It had too little "
            "memory, or cannot import the network's module, which must be found on its "
            "sys.path. What was judged is kept; from Python give an executor of fewer "
            "processes, or of threads; from the command line let it have fewer cores "
            "(taskset); or move the network's class where it can be imported"
        ) from error


def _write_log(folder: Path, losses: list[float]) -> None:
    """The best loss after each evaluation, a line each, as trainings log epochs."""
    lines = [
        json.dumps(
            {
                "evaluation": place,
                "best_loss": round(loss, 5) if math.isfinite(loss) else None,
            }
        )
        for place, loss in enumerate(losses, start=1)
    ]
    write_atomically(folder / LOG_FILE, ("\n".join(lines) + "\n").encode())
