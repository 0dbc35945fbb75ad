"""The order in which channels go from what a distribution of widths makes likeliest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from ofa_deploy.errors import SpaceError
from ofa_deploy.shrink.cost import Counts, LayerPrices
from ofa_deploy.shrink.groups import ChannelGraph

# A step of channels that costs so many times what the next one does makes projections
# necessary.
LEAP = 1.1
# Share of a price below which what keeps it is widened: less than what is fitted to a
# budget may be below it, so that a structure of which more is asked for becomes wider.
FIT_TOLERANCE = 0.01
ROUNDING = 1e-9
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LikeliestOrder:
    """A `ChannelOrder`: the likeliest structure, or one near it that costs less.

    Args:
        graph: Of the network.
        choices: Of each group, ascending.
        probabilities: Of these.
        step: Between choices counts are multiples of this.
    """

    graph: ChannelGraph
    choices: Sequence[tuple[int, ...]]
    probabilities: Sequence[Tensor]
    step: int

    @property
    def channels(self) -> list[int]:
        """Of each group, in all."""
        return [choices[-1] for choices in self.choices]

    @property
    def likeliest(self) -> list[int]:
        """The choice of the highest probability of each group."""
        return [
            choices[int(one.argmax())]
            for choices, one in zip(self.choices, self.probabilities, strict=True)
        ]

    def within(self, price: LayerPrices, most: float) -> list[int]:
        """See `ChannelOrder`: the likeliest, narrowed or widened to what is asked for.

        Raises:
            SpaceError: The least that there is to choose costs more.
        """
        cost = _RememberedPrice(self.graph, price)
        most *= 1 + ROUNDING  # sums in another order may differ by so much
        least = [choices[0] for choices in self.choices]
        if cost(least) > most:
            raise SpaceError(
                f"the least that there is to choose costs {cost(least):.4g} "
                f"{price.unit}, more than {most:.4g}; ask for at least that"
            )
        counts = self.likeliest
        while cost(counts) > most:
            counts = with_less(counts, self.choices, self.probabilities, cost)
        enough = (1 - FIT_TOLERANCE) * most
        if cost(counts) < enough:
            counts = self._widened(counts, cost, most)
        while cost(counts) < enough:
            # Where another channel needs a projection, both may be too dear.
            nearer = self._exchanged(counts, cost, most)
            if cost(nearer) <= (1 + ROUNDING) * cost(counts):
                break
            counts = nearer
        return counts

    def kept(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """See `ChannelOrder`: the first ones."""
        return tuple(torch.arange(count) for count in counts)

    def _widened(
        self, counts: Sequence[int], cost: _RememberedPrice, most: float
    ) -> list[int]:
        """With as many steps of channels more as there is room for.

        First where more are drawn on average; but widths along shortcuts stay equal as
        long as there is another way, for unequal ones cost projections.
        """
        found = list(counts)
        while True:
            moves = []
            for index, count in enumerate(found):
                moved = self._wider(found, index)
                if moved != found and cost(moved) <= most:
                    leaps = self._leaps(found, moved, index, cost)
                    moves.append((leaps, -self._mean_excess(index, count), moved))
            if not moves:
                return found
            *_, found = min(moves)

    def _exchanged(
        self, found: Sequence[int], cost: _RememberedPrice, most: float
    ) -> list[int]:
        """Nearer to the price by a step more in one group, and less in another.

        Of those that are near enough the one that is most like what is drawn on
        average.
        """
        exchanges = []
        for index, other in permutations(range(len(found)), 2):
            moved = self._wider(found, index)
            fewer = [moved, *self._narrower(moved, other)]
            steps = bisect_left(fewer, True, key=lambda one: cost(one) <= most)
            if moved != found and steps < len(fewer):
                exchanges.append(fewer[steps])
        enough = [one for one in exchanges if cost(one) >= (1 - FIT_TOLERANCE) * most]
        if enough:
            return min(enough, key=self._distance_from_mean)
        dearest = max(exchanges, key=cost, default=list(found))
        return max(dearest, self._widened(dearest, cost, most), key=cost)

    def _leaps(
        self,
        found: Sequence[int],
        moved: Sequence[int],
        index: int,
        cost: _RememberedPrice,
    ) -> bool:
        """Whether a step costs more than the next one, or the last, by far."""
        rise = cost(moved) - cost(found)
        usual = cost(self._wider(moved, index)) - cost(moved)
        below = self._narrower(found, index)
        if not usual and below:  # there is no next one
            usual = cost(found) - cost(below[0])
        return rise > LEAP * (usual or rise)

    def _wider(self, counts: Sequence[int], index: int) -> list[int]:
        """With a step of channels more in one group, if it has them."""
        wider = min(self.channels[index], counts[index] + self.step)
        return _with(counts, index, wider)

    def _narrower(self, counts: Sequence[int], index: int) -> list[list[int]]:
        """With one step, two, … less in one group, down to the least there is."""
        least = self.choices[index][0]
        below = range((counts[index] - 1) // self.step * self.step, least, -self.step)
        fewer = [*below, least] if counts[index] > least else []
        return [_with(counts, index, count) for count in fewer]

    def _distance_from_mean(self, counts: Sequence[int]) -> float:
        """In channels, each as a share of its group's."""
        return sum(
            abs(self._mean_excess(index, count)) / self.channels[index]
            for index, count in enumerate(counts)
        )

    def _mean_excess(self, index: int, count: int) -> float:
        """How many channels more than it has a group has on average."""
        values = torch.tensor(self.choices[index], dtype=torch.float64)
        return float(self.probabilities[index].double() @ values) - count


