"""The once-for-all supernet: one set of weights, and a plan that says which part."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ofa_deploy.families.mbv3 import middle_channels
from ofa_deploy.layers import ConvLayer, Layer, LinearLayer, PoolLayer, RepConvLayer
from ofa_deploy.nn.elastic import (
    Classifier,
    ElasticConv,
    ElasticRepConv,
    ElasticSqueezeExcite,
)
from ofa_deploy.nn.memory_format import store_channels_last
from ofa_deploy.plan import NetworkPlan, lower
from ofa_deploy.space import SearchSpace


class Supernet(nn.Module):
    """Weights of the largest network of a space, of which every other is a part.

    No sub-network is ever "active": `supernet(x, plan)` takes it as an argument. The
    names in `state_dict()` are the layer names of the plans.

    Args:
        space: What it contains.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        for layer in lower(space, space.largest()).layers:
            module = _build(layer)
            if module is not None:
                _attach(self, layer.name, module)

    def forward(self, x: Tensor, plan: NetworkPlan) -> Tensor:
        """Logits `(N, class_count)` of images `(N, 3, resolution, resolution)`."""
        for block in plan.blocks:
            shortcut = x
            for layer in block.layers:
                x = self._apply_layer(x, layer)
            if block.residual:
                x = x + shortcut
        return x

    def _apply_layer(self, x: Tensor, layer: Layer) -> Tensor:
        if isinstance(layer, PoolLayer):
            return x.mean((2, 3), keepdim=True)
        module = self.get_submodule(layer.name)
        if isinstance(layer, LinearLayer):
            result = module(x.flatten(1))
        else:
            result = module(x, layer)
        assert isinstance(result, Tensor)
        return result


def new_supernet(space: SearchSpace) -> Supernet:
    """An untrained supernet in the memory format that trains fastest on CPUs."""
    supernet = Supernet(space)
    store_channels_last(supernet)
    return supernet


def _build(layer: Layer) -> nn.Module | None:
    if isinstance(layer, RepConvLayer):
        return ElasticRepConv(layer)
    if isinstance(layer, ConvLayer):
        return ElasticConv(layer)
    if isinstance(layer, LinearLayer):
        return Classifier(layer)
    if isinstance(layer, PoolLayer):
        return None
    return ElasticSqueezeExcite(layer)


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register a module under a dotted name, making the parents that are missing."""
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)


@torch.no_grad()
def sort_channels(supernet: Supernet, *, supported_expands: int) -> None:
    """Order middle channels by the L1 norm of the weights that read them.

    The function that the full network computes does not change; a narrower prefix then
    keeps the channels that matter most. Channels are sorted only inside the segments
    that already trained widths cut, so that those widths keep their channels.

    Blocks of the `repvgg` kind stay as they are: their identity branches tie channels
    to those before and behind.

    Args:
        supernet: Changed in place.
        supported_expands: How many of each stage's largest expand ratios have been
            trained as prefixes so far; 1 when only the full width has.
    """
    plan = lower(supernet.space, supernet.space.largest())
    for block in plan.blocks:
        if block.stage is None:
            continue
        stage = supernet.space.stages[block.stage - 1]
        if stage.block == "repvgg":
            continue
        expands = stage.expands[::-1][:supported_expands]
        widths = [middle_channels(block.in_channels, expand) for expand in expands]
        # Nothing expands these: they are the input's, whose order others read, too.
        fixed = block.in_channels if 1 in expands and stage.block == "mbconv" else 0
        _sort_block(supernet, block.name, widths, fixed=fixed)


def _sort_block(
    supernet: Supernet, block: str, widths: list[int], *, fixed: int
) -> None:
    if not hasattr(supernet.get_submodule(block), "expand"):
        return  # its middle channels are the input's, whose order others read, too
    project = supernet.get_submodule(f"{block}.project")
    assert isinstance(project, ElasticConv)
    importance = project.weight.abs().sum((0, 2, 3))
    order = _segment_order(importance, widths)
    order[:fixed] = torch.arange(fixed)
    project.weight.copy_(project.weight[:, order])
    for name in ("expand", "depthwise"):
        if hasattr(supernet.get_submodule(block), name):
            conv = supernet.get_submodule(f"{block}.{name}")
            assert isinstance(conv, ElasticConv)
            _permute_outputs(conv, order)
    if hasattr(supernet.get_submodule(block), "se"):
        gate = supernet.get_submodule(f"{block}.se")
        assert isinstance(gate, ElasticSqueezeExcite)
        _permute_gate(gate, order)


def _segment_order(importance: Tensor, widths: list[int]) -> Tensor:
    """Descending order inside each segment between consecutive widths."""
    bounds = [0, *sorted(widths)]
    parts = [
        low + importance[low:high].argsort(descending=True, stable=True)
        for low, high in pairwise(bounds)
    ]
    return torch.cat(parts)


def _permute_outputs(conv: ElasticConv, order: Tensor) -> None:
    conv.weight.copy_(conv.weight[order])
    norm = conv.norm
    assert norm is not None
    for tensor in (norm.gamma, norm.beta, norm.mean, norm.variance):
        tensor.copy_(tensor[order])


def _permute_gate(gate: ElasticSqueezeExcite, order: Tensor) -> None:
    reduce, expand = gate.reduce, gate.expand
    assert reduce.bias is not None
    assert expand.bias is not None
    expand.weight.copy_(expand.weight[order])
    expand.bias.copy_(expand.bias[order])
    reduce.weight.copy_(reduce.weight[:, order])
    inner = expand.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
    expand.weight.copy_(expand.weight[:, inner])
    reduce.weight.copy_(reduce.weight[inner])
    reduce.bias.copy_(reduce.bias[inner])
