"""Shortcuts that get a projection, so that what they are added to has its own width.

Source: networks of Transformable Architecture Search (X. Dong, Y. Yang, NeurIPS 2019)
have a width for every convolution, and a projection wherever a sum would not fit.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ofa_deploy.errors import TraceError
from ofa_deploy.nn.projection import Projection, put_module
from ofa_deploy.shrink.coupling import trace_channels
from ofa_deploy.shrink.groups import ChannelGraph, Side


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

    def widening(paths: Sequence[str]) -> list[str]:
        """Those of them that stand where widths may differ, all of them made."""
        projected = _projected(network, {path: channels[path] for path in paths})
        _, depth, height, width = image.shape
        try:
            graph = trace_channels(projected, input_shape=(depth, height, width))
        except TraceError:
            return []
        return [path for path in paths if _widens(graph, path)]

    found = widening(list(channels))
    for path in channels:  # each alone: two that are added to each other hide both
        if path not in found:
            more = [*found, path]
            found = more if widening(more) == more else found
    return _projected(network, {path: channels[path] for path in widening(found)})


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
            lambda module, args, name=name: seen[name].append(args[0])
        )
        for name, module in network.named_modules()
        if name and _hands_on(module) and places[id(module)] == 1
    ]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
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
    beside = _layers_at(graph, "in", read[0].group) - {conv}
    before = _layers_at(graph, "out", read[0].group)
    others = {
        name
        for name in _layers_at(graph, "out", written[0].group)
        if name != conv and not _is_projection(graph, name)
    }
    rank = {layer.name: place for place, layer in enumerate(graph.layers)}
    return bool(
        beside
        and others
        and max(rank[name] for name in others) > max(rank[name] for name in before)
    )


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


def carried_groups(graph: ChannelGraph) -> list[set[int] | None]:
    """Of each group: those whose channels are in its sums, if shortcuts hand them on.

    None of those that a shortcut hands channels on to which always stay.

    Args:
        graph: Of a network with projections.
    """
    found: list[set[int] | None] = [{index} for index in range(len(graph.groups))]
    for layer in graph.layers:
        if not layer.is_projection:
            continue
        read = [found[cut.group] for cut in graph.cuts_at(layer.name, "in")]
        for written in graph.cuts_at(layer.name, "out"):
            known = found[written.group]
            if known is None or not read or None in read:
                found[written.group] = None
            else:
                found[written.group] = known.union(*(one or set() for one in read))
    return found
