"""What a network costs whose widths and depths are distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from ofa_deploy.errors import SpaceError, TraceError
from ofa_deploy.shrink.cost import Counts, LayerPrices
from ofa_deploy.shrink.groups import ChannelGraph, Side, TracedLayer
from ofa_deploy.shrink.stages import Stage, stage_read
from ofa_deploy.shrink.tas_layers import Distribution
from ofa_deploy.shrink.tas_network import SearchedNetwork

# A step of channels that costs so many times what the next one does makes projections
# necessary.
LEAP = 1.1
# Share of a price below which what keeps it is widened: less than what is fitted to a
# budget may be below it, so that a structure of which more is asked for becomes wider.
FIT_TOLERANCE = 0.01
ROUNDING = 1e-9
LEAST_PROBABILITY = 1e-12
# Share of a price that the narrowest widths may cost at the depths that are kept: what
# is fitted by measuring is narrowed further than its price says.
NARROWEST_SHARE = 0.9


class ExpectedPrice:
    """The price of a network whose widths and depths are not settled yet.

    Of every layer the price at all its choices is known; widths of different groups,
    and depths, are drawn apart, so that the expectation is a product.

    Args:
        searched: The network.
        price: Of channel counts.
    """

    def __init__(self, searched: SearchedNetwork, price: LayerPrices) -> None:
        self.searched = searched
        widths = searched.width_distributions
        self._choices = [one.choices for one in widths]
        graph = searched.graph
        self.constant = price.constant
        self._layers = [
            _PricedLayer.of(graph, place, price, self._choices, searched.stages)
            for place in range(len(graph.layers))
        ]

    def expected(self) -> Tensor:
        """Mean price of what is drawn; differentiable."""
        widths = [
            one.probabilities.double() for one in self.searched.width_distributions
        ]
        ends = [_end_chances(one) for one in self.searched.depth_distributions]
        return self._sum(widths, ends)

    def settled(self, widths: Sequence[int], depths: Sequence[int]) -> float:
        """Price of a network.

        Args:
            widths: Of each group.
            depths: Of each stage.
        """
        chances = [
            torch.tensor([float(c == width) for c in choices], dtype=torch.float64)
            for choices, width in zip(self._choices, widths, strict=True)
        ]
        ends = [
            torch.tensor(
                [float(count == depth) for count in range(1, stage.blocks + 1)],
                dtype=torch.float64,
            )
            for stage, depth in zip(self.searched.stages, depths, strict=True)
        ]
        return float(self._sum(chances, ends))

    @property
    def full(self) -> float:
        """Price of the whole network."""
        return self.settled(
            [choices[-1] for choices in self._choices],
            [stage.blocks for stage in self.searched.stages],
        )

    @property
    def least(self) -> float:
        """Price of the least that there is to choose."""
        return self.settled(
            [choices[0] for choices in self._choices], [1] * len(self.searched.stages)
        )

    def depths_within(self, most: float) -> tuple[int, ...]:
        """The likeliest depths, or fewer blocks where these leave widths too little.

        Args:
            most: Of the price; the narrowest widths are to be below it by some room.
        """
        narrowest = [choices[0] for choices in self._choices]

        def cost(depths: Sequence[int]) -> float:
            return self.settled(narrowest, depths)

        searched = self.searched.depth_distributions
        choices = [one.choices for one in searched]
        chances = [one.probabilities.detach() for one in searched]
        least = [each[0] for each in choices]
        depths = list(self.searched.depths())
        while cost(depths) > NARROWEST_SHARE * most and depths != least:
            depths = _with_less(depths, choices, chances, cost)
        return tuple(depths)

    def _sum(self, widths: Sequence[Tensor], ends: Sequence[Tensor]) -> Tensor:
        total = torch.tensor(self.constant, dtype=torch.float64)
        for layer in self._layers:
            total = total + layer.expected(widths, ends)
        return total


def _end_chances(depth: Distribution) -> Tensor:
    """Of each block, the probability that it is the last one that is kept."""
    places = torch.arange(1, depth.choices[-1] + 1)[:, None]
    is_depth = places == torch.tensor(depth.choices)[None]
    return is_depth.double() @ depth.probabilities.double()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PricedLayer:
    """One layer's price at its choices.

    Args:
        read: Group that it reads; None of none. Where that is what a stage ends with,
            of each number of blocks that may be kept of the stage.
        read_stage: That stage; None if the group is one whatever is kept.
        written: Group that it writes; None of none.
        prices: `(choices read, choices written)`; of one side that is not chosen, 1.
        block: Stage, and block of it, that it is in.
    """

    read: tuple[int | None, ...]
    read_stage: int | None
    written: int | None
    prices: Tensor
    block: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        place: int,
        price: LayerPrices,
        choices: Sequence[tuple[int, ...]],
        stages: Sequence[Stage],
    ) -> _PricedLayer:
        layer = graph.layers[place]
        read, read_counts = _side(graph, layer, "in", choices)
        written, written_counts = _side(graph, layer, "out", choices)
        rows = [
            [price.of_layer(place, one, other) for other in written_counts]
            for one in read_counts
        ]
        read_stage = None if read is None else stage_read(stages, layer.name, read)
        return cls(
            read=(read,) if read_stage is None else stages[read_stage].groups,
            read_stage=read_stage,
            written=written,
            prices=torch.tensor(rows, dtype=torch.float64),
            block=_block_of(layer.name, stages),
        )

    def expected(self, widths: Sequence[Tensor], ends: Sequence[Tensor]) -> Tensor:
        if self.read_stage is None:
            found = self._at(self.read[0], widths)
        else:
            each = [self._at(group, widths) for group in self.read]
            found = torch.stack(each) @ ends[self.read_stage]
        if self.block is None:
            return found
        stage, block = self.block
        return found * ends[stage][block:].sum()  # kept, if the last one is no earlier

    def _at(self, group: int | None, widths: Sequence[Tensor]) -> Tensor:
        if group is not None and group == self.written:
            return widths[group] @ self.prices.diagonal()
        one = torch.ones(1, dtype=torch.float64)
        read = one if group is None else widths[group]
        written = one if self.written is None else widths[self.written]
        return read @ self.prices @ written


def _block_of(name: str, stages: Sequence[Stage]) -> tuple[int, int] | None:
    """The stage, and the block of it, that a layer is in."""
    for index, stage in enumerate(stages):
        for block, names in enumerate(stage.layers):
            if name in names:
                return index, block
    return None


def _side(
    graph: ChannelGraph,
    layer: TracedLayer,
    side: Side,
    choices: Sequence[tuple[int, ...]],
) -> tuple[int | None, list[float]]:
    """The group on one side of a layer, and the layer's channels at its choices."""
    cuts = graph.cuts_at(layer.name, side)
    full = layer.in_channels if side == "in" else layer.out_channels
    if not cuts:
        return None, [float(full)]
    if len(cuts) > 1:
        raise TraceError(
            f"{layer.name}: it reads or writes channels of several groups, whose "
            "widths tas cannot search; take pas, legr or autoprune"
        )
    (cut,) = cuts
    each = len(cut.positions) / graph.groups[cut.group].channels
    rest = full - len(cut.positions)
    return cut.group, [choice * each + rest for choice in choices[cut.group]]


