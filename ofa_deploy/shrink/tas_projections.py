"""Shortcuts that get a projection, so that what they are added to has its own width.

Source: networks of Transformable Architecture Search (X. Dong, Y. Yang, NeurIPS 2019)
have a width for every convolution, and a projection wherever a sum would not fit.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ofa_deploy.errors import TraceError
from ofa_deploy.nn.projection import Projection, put_module
from ofa_deploy.shrink.coupling import trace_channels
from ofa_deploy.shrink.groups import ChannelGraph, Side
from ofa_deploy.shrink.stages import Stage, run_hooked, stage_read


def with_projections(network: nn.Module, image: Tensor) -> nn.Module:
    """A copy of a network with a `Projection` for every shortcut that is a module.

    That is an `nn.Identity`, or an empty `nn.Sequential`, which hands on what a
    convolution reads, to be added to what comes of it. Shortcuts that are written as
    sums alone cannot be found: what they add keeps one width.

    Args:
        network: Stays as it is; computes the same in eval mode.
        image: Of the size of its inputs, `(1, 3, H, W)`.
    """
    channels = _handed_on(network, image)

    def traced(paths: Sequence[str]) -> ChannelGraph | None:
        """With projections there; None of what cannot have them all."""
        projected = _projected(network, {path: channels[path] for path in paths})
        _, depth, height, width = image.shape
        try:
            return trace_channels(projected, input_shape=(depth, height, width))
        except TraceError:
            return None

    def widening(paths: list[str], graph: ChannelGraph | None) -> list[str]:
        """Those of them that stand where widths may differ, whichever of them go."""
        found = [path for path in paths if graph and _widens(graph, path)]
        return found if found in (paths, []) else widening(found, traced(found))

    everywhere = traced(list(channels)) if channels else None
    found = widening(list(channels), everywhere)
    for path in channels:  # each alone: two that are added to each other hide both
        hopeful = everywhere is None or _beside(everywhere, path)
        more = [*found, path]
        if path not in found and hopeful and widening(more, traced(more)) == more:
            found = more
    return _projected(network, {path: channels[path] for path in found})


def _projected(network: nn.Module, channels: Mapping[str, int]) -> nn.Module:
    result = copy.deepcopy(network)
    for path, count in channels.items():
        put_module(result, path, Projection(count))
    return result


def _handed_on(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Channels of square maps that modules hand on as they are, by path.

    Modules that are called several times, or are at several places, are left out.
    """
    seen: dict[str, list[object]] = defaultdict(list)
    places = Counter(
        id(module) for _, module in network.named_modules(remove_duplicate=False)
    )
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(*args[:1] or (None,))
        )
        for name, module in network.named_modules()
        if name and _hands_on(module) and places[id(module)] == 1
    ]
    run_hooked(network, image, handles)
    return {
        name: read[0].shape[1]
        for name, read in seen.items()
        if len(read) == 1
        and isinstance(read[0], Tensor)
        and read[0].ndim == 4
        and read[0].shape[2] == read[0].shape[3]
    }


def _hands_on(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (
        type(module) is nn.Sequential and not len(module)
    )


def _widens(graph: ChannelGraph, path: str) -> bool:
    """Whether a projection stands between two widths, beside convolutions.

    These read what it reads, and write what it writes after all that it reads was
    written: else it would be on the way, and they on the shortcut.
    """
    conv = f"{path}.0"
    read, written = graph.cuts_at(conv, "in"), graph.cuts_at(conv, "out")
    if len(read) != 1 or len(written) != 1 or read[0].group == written[0].group:
        return False
    before = _layers_at(graph, "out", read[0].group)
    others = {
        name
        for name in _layers_at(graph, "out", written[0].group)
        if name != conv and not _is_projection(graph, name)
    }
    rank = {layer.name: place for place, layer in enumerate(graph.layers)}
    return bool(
        _beside(graph, path)
        and others
        and max(rank[name] for name in others) > max(rank[name] for name in before)
    )


def _beside(graph: ChannelGraph, path: str) -> set[str]:
    """Layers that read what a projection reads."""
    conv = f"{path}.0"
    return {
        name
        for cut in graph.cuts_at(conv, "in")
        for name in _layers_at(graph, "in", cut.group)
        if name != conv and not _is_projection(graph, name)
    }


def _layers_at(graph: ChannelGraph, side: Side, group: int) -> set[str]:
    """Layers that read, or write, a group."""
    names = {layer.name for layer in graph.layers}
    return {
        cut.module
        for cut in graph.cuts
        if cut.side == side and cut.group == group and cut.module in names
    }


def _is_projection(graph: ChannelGraph, name: str) -> bool:
    return any(layer.name == name and layer.is_projection for layer in graph.layers)


def carried_groups(
    graph: ChannelGraph, stages: Sequence[Stage]
) -> list[set[int] | None]:
    """Of each group: those whose channels are in its sums, if shortcuts hand them on.

    None of those that a shortcut hands channels on to which always stay.

    Args:
        graph: Of a network with projections.
        stages: Of it, whose depth is searched.
    """
    found: list[set[int] | None] = [{index} for index in range(len(graph.groups))]
    for layer in graph.layers:
        if not layer.is_projection:
            continue
        read = []
        for cut in graph.cuts_at(layer.name, "in"):
            stage = stage_read(stages, layer.name, cut.group)
            ends = (cut.group,) if stage is None else stages[stage].groups
            read += [found[group] for group in ends]
        for written in graph.cuts_at(layer.name, "out"):
            known = found[written.group]
            if known is None or not read or None in read:
                found[written.group] = None
            else:
                found[written.group] = known.union(*(one or set() for one in read))
    return found