def _with(counts: Sequence[int], index: int, count: int) -> list[int]:
    """Counts, of which one is another."""
    return [*counts[:index], count, *counts[index + 1 :]]


def with_less(
    counts: Sequence[int],
    choices: Sequence[Sequence[int]],
    probabilities: Sequence[Tensor],
    cost: Callable[[Sequence[int]], float],
) -> list[int]:
    """With one count's next lower choice: what loses the least chance for its price.

    Where no single one saves anything, as a projection that is needed then may cost
    more, of all of them.

    Args:
        counts: Each one of its choices.
        choices: Ascending.
        probabilities: Of these.
        cost: Of counts.
    """
    now = cost(counts)
    places = [one.index(count) for one, count in zip(choices, counts, strict=True)]
    fewer = [one[max(0, place - 1)] for one, place in zip(choices, places, strict=True)]
    best, least_lost = fewer, float("inf")
    for index, place in enumerate(places):
        moved = [*counts[:index], fewer[index], *counts[index + 1 :]]
        saved = now - cost(moved)
        chances = probabilities[index].double().clamp(min=LEAST_PROBABILITY).log()
        lost = float(chances[place] - chances[max(0, place - 1)])
        if saved > 0 and lost / saved < least_lost:
            best, least_lost = moved, lost / saved
    return best


class _RememberedPrice:
    """A price of channel counts that asks for the same once, of each layer, too.

    Args:
        graph: Of the network.
        price: Of its layers.
    """

    def __init__(self, graph: ChannelGraph, price: LayerPrices) -> None:
        self._price, self._counts = price, Counts(graph)
        self._known: dict[tuple[int, float, float], float] = {}
        self._sums: dict[tuple[int, ...], float] = {}

    def __call__(self, counts: Sequence[int]) -> float:
        """The cost of a network."""
        key = tuple(counts)
        if key not in self._sums:
            read, written = self._counts.of_layers(torch.tensor(counts))
            pairs = zip(read.tolist(), written.tolist(), strict=True)
            layers = (self._of_layer(place, *pair) for place, pair in enumerate(pairs))
            self._sums[key] = self._price.constant + sum(layers)
        return self._sums[key]

    def _of_layer(self, place: int, read: float, written: float) -> float:
        key = (place, read, written)
        if key not in self._known:
            self._known[key] = self._price.of_layer(place, read, written)
        return self._known[key]
