"""What a network costs whose widths and depths are distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_deploy.errors import TraceError
from ofa_deploy.shrink.cost import LayerPrices
from ofa_deploy.shrink.groups import ChannelGraph, Side, TracedLayer
from ofa_deploy.shrink.stages import Stage, stage_read
from ofa_deploy.shrink.tas_layers import Distribution
from ofa_deploy.shrink.tas_network import SearchedNetwork
from ofa_deploy.shrink.tas_order import with_less

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
            depths = with_less(depths, choices, chances, cost)
        return tuple(depths)

    def depths_near(self, most: float, *, tolerance: float) -> tuple[int, ...]:
        """Those of `depths_within`, or more blocks where all widths leave some over.

        Widths can be narrowed to a price, and no further widened than to the whole.

        Args:
            most: Of the price.
            tolerance: Share of it that may be left over.
        """
        widest = [choices[-1] for choices in self._choices]
        depths = self.depths_within(most)
        while self.settled(widest, depths) < (1 - tolerance) * most:
            deeper = self._deeper(depths, most)
            if deeper is None:
                break
            depths = deeper
        return depths

    def _deeper(self, depths: Sequence[int], most: float) -> tuple[int, ...] | None:
        """With the next choice of the stage that loses least chance; None if none fits.

        Its narrowest widths are to leave as much room as in `depths_within`.
        """
        narrowest = [choices[0] for choices in self._choices]
        found: tuple[float, tuple[int, ...]] | None = None
        for index, one in enumerate(self.searched.depth_distributions):
            place = one.choices.index(depths[index])
            if place + 1 == len(one.choices):
                continue
            deeper = (*depths[:index], one.choices[place + 1], *depths[index + 1 :])
            chances = one.probabilities.detach().log()
            lost = float(chances[place] - chances[place + 1])
            fits = self.settled(narrowest, deeper) <= NARROWEST_SHARE * most
            if fits and (found is None or lost < found[0]):
                found = lost, deeper
        return None if found is None else found[1]

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
