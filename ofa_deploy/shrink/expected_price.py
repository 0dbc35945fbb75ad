"""What a network costs whose widths and depths are distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_deploy.errors import SpaceError, TraceError
from ofa_deploy.shrink.cost import LayerPrices, Price
from ofa_deploy.shrink.groups import ChannelGraph, Side, TracedLayer
from ofa_deploy.shrink.searched import SearchedNetwork
from ofa_deploy.shrink.transformable import Distribution


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
        depth_of = {
            name: (stage_index, block)
            for stage_index, stage in enumerate(searched.stages)
            for block, names in enumerate(stage.layers)
            for name in names
        }
        self.constant = price.constant
        self._layers = [
            _PricedLayer.of(graph, place, price, self._choices, depth_of)
            for place in range(len(graph.layers))
        ]

    def expected(self) -> Tensor:
        """Mean price of what is drawn; differentiable."""
        widths = [
            one.probabilities.double() for one in self.searched.width_distributions
        ]
        kept = [_kept_chances(one) for one in self.searched.depth_distributions]
        return self._sum(widths, kept)

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
        kept = [
            torch.tensor(
                [float(block < depth) for block in range(stage.blocks)],
                dtype=torch.float64,
            )
            for stage, depth in zip(self.searched.stages, depths, strict=True)
        ]
        return float(self._sum(chances, kept))

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

    def _sum(self, widths: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        total = torch.tensor(self.constant, dtype=torch.float64)
        for layer in self._layers:
            total = total + layer.expected(widths, kept)
        return total


def _kept_chances(depth: Distribution) -> Tensor:
    """Of each block, the probability that it is kept; the first one's is 1."""
    choices = torch.tensor(depth.choices)
    is_deeper = choices[None] > torch.arange(depth.choices[-1])[:, None]
    return is_deeper.double() @ depth.probabilities.double()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PricedLayer:
    """One layer's price at its choices.

    Args:
        read: Group that it reads; None of none, or of several.
        written: Likewise.
        prices: `(choices read, choices written)`; of one side that is not chosen, 1.
        block: Stage, and block of it, that it is in.
    """

    read: int | None
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
        depth_of: Mapping[str, tuple[int, int]],
    ) -> _PricedLayer:
        layer = graph.layers[place]
        read, read_counts = _side(graph, layer, "in", choices)
        written, written_counts = _side(graph, layer, "out", choices)
        rows = [
            [price.of_layer(place, one, other) for other in written_counts]
            for one in read_counts
        ]
        return cls(
            read=read,
            written=written,
            prices=torch.tensor(rows, dtype=torch.float64),
            block=depth_of.get(layer.name),
        )

    def expected(self, widths: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        one = torch.ones(1, dtype=torch.float64)
        if self.read is not None and self.read == self.written:
            found = widths[self.read] @ self.prices.diagonal()
        else:
            read = one if self.read is None else widths[self.read]
            written = one if self.written is None else widths[self.written]
            found = read @ self.prices @ written
        if self.block is None:
            return found
        stage, block = self.block
        return found * kept[stage][block]


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
    """A `ChannelOrder`: of all structures within a price, the likeliest.

    Widths are drawn apart, so that a structure's probability is their product. What a
    channel costs trades against it: for some price of prices the sum of both is best
    in each group alone.

    Args:
        choices: Of each group, ascending.
        probabilities: Of these.
        step: Between choices counts are multiples of this.
    """

    choices: Sequence[tuple[int, ...]]
    probabilities: Sequence[Tensor]
    step: int

    @property
    def channels(self) -> list[int]:
        """Of each group, in all."""
        return [choices[-1] for choices in self.choices]

    def within(self, price: Price, most: float) -> list[int]:
        """See `ChannelOrder`: the likeliest that costs no more, widened to that."""

        def cost(counts: Sequence[int]) -> float:
            return float(price(torch.tensor(counts, dtype=torch.float64)))

        least = [choices[0] for choices in self.choices]
        if cost(least) > most:
            raise SpaceError(
                f"the least that there is to choose costs {cost(least):.4g} "
                f"{price.unit}, more than {most:.4g}; ask for at least that"
            )
        low, high = -1e3, 1e3  # what a unit of the price is worth, in log-probability
        counts = least
        for _ in range(60):
            middle = (low + high) / 2
            found = self._best(price, middle)
            if cost(found) <= most:
                counts, high = found, middle
            else:
                low = middle
        return self._widened(counts, cost, most)

    def kept(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """See `ChannelOrder`: the first ones."""
        return tuple(torch.arange(count) for count in counts)

    def _best(self, price: Price, worth: float) -> list[int]:
        """The choice of each group by its probability, and what its channels cost."""
        full = torch.tensor(self.channels, dtype=torch.float64).requires_grad_()
        (slopes,) = torch.autograd.grad(price(full), full)
        unit = float(price(full.detach()))
        found = []
        for choices, probabilities, slope in zip(
            self.choices, self.probabilities, slopes.tolist(), strict=True
        ):
            costs = torch.tensor(choices, dtype=torch.float64) * slope / unit
            score = probabilities.double().clamp(min=1e-12).log() - worth * costs
            found.append(choices[int(score.argmax())])
        return found

    def _widened(
        self, counts: Sequence[int], cost: Callable[[Sequence[int]], float], most: float
    ) -> list[int]:
        """With as many steps of channels more as there is room for."""
        found = list(counts)
        order = sorted(
            range(len(found)),
            key=lambda index: -self._mean_excess(index, found[index]),
        )
        grown = True
        while grown:
            grown = False
            for index in order:
                more = list(found)
                more[index] = min(self.channels[index], found[index] + self.step)
                if more != found and cost(more) <= most:
                    found, grown = more, True
        return found

    def _mean_excess(self, index: int, count: int) -> float:
        """How many channels more than it has a group has on average."""
        values = torch.tensor(self.choices[index], dtype=torch.float64)
        return float((self.probabilities[index].double() * values).sum()) - count