def cost_loss(
    expected: Tensor, settled: float, *, target: float, slack: float
) -> Tensor:
    """Pulls the expected price up or down by its logarithm, by where the settled is.

    Args:
        expected: Mean price of what is drawn; differentiable.
        settled: Price of what is likeliest.
        target: Not to be exceeded.
        slack: Below the target, within which nothing pulls.
    """
    if settled > target:
        return expected.log()
    if settled < target - slack:
        return -expected.log()
    return torch.zeros((), dtype=expected.dtype)


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
            counts = _with_less(counts, self.choices, self.probabilities, cost)
        if cost(counts) < (1 - FIT_TOLERANCE) * most:
            counts = self._widened(counts, cost, most)
        while cost(counts) < (1 - FIT_TOLERANCE) * most:
            # Where another channel needs a projection, both may be too dear.
            nearer = max(self._exchanged(counts, cost, most), key=cost, default=counts)
            if cost(nearer) <= cost(counts):
                return counts
            counts = self._widened(nearer, cost, most)
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
    ) -> Iterator[list[int]]:
        """With a step more in one group, and as many less in another as pay for it."""
        for index, other in permutations(range(len(found)), 2):
            moved = self._wider(found, index)
            if moved == found:
                continue
            while cost(moved) > most and moved[other] > self.choices[other][0]:
                fewer = self._wider(moved, other, steps=-1)
                fewer[other] = max(fewer[other], self.choices[other][0])
                moved = fewer
            if cost(moved) <= most:
                yield moved

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
        if not usual:  # there is no next one
            usual = cost(found) - cost(self._wider(found, index, steps=-1))
        return rise > LEAP * usual

    def _wider(self, counts: Sequence[int], index: int, *, steps: int = 1) -> list[int]:
        """With so many steps of channels more in one group, if it has them."""
        wider = min(self.channels[index], counts[index] + steps * self.step)
        return [*counts[:index], max(1, wider), *counts[index + 1 :]]

    def _mean_excess(self, index: int, count: int) -> float:
        """How many channels more than it has a group has on average."""
        values = torch.tensor(self.choices[index], dtype=torch.float64)
        return float(self.probabilities[index].double() @ values) - count


def _with_less(
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
    """A price of channel counts that asks for each layer's at the same counts once.

    Args:
        graph: Of the network.
        price: Of its layers.
    """

    def __init__(self, graph: ChannelGraph, price: LayerPrices) -> None:
        self._price, self._counts = price, Counts(graph)
        self._known: dict[tuple[int, float, float], float] = {}

    def __call__(self, counts: Sequence[int]) -> float:
        """The cost of a network."""
        read, written = self._counts.of_layers(torch.tensor(counts))
        pairs = zip(read.tolist(), written.tolist(), strict=True)
        layers = (self._of_layer(place, *pair) for place, pair in enumerate(pairs))
        return self._price.constant + sum(layers)

    def _of_layer(self, place: int, read: float, written: float) -> float:
        key = (place, read, written)
        if key not in self._known:
            self._known[key] = self._price.of_layer(place, read, written)
        return self._known[key]
