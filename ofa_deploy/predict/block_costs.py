"""What blocks cost, arranged by genes: measured milliseconds, and sizes.

Features of a network are sums of its blocks' costs, so that any weighting of them is a
list of prices per gene.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import UnmeasuredBlock
from ofa_deploy.layers import BlockPlan
from ofa_deploy.plan import lower
from ofa_deploy.space import BlockConfig, Genomes, SearchSpace, SubnetConfig

Floats = NDArray[np.float64]

# A block's costs, in the order of the arrays' last axis. Beside its own latency, what
# the runtime spends between blocks: it grows with the data handed on, with the weights
# that no longer fit into the caches, and with every block.
COSTS = ("ms", "MMACs", "M parameters", "M activations", "blocks")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockCosts:
    """Costs as arrays over genes.

    Args:
        fixed: Stem and head together, `(resolutions, costs)`.
        slots: `(resolutions, slots, kernels, expands, costs)`; a stage with fewer
            choices than another repeats its last one.
    """

    fixed: Floats
    slots: Floats


def look_up_blocks(
    space: SearchSpace, latency_ms_by_key: Mapping[str, float]
) -> BlockCosts:
    """Arrange measured blocks by genes.

    Raises:
        UnmeasuredBlock: Names the first block that is missing.
    """
    outside, slots = costs_by_genes(
        space, lambda block: _costs(block, latency_ms_by_key)
    )
    return BlockCosts(fixed=outside.sum(axis=1), slots=slots)


def costs_by_genes(
    space: SearchSpace, costs: Callable[[BlockPlan], Sequence[float]]
) -> tuple[Floats, Floats]:
    """Costs of every block that a gene can choose, and of those that none does.

    Args:
        space: Whose blocks.
        costs: A block to its costs, always as many.

    Returns:
        Stem and head, `(resolutions, blocks, costs)`; and the others,
        `(resolutions, slots, kernels, expands, costs)`. A stage with fewer choices
        than another repeats its last one.
    """
    kernels = max(len(s.kernels) for s in space.stages)
    expands = max(len(s.expands) for s in space.stages)
    outside: list[list[Sequence[float]]] = []
    inside: list[list[Sequence[float]]] = []
    for resolution in space.resolutions:
        for kernel, expand in product(range(kernels), range(expands)):
            blocks = lower(space, _uniform(space, resolution, kernel, expand)).blocks
            staged = [block for block in blocks if block.name.startswith("stage")]
            inside.append([costs(block) for block in staged])
        rest = [block for block in blocks if not block.name.startswith("stage")]
        outside.append([costs(block) for block in rest])
    slots = np.array(inside, dtype=np.float64)
    slots = slots.reshape(len(outside), kernels, expands, space.slot_count, -1)
    return np.array(outside, dtype=np.float64), slots.transpose(0, 3, 1, 2, 4)


def _uniform(
    space: SearchSpace, resolution: int, kernel: int, expand: int
) -> SubnetConfig:
    """The deepest network that takes the same choice everywhere, as far as it goes."""
    return SubnetConfig(
        resolution=resolution,
        stages=tuple(
            (
                BlockConfig(
                    kernel=stage.kernels[min(kernel, len(stage.kernels) - 1)],
                    expand=stage.expands[min(expand, len(stage.expands) - 1)],
                ),
            )
            * stage.max_depth
            for stage in space.stages
        ),
    )


def _costs(block: BlockPlan, latency_ms_by_key: Mapping[str, float]) -> list[float]:
    try:
        latency_ms = latency_ms_by_key[block.key]
    except KeyError:
        raise UnmeasuredBlock(
            f"block {block.key} is not in the latency table; the table is of another "
            "space. Run `ofa-deploy profile` to measure this one"
        ) from None
    return [
        latency_ms,
        block.mac_count / 1e6,
        block.parameter_count / 1e6,
        block.activation_count / 1e6,
        1.0,
    ]


def features(space: SearchSpace, blocks: BlockCosts, genomes: Genomes) -> Floats:
    """What a network's latency is regressed on.

    Returns:
        `(n, 1 + 1 + stages + costs - 1)`: 1; the milliseconds of stem and head; those
        of each stage's blocks; then every other cost of the whole network.
    """
    resolution = genomes[:, 0]
    pairs = genomes[:, space.first_slot_gene :].reshape(len(genomes), -1, 2)
    slot = np.arange(space.slot_count)[None, :]
    costs = blocks.slots[resolution[:, None], slot, pairs[..., 0], pairs[..., 1]]
    costs = costs * space.active_slots(genomes)[..., None]
    fixed = blocks.fixed[resolution]
    stages = np.add.reduceat(costs[..., 0], stage_starts(space), axis=1)
    rest = costs[..., 1:].sum(axis=1) + fixed[:, 1:]
    ones = np.ones((len(genomes), 1))
    return np.concatenate([ones, fixed[:, :1], stages, rest], axis=1)


def stage_starts(space: SearchSpace) -> list[int]:
    """First slot of each stage."""
    depths = [stage.max_depth for stage in space.stages]
    return [sum(depths[:index]) for index in range(len(depths))]
