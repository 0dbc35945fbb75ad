"""Pruning-as-Search: widths learned by gradient while the weights are trained.

Source: Y. Li et al., "Pruning-as-Search: Efficient Neural Architecture Search via
Channel Pruning and Structural Reparameterization", IJCAI 2022. What is other than
there: the price can be the device's milliseconds; weights are trained as all networks
here are (see `train.optimizer`), on mixed images; latents have no decay, and those of
each layer a rate of their own, as what the task tells them differs from layer to layer
(at one for all, many channels over small maps hardly move while a search lasts, however
little they are worth); the strength of the regulariser follows from the steps that a
channel should take to fall, and leads the price down a path; layers keep a floor of
channels, and one that collapses is opened again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError, TrainingError
from ofa_deploy.ranges import COUNT, DECAY, PORTION, require_in_range
from ofa_deploy.shrink.cost import Price, full_counts
from ofa_deploy.shrink.masks import (
    INITIAL_LATENT,
    THRESHOLD,
    MaskedModule,
    MaskedNetwork,
    estimated_slope,
)
from ofa_deploy.shrink.removed_weights import RemovedWeights

# A layer that loses this share of the channels above its floor between two looks has
# collapsed.
COLLAPSED_SHARE = 0.5
# Steps between two looks.
COLLAPSE_WINDOW = 20
# How far above the threshold channels are that were opened again: far enough not to
# fall at once, their order kept.
REOPENED_MARGIN = 0.25
# The task resists the more, the less is left, and the pull fades as the price comes
# near its target. So the price is led down a path: each look at which it is this far
# off makes the strength so much larger or smaller. The path goes down from where the
# price alone would have taken the first channels, to the target by this share of the
# steps.
REACHED = 1.01
STRENGTHENED = 1.15
DOWN_BY_SHARE = 0.8
# Of what pulls at first: nothing pulls harder, nor with less strength. Where the task
# itself takes channels, the price passes its target, and what had faded until then
# could not pull it back.
MOST_PULL = 10.0
LEAST_STRENGTH = 0.1
# Where the price's slope is looked at, between the whole network and the target: a
# runtime that pads channels may have none at the top.
SLOPE_POINTS = 9
# Shares of the price: a target nearer than the first is not pulled at any harder for
# that, and no strength makes up for less than the second, so that it fades at last.
LEAST_DISTANCE, LEAST_OFF = 0.2, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PasSettings:
    """How widths are searched.

    Args:
        target_share: Price to reach, as a share of the whole network's; in (0, 1].
        steps_to_flip: Steps that the regulariser alone, at its first value, takes to
            remove a channel of the layer whose channels it pulls down fastest.
        momentum: Of the optimiser that steps the latents.
        floor: Channels that every group keeps, or all it has.
        step: Channel counts end as multiples of this, as the runtime likes them.
    """

    target_share: float
    steps_to_flip: int = 400
    momentum: float = 0.9
    floor: int = 8
    step: int = 8

    def __post_init__(self) -> None:
        require_in_range(self, PORTION, "target_share")
        require_in_range(self, DECAY, "momentum")
        require_in_range(self, COUNT, "floor", "step", "steps_to_flip")


class PruningAsSearch:
    """The regulariser, and what keeps it from emptying layers.

    Args:
        masked: The network that is trained, with its masks.
        price: Of channel counts.
        settings: How.
        latent_rates: Learning rates of the groups' latents, in their order.
        steps: Of the whole search: after the last one, too, is looked whether a layer
            collapsed; 0 where it is not known.
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        *,
        price: Price,
        settings: PasSettings,
        latent_rates: Sequence[float],
        steps: int = 0,
    ) -> None:
        self.masked = masked
        self.latent_rates = tuple(latent_rates)
        self.steps = steps
        self.settings = settings
        self.price = price
        self.floors = [min(settings.floor, g.channels) for g in masked.graph.groups]
        self.full_price = float(price(full_counts(masked.graph)))
        least = float(price(torch.tensor(self.floors, dtype=torch.float64)))
        if least > settings.target_share * self.full_price:
            raise SpaceError(
                f"target {settings.target_share:.3g} of {self.full_price:.4g} "
                f"{price.unit}: with {settings.floor} channels in every layer the "
                f"network still costs {least:.4g}. Ask for more, or lower the floor"
            )
        # What pulls is bounded by a multiple of what this one pulls at first.
        self._first_strength = self._calibrated_strength()
        self.strength = self._first_strength
        self.collapses: list[str] = []
        self._steps = 0
        self._counts_before = self._counts()
        # Since the last look, before the floor was given back; all, where it was not.
        self._fallen_to = self._channels
        self._removed = RemovedWeights(masked)

    def _calibrated_strength(self) -> float:
        """So that the fastest latent falls by a half in `steps_to_flip` steps.

        With momentum m and rate r a constant gradient g moves a latent by
        `r / (1 - m) * g` a step.
        """
        settings = self.settings
        distance = max(1 - settings.target_share, LEAST_DISTANCE)
        # Midway of the fall stands for all of it.
        height = torch.tensor((INITIAL_LATENT - THRESHOLD) / 2)
        estimator = self.masked.masks[0].estimator
        fastest = self._fastest_fall() / self.full_price * 2 * distance
        fastest *= float(estimated_slope(height, estimator))
        if fastest <= 0:
            return 0.0
        per_step = fastest / (1 - settings.momentum)
        fall = INITIAL_LATENT - THRESHOLD
        return fall / (per_step * settings.steps_to_flip)

    def _fastest_fall(self) -> float:
        """Of any group: its rate times the price's slope, as all are narrowed alike.

        Those that have no more than their floor do not fall.
        """
        full = full_counts(self.masked.graph).double()
        floors = torch.tensor(self.floors, dtype=full.dtype)
        rates = torch.tensor(self.latent_rates, dtype=full.dtype) * (full > floors)
        falls = []
        for share in torch.linspace(1.0, self.settings.target_share, SLOPE_POINTS):
            counts = (full * share).requires_grad_()
            (slope,) = torch.autograd.grad(self.price(counts), counts)
            falls.append(float((rates * slope).max()))
        return max(falls)

    # -- as a regulariser --------------------------------------------------------------

    @property
    def module(self) -> MaskedModule:
        """The network, with its masks."""
        return self.masked.module

    @property
    def latents(self) -> list[nn.Parameter]:
        """Latent weights of all groups."""
        return [mask.latent for mask in self.masked.masks]

    @property
    def momentum(self) -> float:
        """Of their optimiser."""
        return self.settings.momentum

    def flags(self) -> Tensor:
        """Of all channels, one after the other, whether they are kept."""
        return torch.cat([latent.detach() > THRESHOLD for latent in self.latents])

    def weights_loss(self) -> Tensor:
        """Weights do not feel the price."""
        return torch.zeros(())

    @property
    def rates(self) -> Mapping[str, float]:
        """See `Regulariser`."""
        return dict(zip(self.masked.latent_names(), self.latent_rates, strict=True))

    def loss(self) -> Tensor:
        """`strength · (price / full price - target)²`."""
        share = self.price(self.masked.counts) / self.full_price
        return self.strength * (share - self.settings.target_share) ** 2

    def after_step(self) -> None:
        """Keep what is removed, and the floor; open what has collapsed again."""
        self._removed.put_back()
        for index, floor in enumerate(self.floors):
            mask = self.masked.masks[index]
            if (count := len(mask.kept())) < floor:
                self._fallen_to[index] = min(count, self._fallen_to[index])
                _reopen(mask.latent.data, floor)
        self._steps += 1
        if self._steps % COLLAPSE_WINDOW == 0 or self._steps == self.steps:
            self._look()
        self._removed.note()

    def facts(self) -> dict[str, object]:
        """Kept channels of each group, how far their latents spread, and the price."""
        return {
            "kept": self._counts(),
            "latent_std": [
                round(float(latent.std(correction=0)), 4)
                for latent in self.masked.latents()
            ],
            "price_share": round(self.current_share(), 4),
            "strength": round(self.strength, 4),
            "collapses": list(self.collapses),
        }

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """See `Regulariser`."""
        return {
            group.name: (count, group.channels)
            for group, count in zip(
                self.masked.graph.groups, self._counts(), strict=True
            )
        }

    def remarks(self) -> tuple[str, ...]:
        """See `Regulariser`."""
        times = Counter(self.collapses)
        return tuple(
            f"{name} collapsed and was opened again"
            + (f", {count} times" if count > 1 else "")
            + "; the pull is halved"
            for name, count in times.items()
        )

    def state(self) -> dict[str, Tensor]:
        """See `Regulariser`."""
        names = [group.name for group in self.masked.graph.groups]
        return {
            "settings": self._settings_row(),
            "strength": torch.tensor(self.strength, dtype=torch.float64),
            "steps": torch.tensor(self._steps),
            "counts_before": torch.tensor(self._counts_before),
            "fallen_to": torch.tensor(self._fallen_to),
            "collapses": torch.tensor(
                [names.index(name) for name in self.collapses], dtype=torch.long
            ),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Regulariser`."""
        groups = self.masked.graph.groups
        before = state.get("settings")
        if before is None or not torch.equal(before, self._settings_row()):
            raise TrainingError(
                "the search that is to be continued was another one: of another "
                "target, price, rate or floor, or of an earlier version. Continue with "
                "the same, or name another folder"
            )
        self.strength = float(state["strength"])
        self._steps = int(state["steps"])
        self._counts_before = [int(count) for count in state["counts_before"]]
        self._fallen_to = [int(count) for count in state["fallen_to"]]
        self.collapses = [groups[int(index)].name for index in state["collapses"]]
        self._removed.note()

    def _settings_row(self) -> Tensor:
        """What decides a search besides its recipe, to tell another one by."""
        mask = self.masked.masks[0]
        slope = float(estimated_slope(torch.tensor(-1.0), mask.estimator))
        decides = [*astuple(self.settings), self.full_price, slope]
        values = [*decides, *self.latent_rates, *self.floors]
        return torch.tensor(values, dtype=torch.float64)

    def current_share(self) -> float:
        """Price of what is kept now, as a share of the whole network's."""
        return self._share_of(self._counts())

    def _share_of(self, counts: Sequence[int]) -> float:
        with torch.no_grad():
            price = self.price(torch.tensor(counts, dtype=torch.float64))
        return float(price) / self.full_price

    @property
    def _channels(self) -> list[int]:
        return [group.channels for group in self.masked.graph.groups]

    def _counts(self) -> list[int]:
        return [len(mask.kept()) for mask in self.masked.masks]

    def _look(self) -> None:
        """Open again what has collapsed, and pull less; else lead the price on.

        All channels of a layer feel one pull; without another they fall at once. Then
        the pull is too strong for the task to have a say.
        """
        collapsed = self._collapsed()
        for index in collapsed:
            _reopen(self.masked.masks[index].latent.data, self._counts_before[index])
            self.collapses.append(self.masked.graph.groups[index].name)
        if collapsed:
            self.strength /= 2
        else:
            self.strength = self._led_strength()
        self._counts_before = self._counts()
        self._fallen_to = self._channels

    def _collapsed(self) -> list[int]:
        """Groups that lost most of their channels since the last look.

        What is asked is what they had before the floor was given back to them.
        """
        least = 2 * self.settings.step
        lowest = map(min, self._counts(), self._fallen_to)
        return [
            index
            for index, (before, now, floor) in enumerate(
                zip(self._counts_before, lowest, self.floors, strict=True)
            )
            # Above the floor, which is kept in any case; a step or two is no collapse.
            if before > floor
            and before - now >= min(least, before)
            and before - now > COLLAPSED_SHARE * (before - floor)
        ]

    def _led_strength(self) -> float:
        """A little more above the path of the price, a little less below it.

        Below its target, too, a little more, for as long as the price does not come
        back by itself. However far it is from there, on whichever side, what pulls is
        bounded.
        """
        target, share, path = (
            self.settings.target_share,
            self.current_share(),
            self.path,
        )
        first = max(1 - target, LEAST_DISTANCE)
        most = MOST_PULL * self._first_strength * first
        most /= max(abs(share - target), LEAST_OFF)
        comes_back = share > self._share_of(self._counts_before)
        if share > REACHED * path or (share < target / REACHED and not comes_back):
            factor = STRENGTHENED
        elif share < path / REACHED:  # or the way back would be as steep
            factor = 1 / STRENGTHENED
        else:
            factor = 1.0
        least = LEAST_STRENGTH * self._first_strength
        return min(max(factor * self.strength, least), most)

    @property
    def path(self) -> float:
        """Share of the price that the search is to have come down to by now."""
        begin, end = self.settings.steps_to_flip, DOWN_BY_SHARE * self.steps
        past = self._steps - begin
        if end <= begin:  # few steps, or nobody knows how many
            gone = float(past >= 0)
        else:
            gone = min(max(past / (end - begin), 0.0), 1.0)
        return 1 - gone * (1 - self.settings.target_share)


def _reopen(latent: Tensor, count: int) -> None:
    """Raise the `count` largest latents above the threshold, in their order."""
    chosen = latent.argsort(descending=True)[:count]
    ranks = torch.linspace(1.0, 0.0, count + 1)[:count]
    raised = THRESHOLD + REOPENED_MARGIN * ranks
    latent[chosen] = torch.maximum(latent[chosen], raised)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentOrder:
    """A `ChannelOrder` by latent weights, the lowest first.

    Args:
        latents: Of each group, `(channels,)`.
        step: Of the counts.
        floors: Least count of each group.
    """

    latents: Sequence[Tensor]
    step: int
    floors: Sequence[int]

    def within(self, price: Price, most: float) -> list[int]:
        """See `ChannelOrder`: what the latents ask for, as dear as is allowed."""
        return settle_counts(
            self.latents, price=price, most=most, step=self.step, floors=self.floors
        )

    def kept(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """See `ChannelOrder`: those with the largest latents."""
        return tuple(
            latent.argsort(descending=True, stable=True)[:count].sort().values
            for latent, count in zip(self.latents, counts, strict=True)
        )


def settle_counts(
    latents: Sequence[Tensor],
    *,
    price: Price,
    most: float,
    step: int,
    floors: Sequence[int],
) -> list[int]:
    """Channel counts that the latents ask for, aligned, and as dear as is allowed.

    Counts are rounded to the nearest multiple of `step`. Then, while the price is above
    `most`, the group gives up a step whose latents there are the lowest; while a step
    still fits, the group gets one whose latents there are the highest. Latents of all
    groups are compared as they are: by chance alone they wander as far.

    Args:
        latents: Of each group, `(channels,)`.
        price: Of channel counts.
        most: Price not to exceed.
        step: Of the counts.
        floors: Least count of each group.

    Raises:
        SpaceError: Even the floors cost more.
    """
    ordered = [latent.detach().sort(descending=True).values for latent in latents]
    counts = [
        _aligned(int((latent > THRESHOLD).sum()), step, floor, len(latent))
        for latent, floor in zip(ordered, floors, strict=True)
    ]

    def cost(of: list[int]) -> float:
        return float(price(torch.tensor(of, dtype=torch.float64)))

    while cost(counts) > most:
        losses = {
            index: float(ordered[index][less:count].mean())
            for index, count in enumerate(counts)
            if (less := _step_down(count, step, floors[index])) < count
        }
        if not losses:
            raise SpaceError(
                f"the least network costs {cost(counts):.4g} {price.unit}, more than "
                f"{most:.4g}; ask for more, or lower the floor"
            )
        index = min(losses, key=losses.__getitem__)
        counts[index] = _step_down(counts[index], step, floors[index])
    while True:
        gains = {}
        for index, count in enumerate(counts):
            more = min(len(ordered[index]), (count // step + 1) * step)
            wider = [*counts[:index], more, *counts[index + 1 :]]
            if more > count and cost(wider) <= most:
                gains[index] = (float(ordered[index][count:more].mean()), more)
        if not gains:
            return counts
        index = max(gains, key=lambda place: gains[place][0])
        counts[index] = gains[index][1]


def _aligned(count: int, step: int, floor: int, most: int) -> int:
    """The multiple of `step` that is nearest, within the bounds."""
    return min(most, max(floor, math.floor(count / step + 0.5) * step))


def _step_down(count: int, step: int, floor: int) -> int:
    return max(floor, (math.ceil(count / step) - 1) * step)
