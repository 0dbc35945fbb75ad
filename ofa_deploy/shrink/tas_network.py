"""A network that has every width and depth in it, and draws among them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ofa_deploy.nn.projection import projection_paths, put_module
from ofa_deploy.shrink.groups import ChannelGraph, Cut
from ofa_deploy.shrink.stages import Stage, find_stages, normed_layers
from ofa_deploy.shrink.tas_layers import (
    Distribution,
    SearchedNorm,
    SearchedOutput,
    SearchedStage,
    depth_choices,
    width_choices,
)
from ofa_deploy.shrink.tas_projections import carried_groups


class SearchedModule(nn.Module):
    """A network that draws its widths and depths anew for every pass.

    Args:
        network: With `SearchedNorm` and `SearchedStage` in it.
        widths: Distributions of its groups.
        depths: Distributions of its stages.
    """

    def __init__(
        self,
        network: nn.Module,
        widths: Sequence[Distribution],
        depths: Sequence[Distribution],
    ) -> None:
        super().__init__()
        self.network = network
        self.widths = nn.ModuleList(widths)
        self.depths = nn.ModuleList(depths)
        self.tau = 1.0

    @property
    def distributions(self) -> list[Distribution]:
        """Of widths, then of depths."""
        found = (*self.widths, *self.depths)
        return [one for one in found if isinstance(one, Distribution)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits; in training of what is drawn, else of what is likeliest."""
        for width in self.widths:
            assert isinstance(width, Distribution)
            if self.training:
                width.draw(self.tau)
            else:
                width.settle(width.likeliest)
        for depth in self.depths:
            assert isinstance(depth, Distribution)
            if self.training:
                depth.draw_all(self.tau)
            else:
                depth.settle(depth.likeliest)
        result = self.network(x)
        assert isinstance(result, Tensor)
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchedNetwork:
    """A network with everything in it that may be chosen.

    Args:
        module: The network to train.
        graph: Its channels.
        stages: Whose depth is searched.
    """

    module: SearchedModule
    graph: ChannelGraph
    stages: tuple[Stage, ...]

    def widths(self) -> tuple[int, ...]:
        """The likeliest of each group."""
        return tuple(one.likeliest for one in self.width_distributions)

    def depths(self) -> tuple[int, ...]:
        """The likeliest of each stage."""
        return tuple(one.likeliest for one in self.depth_distributions)

    @property
    def width_distributions(self) -> list[Distribution]:
        """Of the groups."""
        return self.module.distributions[: len(self.graph.groups)]

    @property
    def depth_distributions(self) -> list[Distribution]:
        """Of the stages."""
        return self.module.distributions[len(self.graph.groups) :]


def insert_distributions(
    network: nn.Module,
    graph: ChannelGraph,
    *,
    image: Tensor,
    step: int,
    searches_depth: bool,
    fresh: bool,
) -> SearchedNetwork:
    """A copy of a network with a distribution for each width, and each depth.

    Args:
        network: Stays as it is.
        graph: Its channels, all of which are searched.
        image: Of the size of its inputs, `(1, 3, H, W)`.
        step: Widths are multiples of this.
        searches_depth: Whether stages get distributions, too.
        fresh: Whether weights are drawn anew.

    Raises:
        SpaceError: A layer is too narrow for a choice.
    """
    copied = copy.deepcopy(network)
    if fresh:
        reset_parameters(copied)
    widths = [
        Distribution(width_choices(group.channels, step=step)) for group in graph.groups
    ]
    norm_of = normed_layers(network, image)
    projections = projection_paths(network)
    for path in projections:  # sums add the first channels, as many as there are
        put_module(copied, path, nn.Identity())
    layers = {layer.name for layer in graph.layers}
    for cut in graph.cuts:
        if cut.side == "in" or cut.module in norm_of or _is_within(cut, projections):
            continue
        module, width = copied.get_submodule(cut.module), widths[cut.group]
        if cut.module in layers:  # without a norm: its output is mixed as it is
            put_module(copied, cut.module, SearchedOutput(module, width))
        else:
            assert isinstance(module, nn.BatchNorm2d)
            put_module(copied, cut.module, SearchedNorm(module, width))
    stages = find_stages(network, graph, image) if searches_depth else ()
    depths = [Distribution(depth_choices(stage.blocks)) for stage in stages]
    carried = carried_groups(graph, stages)
    for stage, depth in zip(stages, depths, strict=True):
        written = [
            [Distribution.settled(graph.groups[group].channels)]
            if carried[group] is None
            else [widths[one] for one in carried[group] or ()]
            for group in stage.groups
        ]
        _join_blocks(copied, stage, depth, written or [[]] * stage.blocks)
    module = SearchedModule(copied, widths, depths)
    return SearchedNetwork(module=module, graph=graph, stages=stages)


def _is_within(cut: Cut, paths: Sequence[str]) -> bool:
    return cut.module.rpartition(".")[0] in paths


def reset_parameters(network: nn.Module) -> None:
    """Draw all weights anew, as their modules do when they are made.

    Parameters of modules without a `reset_parameters` that takes nothing stay what they
    are.
    """
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and _takes_nothing(reset):
            reset()


def _takes_nothing(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _join_blocks(
    network: nn.Module,
    stage: Stage,
    depth: Distribution,
    written: Sequence[Sequence[Distribution]],
) -> None:
    """Put the blocks of a stage where its first one is."""
    sequence = network.get_submodule(stage.container)
    assert isinstance(sequence, nn.Sequential)
    places = range(stage.first, stage.first + stage.blocks)
    joined = SearchedStage([sequence[place] for place in places], depth, written)
    for place in places:
        sequence[place] = nn.Identity()
    sequence[stage.first] = joined
