"""What blocks cost, arranged by genes: measured milliseconds, and sizes.

Features of a network are sums of its blocks' costs, so that any weighting of them is a
list of prices per gene.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import UnmeasuredBlock
from ofa_deploy.layers import BlockPlan
from ofa_deploy.plan import lower
from ofa_deploy.space import Genomes, SearchSpace
from profilers.table import LatencyTable

Floats = NDArray[np.float64]

# A block's costs, in the order of the arrays' last axis. Beside its own latency, what
# the runtime spends between blocks: it grows with the data handed on, with the weights
# that no longer fit into the caches, and with every block.
COSTS = ("ms", "MMACs", "M parameters", "M activations", "blocks")
# Times that failed blocks of random networks are drawn anew: of nine choices of which
# one is left, it is then the one nearly always.
REDRAWS = 40


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockCosts:
    """Costs as arrays over genes; the milliseconds of a block that failed are infinite.

    Args:
        fixed: Stem and head together, `(resolutions, costs)`.
        slots: `(resolutions, slots, kernels, expands, costs)`; a stage with fewer
            choices than another repeats its last one.
    """

    fixed: Floats
    slots: Floats


def table_blocks(space: SearchSpace, table: LatencyTable) -> BlockCosts:
    """Arrange a table's blocks by genes, those that failed among them.

    Raises:
        UnmeasuredBlock: Names the first block that the table does not know.
    """
    failed = dict.fromkeys(table.failures, math.inf)
    measured = {key: block.quiet_ms for key, block in table.blocks.items()}
    return look_up_blocks(space, failed | measured)


def look_up_blocks(
    space: SearchSpace, latency_ms_by_key: Mapping[str, float]
) -> BlockCosts:
    """Arrange measured blocks by genes.

    Args:
        space: Whose blocks.
        latency_ms_by_key: Infinite for a block that failed.

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
            blocks = lower(
                space,
                space.uniform(resolution, kernel_index=kernel, expand_index=expand),
            ).blocks
            staged = [block for block in blocks if block.stage is not None]
            inside.append([costs(block) for block in staged])
        rest = [block for block in blocks if block.stage is None]
        outside.append([costs(block) for block in rest])
    slots = np.array(inside, dtype=np.float64)
    slots = slots.reshape(len(outside), kernels, expands, space.slot_count, -1)
    return np.array(outside, dtype=np.float64), slots.transpose(0, 3, 1, 2, 4)


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
        of each stage's blocks; then every other cost of the whole network. A network
        with a block that failed has infinite ones.
    """
    costs = np.where(
        space.active_slots(genomes)[..., None], _chosen(space, blocks, genomes), 0.0
    )
    fixed = blocks.fixed[genomes[:, 0]]
    stages = np.add.reduceat(costs[..., 0], stage_starts(space), axis=1)
    rest = costs[..., 1:].sum(axis=1) + fixed[:, 1:]
    ones = np.ones((len(genomes), 1))
    return np.concatenate([ones, fixed[:, :1], stages, rest], axis=1)


def _chosen(space: SearchSpace, blocks: BlockCosts, genomes: Genomes) -> Floats:
    """Costs of each slot's block, used or not, `(n, slots, costs)`."""
    pairs = space.slot_choices(genomes)
    slot = np.arange(space.slot_count)[None, :]
    found: Floats = blocks.slots[genomes[:, :1], slot, pairs[..., 0], pairs[..., 1]]
    return found


def sample_runnable(
    space: SearchSpace, blocks: BlockCosts, count: int, rng: np.random.Generator
) -> Genomes:
    """Random networks without blocks that failed, `(count or fewer, genes)`.

    Such a block is drawn anew. What has one even then is left out: no choice may be
    left where it stands.
    """
    drawn = space.sample(count, rng)
    for _ in range(REDRAWS):
        failed = np.isinf(_chosen(space, blocks, drawn)[..., 0])
        failed &= space.active_slots(drawn)
        if not failed.any():
            break
        redrawn = rng.integers(0, space.choice_counts, size=drawn.shape)
        genes = np.zeros(drawn.shape, dtype=bool)
        genes[:, space.first_slot_gene :] = np.repeat(failed, 2, axis=1)
        drawn = np.where(genes, redrawn, drawn)
    return drawn[np.isfinite(features(space, blocks, drawn)).all(axis=1)]


def stage_starts(space: SearchSpace) -> list[int]:
    """First slot of each stage."""
    depths = [stage.max_depth for stage in space.stages]
    return [sum(depths[:index]) for index in range(len(depths))]
