"""Transformable Architecture Search: widths and depths learned by gradient.

Source: X. Dong, Y. Yang, "Network Pruning via Transformable Architecture Search",
NeurIPS 2019, and its code. The network is searched with every width and depth in it;
weights are trained on one half of the training images, the distributions on the other,
where they feel the price, too. What is likeliest in the end is trained from nothing,
with the whole network as its teacher.

Every convolution has a width of its own where shortcuts are modules that can become
projections; elsewhere what is summed has one width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError, TrainingError
from ofa_deploy.ranges import DECAY, NOT_NEGATIVE, PART, POSITIVE, require_in_range
from ofa_deploy.shrink.autoprune import Deciding, only_trained
from ofa_deploy.shrink.cost import LayerPrices, rounded_up
from ofa_deploy.shrink.tas_layers import temperature
from ofa_deploy.shrink.tas_network import SearchedNetwork
from ofa_deploy.shrink.tas_price import ExpectedPrice, cost_loss
from profilers.memory import MemoryGauge

# Timed before a search begins.
PREFLIGHT_PASSES = 2
# How far a logit may go in a whole search, as in those that the rate was tried in: 0.01
# in 3,500 steps. Where there are few steps, no faster than a tenth in each.
LONGEST_WAY, HIGHEST_RATE = 35.0, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TasSettings:
    """How distributions are learned; the published values, with these exceptions.

    The rate, the price's weight, the decay, the base of the tolerance and what the
    search starts from, as said below; the losses of weights and distributions, and of
    what is found, whose labels are smoothed and whose images are mixed as the recipe
    says; and the weights' own rate, which is the recipe's.

    At the rate that few steps need, the published weight of the price and decay drown
    what images say of widths. Measured on ResNet-20 after 31 of 40 epochs: at the
    widths of a layer the price pulled 3 to 30 times as hard as the task, up and down in
    turn, and in 11 of 19 layers no width was likelier than 1 in 5. As set here, after
    as many epochs, that was so in none.

    Args:
        cost_weight: Of the price in the distributions' loss; published is 2.
        tolerance: Share of the target, below it, within which nothing pulls; the
            published code's is a share of the whole price, its text's of the target.
        rate: Of Adam; None lets logits go as far in a search of few steps as in one of
            many. Published are 0.001 and some fifty thousand steps.
        betas: Of Adam.
        weight_decay: Of Adam; published is 0.001.
        highest_temperature: At the beginning; published is 5 with `cosine`, and 10
            with `linear`.
        lowest_temperature: At the end.
        falls: How the temperature falls: `cosine` or `linear`.
        deciding_share: Of the training images, on which distributions are trained.
        searches_depth: Whether blocks of stages may go, too.
        projects: Whether shortcuts that are modules may become projections, as
            published, so that what is added to them has a width of its own.
        fresh: Whether the search starts from new weights, as published, or from those
            that the network has.

    Raises:
        SpaceError: A value makes no sense.
    """

    cost_weight: float = 0.5
    tolerance: float = 0.05
    rate: float | None = None
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 0
    highest_temperature: float = 5.0
    lowest_temperature: float = 0.1
    falls: str = "cosine"
    deciding_share: float = 0.5
    searches_depth: bool = True
    projects: bool = True
    fresh: bool = False

    def __post_init__(self) -> None:
        require_in_range(self, NOT_NEGATIVE, "cost_weight", "weight_decay")
        require_in_range(self, DECAY, "tolerance")
        require_in_range(self, POSITIVE, "rate", optional=True)
        require_in_range(self, POSITIVE, "lowest_temperature", "highest_temperature")
        require_in_range(self, PART, "deciding_share")
        if self.lowest_temperature > self.highest_temperature:
            raise SpaceError(
                f"temperatures {self.highest_temperature:g} to "
                f"{self.lowest_temperature:g}; give a highest one that is no lower "
                "than the lowest"
            )
        betas: tuple[float, ...] = tuple(self.betas)
        if len(betas) != 2 or not all(beta in DECAY for beta in betas):
            raise SpaceError(f"betas={self.betas}; give two, each {DECAY}")
        object.__setattr__(self, "betas", betas)
        if self.falls not in ("cosine", "linear"):
            raise SpaceError(f"falls={self.falls!r}; give 'cosine' or 'linear'")

    def rate_of(self, steps: int) -> float:
        """Of a search of so many steps."""
        if self.rate is not None:
            return self.rate
        return min(HIGHEST_RATE, LONGEST_WAY / steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a call will take, by a few passes.

    Args:
        seconds: Of the search, or the rest of it.
        training_seconds: At most, of training what it finds once: of the whole network.
        memory_mb: Growth of this process's memory by a pass; None where no system
            tells.
    """

    seconds: float
    training_seconds: float
    memory_mb: float | None

    @property
    def told(self) -> str:
        """In words."""
        memory = "" if self.memory_mb is None else f" and {_size(self.memory_mb)} more"
        return (
            f"about {_duration(self.seconds)}{memory}; then at most "
            f"{_duration(self.training_seconds)} to train what is found, and again "
            "should its file miss the budget"
        )


