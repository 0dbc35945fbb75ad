"""From a masked network to one without the masked channels: exact, and no masks left.

A network of a plan becomes another plan with fused weights, which every emitter can
write. Any other network becomes a copy of its module with narrower layers.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.errors import MissingDependency, TraceError
from ofa_deploy.fuse import fuse
from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
)
from ofa_deploy.nn.projection import put_module
from ofa_deploy.nn.static import PlannedNet
from ofa_deploy.plan import IMAGE_CHANNELS, NetworkPlan
from ofa_deploy.shrink.groups import ChannelGraph, Side

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FusedNetwork:
    """A plan of plain convolutions, and their weights with batch norms folded."""

    plan: NetworkPlan
    weights: Mapping[str, Floats]


def extract_plan(
    network: PlannedNet,
    graph: ChannelGraph,
    kept: Sequence[Tensor],
    *,
    name: str,
) -> FusedNetwork:
    """A chain of convolutions without the channels that were masked.

    Source: Pruning-as-Search (IJCAI 2022): branches are merged over all channels, in
    float64, and then cut; what normalised the zeros of a masked channel is in the bias
    by then, so that nothing changes.

    Args:
        network: Of a plan of branched convolutions, pools and a classifier.
        graph: Of that network.
        kept: Indices of the channels that stay, of each group.
        name: Of the new network.

    Raises:
        TraceError: The plan has layers of other kinds.
    """
    writers = {cut.module: cut.group for cut in graph.cuts if cut.side == "out"}
    fused = fuse(network.weights(), network.plan)
    weights: dict[str, Floats] = {}
    blocks = []
    last = np.arange(IMAGE_CHANNELS)
    for place, block in enumerate(network.plan.blocks):
        entered, layers = last, []
        for index, layer in enumerate(block.layers):
            path = f"blocks.{place}.layers.{index}"
            if isinstance(layer, RepConvLayer):
                written = np.arange(layer.out_channels)
                if path in writers:
                    written = kept[writers[path]].numpy()
                weight = fused[f"{layer.name}.weight"][written][:, last]
                weights[f"{layer.name}.weight"] = np.ascontiguousarray(weight)
                weights[f"{layer.name}.bias"] = fused[f"{layer.name}.bias"][written]
                layers.append(_narrowed(layer, len(last), len(written)))
                last = written
            else:
                layers.append(_narrowed(layer, len(last), len(last)))
                if isinstance(layer, LinearLayer):
                    weights[f"{layer.name}.weight"] = np.ascontiguousarray(
                        fused[f"{layer.name}.weight"][:, last]
                    )
                    weights[f"{layer.name}.bias"] = fused[f"{layer.name}.bias"]
                    last = np.arange(layer.out_channels)
        blocks.append(
            BlockPlan(
                name=block.name,
                in_channels=len(entered),
                out_channels=len(last),
                in_size=block.in_size,
                layers=tuple(layers),
                residual=False,
            )
        )
    plan = replace(network.plan, name=name, blocks=tuple(blocks))
    return FusedNetwork(plan=plan, weights=weights)


def _narrowed(layer: Layer, read: int, written: int) -> Layer:
    """The layer as it is run, between that many channels."""
    if isinstance(layer, RepConvLayer):
        return replace(layer.merged, in_channels=read, out_channels=written)
    if isinstance(layer, PoolLayer):
        return replace(layer, channels=read)
    if isinstance(layer, LinearLayer):
        return replace(layer, in_channels=read)
    kind = "depthwise " if isinstance(layer, ConvLayer) and layer.depthwise else ""
    raise TraceError(
        f"{layer.name} ({kind}{type(layer).__name__}): only chains of branched "
        "convolutions become a plan; prune this network as a module"
    )


@torch.no_grad()
def extract_module(
    network: nn.Module, graph: ChannelGraph, kept: Sequence[Tensor]
) -> nn.Module:
    """A copy of a network with narrower layers; it computes what the masked one did.

    Projections, which are as they were made, are left out of it between equal channels.

    Args:
        network: That the graph was traced from.
        graph: Its channels.
        kept: Indices of the channels that stay, of each group.

    Raises:
        MissingDependency: torch-pruning, which cuts the layers, is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependency("torch-pruning", extra="shrink") from error
    result = copy.deepcopy(network)
    pruners = torch_pruning.DependencyGraph()
    removed = _removed(graph, kept)
    for (name, side), positions in removed.items():
        module = result.get_submodule(name)
        pruner = pruners.get_pruner_of_module(module)
        if isinstance(pruner, torch_pruning.ops.DummyPruner):
            raise TraceError(
                f"{name} ({type(module).__name__}): nothing is known of how to remove "
                "its channels"
            )
        cut = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
        cut(module, positions)
    for path in _needless(graph, removed):
        put_module(result, path, nn.Identity())
    return result


def _needless(
    graph: ChannelGraph, removed: Mapping[tuple[str, Side], list[int]]
) -> list[str]:
    """Projections that would hand on the channels that they read."""
    paths = []
    for layer in graph.layers:
        read = np.arange(layer.in_channels)
        read = np.delete(read, removed.get((layer.name, "in"), []))
        written = np.arange(layer.out_channels)
        written = np.delete(written, removed.get((layer.name, "out"), []))
        if layer.is_projection and np.array_equal(read, written):
            paths.append(layer.name.rpartition(".")[0])
    return paths


def _removed(
    graph: ChannelGraph, kept: Sequence[Tensor]
) -> dict[tuple[str, Side], list[int]]:
    """Positions that go, of every side of every module; empty ones left out."""
    found: dict[tuple[str, Side], list[int]] = defaultdict(list)
    for cut in graph.cuts:
        gone = ~np.isin(cut.channels, kept[cut.group].numpy())
        if gone.any():
            found[cut.module, cut.side] += cut.positions[gone].tolist()
    return found
