"""AutoPrune weight by weight: a smaller file, and the same arithmetic.

Source: X. Xiao, Z. Wang, S. Rajasekaran, "AutoPrune: Automatic Network Pruning by
Regularizing Auxiliary Parameters", NeurIPS 2019. Runtimes multiply by zeros like by
anything else: single weights that are gone make a network no faster, and nothing here
says so. What shrinks is what has to be stored or sent.

The paper leaves open where auxiliary parameters begin, and how they are scaled. Here
they begin where the weights' magnitudes put them, beside those that their layer would
have left: with equal ones, which weights fall first would be a matter of chance. How
hard they are pulled at follows from the number of steps, and how far they wander from
the task's own gradient.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ofa_deploy.errors import SpaceError, TraceError, TrainingError
from ofa_deploy.ranges import DECAY, NOT_NEGATIVE, PART, PORTION, require_in_range
from ofa_deploy.shrink.autoprune import (
    AutoPrune,
    Deciding,
    task_gradients,
    typical_gradient,
    wandering_rate,
)
from ofa_deploy.shrink.finetuning import TrainingCallback, finetune, ignore_progress
from ofa_deploy.shrink.masks import (
    INITIAL_LATENT,
    THRESHOLD,
    Estimator,
    estimated_slope,
)
from ofa_deploy.shrink.pas import MOST_PULL, REACHED, STRENGTHENED
from ofa_deploy.shrink.weight_masks import (
    WeightMask,
    indicated,
    initial_heights,
    weights_of,
)
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import NoRegulariser, TrainingLoop
from ofa_deploy.train.precision import prefers_bf16
from ofa_deploy.train.recipe import Recipe

SEARCHING = "searching weights"
# What is left is missed the more, the less it is: the task's gradients grow, and a pull
# that does not grow with them stops short of its share. So the share is led down a path
# as the price of channels is: at each look at which it is this far off, the strength
# becomes so much larger or smaller. The path is what the pull alone would leave.
LOOK_STEPS, PATH_POINTS = 20, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsitySettings:
    """How hard auxiliary parameters of single weights are pulled at.

    Args:
        fall_share: Share of the search's steps, below 1, after which the pull alone
            would have left as many weights as are asked for.
        wander_share: How far the task's gradient alone would take a typical weight's
            parameter in all these steps, by chance, over how far the pull takes it.
        momentum: Of the parameters' optimiser.
        weight_decay: Of weights that are kept; others keep their values.

    Raises:
        SpaceError: A share is none.
    """

    fall_share: float = 0.5
    wander_share: float = 0.25
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        require_in_range(self, PART, "fall_share")
        require_in_range(self, PORTION, "wander_share")
        require_in_range(self, DECAY, "momentum")
        require_in_range(self, NOT_NEGATIVE, "weight_decay")


class SparsityPull:
    """The pull of the number of weights on their auxiliary parameters.

    Args:
        network: Whose weights; its convolutions and linear layers get masks, in place.
        target_share: Weights that are to stay, of those of these layers; in (0, 1].
        steps: Of the search.
        settings: How.
        estimator: Of the masks' gradients.

    Raises:
        TraceError: It has no such layers.
        SpaceError: The target is no share.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        target_share: float,
        steps: int,
        settings: SparsitySettings,
        estimator: Estimator = "softplus",
    ) -> None:
        if not 0 < target_share <= 1:
            raise SpaceError(
                f"target share {target_share:g} of the weights; give a number above 0 "
                "and at most 1"
            )
        self.module, self.target_share, self.steps = network, target_share, steps
        self.settings, self._estimator = settings, estimator
        # Parametrizations belong to a module's class, which its copies share: what is
        # to have none is copied from here.
        self._plain = copy.deepcopy(network)
        self.masks: dict[str, WeightMask] = {}
        weights = weights_of(network)
        if not weights:
            raise TraceError(
                f"{type(network).__name__} has no convolution and no linear layer"
            )
        for name, heights in initial_heights(weights).items():
            mask = WeightMask(heights, estimator=estimator)
            layer = network.get_submodule(name)
            parametrize.register_parametrization(layer, "weight", mask)
            self.masks[name] = mask
        self.weight_count = sum(mask.latent.numel() for mask in self.masks.values())
        # Of the parameters' whole way; what sums up to it in `steps` steps.
        self._height = self._least_of(self._count(target_share)) - THRESHOLD
        self._rate, self._strength, self._first_strength = 0.0, 0.0, 0.0
        self._steps, self._path = 0, self._planned_shares()
        # Of each layer: its weights, which are removed, and what they all were then.
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []
        self._note()

    def scale_to(self, gradient: float) -> None:
        """Choose the rate, and the pull's strength.

        Args:
            gradient: Of the task, of a typical parameter.
        """
        momentum = self.settings.momentum
        self._rate = wandering_rate(
            gradient,
            way=self.settings.wander_share * self._height,
            steps=self.steps,
            momentum=momentum,
        )
        way = float(self._way_pulled(torch.tensor(self._height, dtype=torch.float64)))
        fall = way / (self.settings.fall_share * self.steps)
        self._first_strength = fall * (1 - momentum) / self._rate
        self._strength = self._first_strength

    def _way_pulled(self, height: Tensor) -> Tensor:
        """Steps that a pull of 1 takes for a parameter's way: `∫ dh / slope(h)`."""
        if self._estimator == "softplus":
            return height + 1 - torch.exp(-height)
        return height

    @torch.no_grad()
    def _planned_shares(self) -> list[float]:
        """Weights that the pull alone would leave, at even parts of its fall."""
        ways = [self._way_pulled(p.flatten() - THRESHOLD) for p in self.latents]
        sorted_ways = torch.cat(ways).sort().values
        parts = (
            torch.linspace(0, 1, PATH_POINTS + 1)
            * sorted_ways[-self._count(self.target_share)]
        )
        gone = torch.searchsorted(sorted_ways, parts)
        return (1 - gone.double() / len(sorted_ways)).tolist()

    @property
    def path(self) -> float:
        """Share of the weights that is to be left by now."""
        done = self._steps / (self.settings.fall_share * self.steps)
        if done >= 1:
            return self.target_share
        return max(self._path[int(done * PATH_POINTS)], self.target_share)

    def _led_strength(self) -> float:
        """A little more above the path of the share, a little less below it.

        Never less than at first: where the share is reached nothing pulls, and what
        comes back then is to meet what it met before.
        """
        share, factor = self.current_share(), 1.0
        if share > REACHED * self.path:
            factor = STRENGTHENED
        elif share < self.path / REACHED:
            factor = 1 / STRENGTHENED
        least, most = self._first_strength, MOST_PULL * self._first_strength
        return min(max(factor * self._strength, least), most)

    @property
    def latents(self) -> list[nn.Parameter]:
        """Auxiliary parameters of all layers."""
        return [mask.latent for mask in self.masks.values()]

    @property
    def latent_rates(self) -> Sequence[float]:
        """Their rates now: after the fall they go to 0, so that masks settle.

        One for all, as one share is asked for of all weights together, and the order
        in which they fall is of all of them, too.
        """
        left = 1 - self._steps / self.steps
        rate = self._rate * min(1.0, left / (1 - self.settings.fall_share))
        return [rate] * len(self.masks)

    @property
    def momentum(self) -> float:
        """Of their optimiser."""
        return self.settings.momentum

    def flags(self) -> Tensor:
        """Of all weights, one after the other, whether they are kept."""
        return torch.cat([(p.detach() > THRESHOLD).flatten() for p in self.latents])

    def current_share(self) -> float:
        """Weights that are kept, of all."""
        return float(self.flags().float().mean())

    def loss(self) -> Tensor:
        """While too many weights are kept: the strength times their number."""
        if self.current_share() <= self.target_share:
            return torch.zeros(())
        kept = [
            indicated(torch.ones_like(p), p, estimator=self._estimator).sum()
            for p in self.latents
        ]
        return self._strength * torch.stack(kept).sum()

    def weights_loss(self) -> Tensor:
        """Weight decay of the weights that are kept."""
        squares = []
        for name in self.masks:
            weight = self.module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            squares.append(weight.square().sum())
        return 0.5 * self.settings.weight_decay * torch.stack(squares).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep what is removed as it was, which momentum has moved; lead the share.

        A single weight is no layer that could collapse.
        """
        self._steps += 1
        if self._steps % LOOK_STEPS == 0:
            self._strength = self._led_strength()
        for weight, gone, before in self._noted:
            weight.copy_(torch.where(gone, before, weight))
        self._note()

    @torch.no_grad()
    def _note(self) -> None:
        """Keep the weights that masks remove now, as they are now."""
        self._noted = []
        for name, mask in self.masks.items():
            layer = self.module.get_submodule(name)
            weight = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
            assert isinstance(weight, Tensor)
            gone = mask.latent <= THRESHOLD
            self._noted.append((weight, gone, weight.clone()))

    def facts(self) -> dict[str, object]:
        """Weights kept of each layer, and of all the share."""
        return {
            "kept": [kept for kept, _ in self.kept().values()],
            "price_share": round(self.current_share(), 5),
            "path": round(self.path, 5),
            "strength": round(self._strength / self._first_strength, 3),
        }

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """Weights kept, and all weights, of each layer."""
        return {
            name: (int((mask.latent.detach() > THRESHOLD).sum()), mask.latent.numel())
            for name, mask in self.masks.items()
        }

    def remarks(self) -> tuple[str, ...]:
        """None."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """What decides a search besides its recipe, and how far it has come."""
        slope = float(estimated_slope(torch.tensor(-1.0), self._estimator))
        decides = [self.target_share, self.steps, slope, *astuple(self.settings)]
        # The rate, too: gradients differ from machine to machine in their last digits.
        come = [self._rate, self._first_strength, self._strength, self._steps]
        return {
            "sparsity": torch.tensor(decides, dtype=torch.float64),
            "come": torch.tensor(come, dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with a search; refuse another one."""
        before, come = state.get("sparsity"), state.get("come")
        mine = self.state()["sparsity"]
        if before is None or come is None or not torch.equal(before, mine):
            raise TrainingError(
                "the search that is to be continued was another one: of another "
                "target, estimator or settings. Continue with the same, or name "
                "another folder"
            )
        self._rate, self._first_strength, self._strength, steps = come.tolist()
        self._steps = int(steps)
        self._note()

    def _count(self, share: float) -> int:
        return max(1, round(share * self.weight_count))

    def _least_of(self, count: int) -> float:
        """The least of so many of the largest parameters."""
        values = torch.cat([p.detach().flatten() for p in self.latents])
        return float(values.kthvalue(self.weight_count - count + 1).values)

    # -- after the search --------------------------------------------------------------

    @torch.no_grad()
    def freeze(self, count: int) -> None:
        """Keep the weights with the largest parameters, for good.

        Args:
            count: How many; with all of those that are equal to the last.
        """
        for latent, kept in zip(self.latents, self._largest(count), strict=True):
            latent.copy_(kept.to(latent.dtype) * INITIAL_LATENT)
            latent.requires_grad_(False)

    def narrowed_to(self, count: int) -> nn.Module:
        """A copy of the network with so many weights, and zeros; no masks are left."""
        return self._plainly(self._largest(count))

    def without_masks(self) -> nn.Module:
        """A copy of the network as it is, of ordinary layers with zeros in them."""
        return self._plainly([p.detach() > THRESHOLD for p in self.latents])

    def _largest(self, count: int) -> list[Tensor]:
        """Whether each weight is among so many with the largest parameters."""
        least = self._least_of(min(max(1, count), self.weight_count))
        return [latent.detach() >= least for latent in self.latents]

    def _plainly(self, kept: Sequence[Tensor]) -> nn.Module:
        state = self.module.state_dict()
        names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, layer in self.module.named_modules(remove_duplicate=False):
            names[layer].append(name)
        for masked, mine in zip(self.masks, kept, strict=True):
            for name in names[self.module.get_submodule(masked)]:
                del state[f"{name}.parametrizations.weight.0.latent"]
                weight = state.pop(f"{name}.parametrizations.weight.original")
                state[f"{name}.weight"] = weight * mine
        network = copy.deepcopy(self._plain)
        network.load_state_dict(state)
        return network.eval()


