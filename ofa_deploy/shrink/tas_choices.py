"""What Transformable Architecture Search can search in a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch

from ofa_deploy.errors import TraceError
from ofa_deploy.nn.projection import projection_paths
from ofa_deploy.shrink.groups import ChannelGraph, Side
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.stages import find_stages, searchable_groups
from ofa_deploy.shrink.tas_network import insert_distributions
from ofa_deploy.shrink.tas_projections import with_projections


def searched_by_tas(
    own: OwnNetwork, *, step: int = 1, projects: bool = True
) -> OwnNetwork:
    """The network with those groups alone whose widths tas can search, and its stages.

    Args:
        own: The network.
        step: Widths are multiples of this: a group that leaves no choice stays whole.
        projects: Whether shortcuts that are modules may become projections.

    Raises:
        TraceError: There are none.
    """
    if own.is_chain:
        raise TraceError(
            f"{own.family}: the branches of its layers have batch norms of their own, "
            "which tas cannot search; take pas, legr or autoprune"
        )
    if projects:
        own = _projecting(own)
    searchable = searchable_groups(own.module, own.graph, own.image)
    groups = [index for index in searchable if own.graph.groups[index].channels > step]
    if searchable and not groups:
        widest = max(own.graph.groups[index].channels for index in searchable)
        raise TraceError(
            f"{own.family} has at most {widest} channels in a layer that tas can "
            f"search, and its widths are multiples of {step}: there is no choice. Give "
            "a smaller recipe.step, or take pas, legr or autoprune"
        )
    groups = _settled_exactly(own, _apart(own.graph, groups))
    if not groups:
        raise TraceError(
            f"{own.family} has no channels that tas can search: of convolutions, or of "
            "linear layers of rows, that pass a two-dimensional batch norm right where "
            "they are written, or none at all, are read by nobody beside others of "
            "that kind, and are zeros behind it where they are zeros before. Take pas, "
            "legr or autoprune"
        )
    graph = own.graph.only(groups)
    stages = find_stages(own.module, graph, own.image)
    removable = {name for stage in stages for names in stage.layers for name in names}
    return replace(own, graph=replace(graph, removable=frozenset(removable)))


def _projecting(own: OwnNetwork) -> OwnNetwork:
    """With projections on its shortcuts, if it can be narrowed exactly then, too."""
    projected = with_projections(own.module, own.image)
    if not projection_paths(projected):
        return own
    try:
        return own.grown(projected)
    except TraceError:
        return own


def _apart(graph: ChannelGraph, groups: Sequence[int]) -> list[int]:
    """Of some groups those that no layer reads, or writes, beside another of them."""
    beside = {
        cut.group
        for layer in graph.layers
        for side in get_args(Side)
        if len(cuts := graph.only(groups).cuts_at(layer.name, side)) > 1
        for cut in cuts
    }
    return [group for place, group in enumerate(groups) if place not in beside]


def _settled_exactly(own: OwnNetwork, groups: Sequence[int]) -> list[int]:
    """Of some groups those that compute, once narrow, what is left of the network.

    What is searched has zeros for the channels that are missing, and behind a sigmoid
    they are halves; what is left has no such channels.
    """
    if not groups or _settles_exactly(own, groups):
        return list(groups)
    alone = [group for group in groups if _settles_exactly(own, [group])]
    return alone if alone and _settles_exactly(own, alone) else []


def _settles_exactly(own: OwnNetwork, groups: Sequence[int]) -> bool:
    part = replace(own, graph=own.graph.only(groups))
    with torch.random.fork_rng(devices=[]):
        searched = insert_distributions(
            part.module,
            part.graph,
            image=part.image,
            step=1,
            searches_depth=False,
            fresh=False,
        )
    for one in searched.width_distributions:
        one.prefer(one.choices[0])
    kept = [torch.arange(width) for width in searched.widths()]
    return part.computes_what_is_left(searched.module, kept)
