"""From a masked network to one without the masked channels: exact, and no masks left.

A network of a plan becomes another plan with fused weights, which every emitter can
write. Any other network becomes a copy of its module with narrower layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.errors import TraceError
from ofa_deploy.fuse import fuse
from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
)
from ofa_deploy.nn.static import PlannedNet, StaticRepConv
from ofa_deploy.plan import IMAGE_CHANNELS, NetworkPlan
from ofa_deploy.shrink.groups import ChannelGraph, Consumer

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
    sides = {consumer.name: consumer for consumer in graph.consumers}
    fused = fuse(network.weights(), network.plan)
    weights: dict[str, Floats] = {}
    blocks = []
    last = np.arange(IMAGE_CHANNELS)
    for place, block in enumerate(network.plan.blocks):
        entered, layers = last, []
        for index, layer in enumerate(block.layers):
            path = f"blocks.{place}.layers.{index}"
            if isinstance(layer, RepConvLayer):
                written = _indices(sides[path], kept, layer.out_channels)
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


def _indices(side: Consumer, kept: Sequence[Tensor], channels: int) -> NDArray[np.intp]:
    if side.out_group is None:
        return np.arange(channels)
    return kept[side.out_group].numpy()


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

    Args:
        network: That the graph was traced from.
        graph: Its channels.
        kept: Indices of the channels that stay, of each group.
    """
    result = copy.deepcopy(network)
    for name, group in graph.norms.items():
        norm = result.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        _cut_norm(norm, kept[group])
    for side in graph.consumers:
        module = result.get_submodule(side.name)
        read = None if side.in_group is None else kept[side.in_group]
        written = None if side.out_group is None else kept[side.out_group]
        if isinstance(module, nn.Linear):
            if read is not None:
                _cut_columns(module, read, side.columns_per_channel)
        elif isinstance(module, nn.Conv2d):
            _cut_conv(module, read, written, depthwise=side.depthwise)
        else:
            assert isinstance(module, StaticRepConv)
            raise TraceError(
                f"{side.name} is trained as branches; prune its network as a plan"
            )
    return result


def _cut_norm(norm: nn.BatchNorm2d, kept: Tensor) -> None:
    norm.num_features = len(kept)
    if norm.affine:
        norm.weight = nn.Parameter(norm.weight[kept].clone())
        norm.bias = nn.Parameter(norm.bias[kept].clone())
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean = norm.running_mean[kept].clone()
        norm.running_var = norm.running_var[kept].clone()


def _cut_conv(
    conv: nn.Conv2d, read: Tensor | None, written: Tensor | None, *, depthwise: bool
) -> None:
    weight = conv.weight
    if written is not None:
        weight = nn.Parameter(weight[written].clone())
        conv.out_channels = len(written)
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias[written].clone())
    if depthwise:
        conv.groups = conv.in_channels = conv.out_channels
    elif read is not None:
        weight = nn.Parameter(weight[:, read].clone())
        conv.in_channels = len(read)
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))


def _cut_columns(linear: nn.Linear, read: Tensor, per_channel: int) -> None:
    columns = (read[:, None] * per_channel + torch.arange(per_channel)).flatten()
    linear.weight = nn.Parameter(linear.weight[:, columns].clone())
    linear.in_features = len(columns)