def search_weights(
    model: nn.Module,
    *,
    target_share: float,
    settings: SparsitySettings,
    estimator: Estimator,
    deciding_share: float,
    resolution: int,
    images: TrainingImages,
    recipe: Recipe,
    folder: Path | None,
    on_progress: TrainingCallback = ignore_progress,
) -> SparsityPull:
    """Search which weights stay; returns the masks, and with them the trained copy.

    Args:
        model: Trained; not changed.
        target_share: Weights that are to stay, in (0, 1].
        settings: How hard the others are pulled at.
        estimator: Of the masks' gradients.
        deciding_share: Of the training images, on which masks are trained, and weights
            are not.
        resolution: Height and width of its inputs.
        images: To train on.
        recipe: Of one phase: weights and auxiliary parameters together.
        folder: Keeps the search, which is continued; None to keep nothing.
        on_progress: Called with what is trained, and how far it is.

    Raises:
        TraceError: The network has no weights that could go.
        TrainingError: A loss is no number, or the folder holds another run.
    """
    of_weights, of_masks = images.for_recipe(recipe).parted(deciding_share)
    pull = SparsityPull(
        copy.deepcopy(model),
        target_share=target_share,
        steps=recipe.phases[0].epochs * of_weights.batches_per_epoch,
        settings=settings,
        estimator=estimator,
    )
    deciding = Deciding.of(of_masks, recipe, resolution=resolution)
    # Of the network as it was brought: a search that goes on finds the same.
    gradients = task_gradients(pull.module, pull.latents, deciding)
    pull.scale_to(typical_gradient(gradients, pull.latents))
    TrainingLoop(
        pull.module,
        images=of_weights,
        recipe=recipe,
        resolution=resolution,
        folder=folder,
        bf16=prefers_bf16(),
        regulariser=AutoPrune(pull, deciding=deciding),
    ).run(lambda progress: on_progress(SEARCHING, progress))
    return pull


def finetune_weights(
    pull: SparsityPull,
    *,
    resolution: int,
    images: TrainingImages,
    recipe: Recipe,
    folder: Path | None,
    teacher: nn.Module | None = None,
    on_progress: TrainingCallback = ignore_progress,
) -> nn.Module:
    """Train the weights that stayed; returns the network without masks.

    Args:
        pull: Frozen.
        resolution: Height and width of the inputs.
        images: To train on.
        recipe: Of one phase.
        folder: Keeps the run, which is continued; None to keep nothing.
        teacher: Whose class probabilities are learned, too.
        on_progress: Called with what is trained, and how far it is.
    """
    finetune(
        pull.module,
        resolution=resolution,
        recipe=recipe,
        images=images,
        folder=folder,
        teacher=teacher,
        regulariser=_KeptDecay(pull),
        on_progress=on_progress,
    )
    return pull.without_masks()


class _KeptDecay(NoRegulariser):
    """Weight decay of the weights that are kept, and nothing else."""

    def __init__(self, pull: SparsityPull) -> None:
        self._pull = pull

    def loss(self) -> Tensor:
        """See `Regulariser`."""
        return self._pull.weights_loss()