def _size(memory_mb: float) -> str:
    amount = f"{memory_mb:.0f} MB" if memory_mb < 1000 else f"{memory_mb / 1000:.1f} GB"
    return f"{amount} of memory"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passes:
    """Batches that a network is to be run on.

    Args:
        module: The network; not changed.
        deciding: The images.
        count: Of the batches.
        learns: Whether gradients are taken, too.
    """

    module: nn.Module
    deciding: Deciding
    count: int
    learns: bool = True

    def seconds(self, clock: Callable[[], float]) -> float:
        """Time all of them will take, by that of a few on a copy of the network."""
        probe = copy.deepcopy(self.module).train(self.learns)
        began_s = 0.0
        for step in range(PREFLIGHT_PASSES + 1):
            if step == 1:  # the first one is slower
                began_s = clock()
            with torch.set_grad_enabled(self.learns):
                loss = self.deciding.loss(probe, step)
            if self.learns:
                torch.autograd.backward(loss)
        return self.count * (clock() - began_s) / PREFLIGHT_PASSES


def preflight(
    searching: Sequence[Passes],
    training: Sequence[Passes],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Preflight:
    """Time some of the passes of a call, before they begin.

    Args:
        searching: Passes of the search.
        training: Of the training of what it finds.
        clock: Seconds, monotonic.
    """
    gauge = MemoryGauge()
    return Preflight(
        seconds=sum(passes.seconds(clock) for passes in searching),
        training_seconds=sum(passes.seconds(clock) for passes in training),
        memory_mb=gauge.peak_growth_mb(),
    )


class TransformableSearch:
    """A `Regulariser` that trains distributions on images of their own.

    Args:
        searched: The network.
        price: Of its channel counts.
        target_share: Of the whole network's price that is aimed at; in (0, 1].
        settings: How.
        deciding: What distributions are trained with.
        steps: Of the whole search.

    Raises:
        SpaceError: The target is below the least that there is to choose.
    """

    def __init__(
        self,
        searched: SearchedNetwork,
        *,
        price: LayerPrices,
        target_share: float,
        settings: TasSettings,
        deciding: Deciding,
        steps: int,
    ) -> None:
        if not 0 < target_share <= 1:
            raise SpaceError(
                f"target share {target_share:g} of the price; give a number above 0 "
                "and at most 1"
            )
        self.searched = searched
        self.settings = replace(settings, rate=settings.rate_of(steps))
        self.target_share = target_share
        self.deciding, self.steps = deciding, steps
        self.price = ExpectedPrice(searched, price)
        self._full = self.price.full
        least_share = self.price.least / self._full
        if least_share > target_share:
            raise SpaceError(
                f"target {target_share:.3g} of {self._full:.4g} {price.unit}: "
                "the least that there is to choose costs "
                f"{self.price.least:.4g}. Ask for {rounded_up(least_share):.4g} to 1"
            )
        self._logits = [one.logits for one in searched.module.distributions]
        for logits in self._logits:
            logits.requires_grad_(False)
        self._optimizer = torch.optim.Adam(
            self._logits,
            lr=settings.rate_of(steps),
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._step = 0
        self._cool()

    @property
    def rates(self) -> Mapping[str, float]:
        """See `Regulariser`: distributions are not stepped with the weights."""
        return {}

    def loss(self) -> Tensor:
        """See `Regulariser`: weights do not feel the price."""
        return torch.zeros(())

    def after_step(self) -> None:
        """The distributions' own step, on their own images."""
        settings = self.settings
        with only_trained(self.searched.module, self._logits):
            self._optimizer.zero_grad()
            loss = self.deciding.loss(self.searched.module, self._step)
            cost = cost_loss(
                self.price.expected(),
                self.settled_price,
                target=self.target_share * self._full,
                slack=settings.tolerance * self.target_share * self._full,
            )
            torch.autograd.backward(loss + settings.cost_weight * cost.float())
            self._optimizer.step()
        self._step += 1
        self._cool()

    @property
    def passes(self) -> Passes:
        """Those that are left: a step is one of weights, and one of distributions."""
        return Passes(
            module=self.searched.module,
            deciding=self.deciding,
            count=2 * (self.steps - self._step),
        )

    @property
    def settled_price(self) -> float:
        """Price of what is likeliest now."""
        return self.price.settled(self.searched.widths(), self.searched.depths())

    def facts(self) -> dict[str, object]:
        """What is likeliest, what it costs, and all probabilities."""
        return {
            "kept": [*self.searched.widths(), *self.searched.depths()],
            "price_share": round(self.settled_price / self._full, 4),
            "expected_share": round(
                float(self.price.expected().detach()) / self._full, 4
            ),
            "temperature": round(self.searched.module.tau, 4),
            "choices": [[*one.choices] for one in self.searched.module.distributions],
            "probabilities": [
                [round(float(p), 3) for p in one.probabilities.detach()]
                for one in self.searched.module.distributions
            ],
        }

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """See `Regulariser`."""
        found = {
            group.name: (width, group.channels)
            for group, width in zip(
                self.searched.graph.groups, self.searched.widths(), strict=True
            )
        }
        for stage, depth in zip(
            self.searched.stages, self.searched.depths(), strict=True
        ):
            found[stage.name] = (depth, stage.blocks)
        return found

    def remarks(self) -> tuple[str, ...]:
        """See `Regulariser`: what is drawn costs on average, and what is likeliest."""
        expected = float(self.price.expected().detach())
        return (
            f"of the price {expected / self._full:.1%} are expected, "
            f"{self.settled_price / self._full:.1%} likeliest, "
            f"{self.target_share:.1%} asked for; temperature "
            f"{self.searched.module.tau:.2f}",
        )

    def state(self) -> dict[str, Tensor]:
        """See `Regulariser`."""
        found: dict[str, Tensor] = {
            "tas": self._settings_row(),
            "tas_steps": torch.tensor(self._step),
        }
        for index, logits in enumerate(self._logits):
            for name, value in self._optimizer.state.get(logits, {}).items():
                found[f"adam.{index}.{name}"] = value.detach().clone()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Regulariser`."""
        before = state.get("tas")
        if before is None or not torch.equal(before, self._settings_row()):
            raise TrainingError(
                "the search that is to be continued was another one: of another "
                "method, target, price or rate. Continue with the same, or name "
                "another folder"
            )
        self._step = int(state["tas_steps"])
        for index, logits in enumerate(self._logits):
            prefix = f"adam.{index}."
            kept: dict[str, Any] = {
                name.removeprefix(prefix): value.clone()
                for name, value in state.items()
                if name.startswith(prefix)
            }
            if kept:
                self._optimizer.state[logits] = kept
        self._cool()

    def _settings_row(self) -> Tensor:
        values: list[float] = []
        for value in astuple(self.settings):
            if isinstance(value, tuple):
                values += value
            else:
                values.append(
                    float(value == "linear" if isinstance(value, str) else value)
                )
        return torch.tensor(
            [*values, self.target_share, self._full, self.steps], dtype=torch.float64
        )

    def _cool(self) -> None:
        settings = self.settings
        self.searched.module.tau = temperature(
            self._step / self.steps,
            highest=settings.highest_temperature,
            lowest=settings.lowest_temperature,
            falls=settings.falls,
        )
