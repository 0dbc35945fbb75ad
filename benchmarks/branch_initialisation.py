"""Branches for a network that was trained without them: the way back from fusing.

An epoch of a network of branches takes twice as long as one of plain convolutions. So a
network may be trained as a chain of these first, and get its branches afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.layers import BlockPlan, RepConvLayer
from ofa_deploy.materialise import Weights, stored_shapes
from ofa_deploy.plan import NetworkPlan

NEW_NORM = {"gamma": 0.0, "beta": 0.0, "mean": 0.0, "variance": 1.0}


def plain_plan(plan: NetworkPlan) -> NetworkPlan:
    """The same with one convolution, and its batch norm, in place of all branches."""
    return replace(plan, blocks=tuple(_plain_block(block) for block in plan.blocks))


def _plain_block(block: BlockPlan) -> BlockPlan:
    layers = tuple(
        layer.merged if isinstance(layer, RepConvLayer) else layer
        for layer in block.layers
    )
    return replace(block, layers=layers)


def with_silent_branches(
    weights: Weights, plan: NetworkPlan, *, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Weights of the branched network that computes what the plain one does.

    The 3×3 branch has everything. The others begin with scales of zero, as the last
    batch norms of residual blocks often do (P. Goyal et al., "Accurate, Large Minibatch
    SGD: Training ImageNet in 1 Hour", 2017, section 5.1), and learn from there.

    Args:
        weights: Of the `plain_plan`, unfused.
        plan: Of the branched network.
        rng: Source of the 1×1 kernels.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for name, shape in stored_shapes(plan).items():
        of_branch, _, tensor = name.rpartition(".")
        plain = name.replace(".dense.", ".")
        if plain in weights:
            found[name] = weights[plain].copy()
        elif tensor in NEW_NORM:
            found[name] = np.full(shape, NEW_NORM[tensor], dtype=np.float32)
        elif of_branch.endswith(".point"):
            spread = (2 / shape[1]) ** 0.5
            found[name] = rng.normal(0.0, spread, shape).astype(np.float32)
        else:
            raise KeyError(f"the plain network has no tensor for {name}")
    return found
