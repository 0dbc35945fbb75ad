"""How a network is shrunk, as values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, get_args

from ofa_deploy.errors import SpaceError
from ofa_deploy.ranges import COUNT, PART, POSITIVE, require_in_range
from ofa_deploy.shrink.groups import ChannelGraph
from ofa_deploy.shrink.legr import LegrSettings
from ofa_deploy.shrink.masks import Estimator
from ofa_deploy.shrink.ranking import quota_floors
from ofa_deploy.shrink.sparse import SparsitySettings
from ofa_deploy.shrink.tas import TasSettings
from ofa_deploy.shrink.tas_layers import width_choices
from ofa_deploy.train.recipe import Phase, Recipe

ChannelMethod = Literal["pas", "legr", "autoprune", "tas"]
# The last takes single weights: a smaller file, and no less time.
Method = ChannelMethod | Literal["autoprune-weights"]
KNOWLEDGE_TEMPERATURE = 4.0
METHODS: tuple[Method, ...] = (*get_args(ChannelMethod), "autoprune-weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkRecipe:
    """How a network is shrunk.

    Args:
        search: Training while widths are searched; of one phase. LeGR has none.
        finetune: Training of what was found; of one phase.
        distill: Whether the network that was brought teaches while it is fine-tuned.
        floor: Channels that every group keeps, rounded up to a multiple of the step.
        step: Channel counts are multiples of this; None measures what the runtime's
            kernels work in.
        flip_share: Of pas and autoprune: share of the search's steps in which the price
            alone would remove a channel of the layer whose channels it pulls down
            fastest.
        wander_share: Likewise: how far the task alone would take a channel's latent
            weight in all these steps, by chance, over the way to its threshold.
            With less, the channels of a layer fall together, and the task has no say.
        latent_rate: Likewise, of all layers; None takes what follows for each from
            `wander_share`.
        deciding_share: Of both forms of autoprune: share of the training images on
            which masks are trained, and weights are not.
        estimator: Of both forms of autoprune: of its masks' gradient.
        sparsity: Of autoprune-weights.
        legr: Of legr.
        tas: Of tas.
        lowest_share: Of legr: share of the network's price at which the ranking is
            learned; None takes the budget. With one share, and one folder of work, all
            budgets above it are served by one search.
    """

    search: Recipe
    finetune: Recipe
    distill: bool = True
    floor: int = 8
    step: int | None = None
    flip_share: float = 0.3
    wander_share: float = 0.25
    latent_rate: float | None = None
    deciding_share: float = 0.2
    estimator: Estimator = "softplus"
    sparsity: SparsitySettings = field(default_factory=SparsitySettings)
    legr: LegrSettings = field(default_factory=LegrSettings)
    tas: TasSettings = field(default_factory=TasSettings)
    lowest_share: float | None = None

    def __post_init__(self) -> None:
        for name, recipe in (("search", self.search), ("finetune", self.finetune)):
            epochs = [phase.epochs for phase in recipe.phases]
            if len(epochs) != 1 or epochs[0] < 1:
                raise SpaceError(
                    f"{name} has phases of {epochs} epochs; give one phase, of at "
                    "least 1"
                )
        require_in_range(self, COUNT, "floor")
        require_in_range(self, PART, "deciding_share", "flip_share", "wander_share")
        require_in_range(self, COUNT, "step", optional=True)
        require_in_range(self, POSITIVE, "latent_rate", optional=True)
        require_in_range(self, PART, "lowest_share", optional=True)
        if self.estimator not in get_args(Estimator):
            raise SpaceError(
                f"estimator={self.estimator!r}; give one of "
                f"{', '.join(get_args(Estimator))}"
            )

    def aligned_floor(self, step: int) -> int:
        """The floor of channels, as a multiple of the step."""
        return math.ceil(self.floor / step) * step

    def of_search(self, method: Method) -> dict[str, object]:
        """What decides a search, and not how what it finds is trained further."""
        found = asdict(self)
        if method == "legr":  # trains nothing
            decides = ("legr", "floor", "step", "lowest_share")
            return {name: found[name] for name in decides}
        return {k: v for k, v in found.items() if k not in ("finetune", "distill")}

    def finetune_of(self, method: Method) -> Recipe:
        """Of tas with a teacher at a temperature, as published, if there is none."""
        if method != "tas" or self.finetune.temperature is not None:
            return self.finetune
        return replace(self.finetune, temperature=KNOWLEDGE_TEMPERATURE)

    def floors(
        self, graph: ChannelGraph, *, method: ChannelMethod, step: int
    ) -> list[int]:
        """Least channels of each group; of LeGR also what its safeguard keeps."""
        if method == "tas":
            return [width_choices(g.channels, step=step)[0] for g in graph.groups]
        floor = self.aligned_floor(step)
        floors = [min(floor, group.channels) for group in graph.groups]
        if method != "legr":
            return floors
        quotas = quota_floors(graph, safeguard=self.legr.safeguard, step=step)
        return [max(pair) for pair in zip(floors, quotas, strict=True)]


def default_shrink_recipe(
    *,
    method: str = "pas",
    search_epochs: int = 10,
    finetune_epochs: int = 30,
    batch_size: int = 256,
    rate: float = 1.0,
) -> ShrinkRecipe:
    """Search at a low rate, then fine-tune at a higher one.

    Args:
        method: Whose: what `tas` finds is trained from nothing, at twice the rate.
        search_epochs: Passes over the data while widths are searched.
        finetune_epochs: Passes afterwards.
        batch_size: Images per step.
        rate: Factor on both learning rates. They are of networks that were trained on
            these images in batches of 256: what was trained on many others forgets it,
            and smaller batches step more often.

    Raises:
        SpaceError: The rate is none.
    """
    if not 0 < rate < math.inf:
        raise SpaceError(f"rate={rate:g}; give a number above 0, such as 0.1")

    def recipe(name: str, epochs: int, peak: float) -> Recipe:
        phase = Phase(
            name=name,
            epochs=epochs,
            warmup_epochs=min(1.0, epochs / 4),
            peak_learning_rate=rate * peak,
            distill=False,
            cutmix_share=0.25,
        )
        return Recipe(phases=(phase,), batch_size=batch_size)

    return ShrinkRecipe(
        search=recipe("search", search_epochs, 0.02),
        finetune=recipe("finetune", finetune_epochs, 0.1 if method == "tas" else 0.05),
    )
