"""Latency of a network from measured blocks, calibrated by measured networks.

A network is not the sum of its blocks: the runtime fuses and keeps caches warm across
them. So the sums of each stage are features, and a small set of whole networks,
measured in the same run, says what each is worth. Everything is in quiet-state
milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import UnmeasuredBlock
from ofa_deploy.plan import lower
from ofa_deploy.space import BlockConfig, Genomes, SearchSpace, SubnetConfig
from profilers.table import LatencyTable

Floats = NDArray[np.float64]

# Two-sided 95 % of a normal residual, and one-sided 95 % for upper bounds.
TWO_SIDED_95 = 1.96
ONE_SIDED_95 = 1.645
# Strength of the prior that a block costs alone what it costs in a network, in units
# of the squared relative error that one network's measurement carries.
PRIOR_STRENGTH = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyEstimate:
    """A predicted latency with its 95 % interval."""

    ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockLookup:
    """Measured block latencies as arrays over genes.

    Args:
        fixed_ms: Stem and head, `(resolutions,)`.
        slot_ms: `(resolutions, slots, kernels, expands)`; NaN where a stage has fewer
            choices than another.
    """

    fixed_ms: Floats
    slot_ms: Floats


def look_up_blocks(
    space: SearchSpace, latency_ms_by_key: Mapping[str, float]
) -> BlockLookup:
    """Arrange measured blocks by genes.

    Raises:
        UnmeasuredBlock: Names the first block that is missing.
    """
    kernels = max(len(s.kernels) for s in space.stages)
    expands = max(len(s.expands) for s in space.stages)
    fixed = np.zeros(len(space.resolutions))
    slots = np.full((len(fixed), space.slot_count, kernels, expands), np.nan)
    for r, resolution in enumerate(space.resolutions):
        for k in range(kernels):
            for e in range(expands):
                config = _uniform(space, resolution, k, e)
                times = [
                    (b.name, _measured(latency_ms_by_key, b.key))
                    for b in lower(space, config).blocks
                ]
                staged = [ms for name, ms in times if name.startswith("stage")]
                slots[r, :, k, e] = staged
                fixed[r] = sum(ms for n, ms in times if not n.startswith("stage"))
    return BlockLookup(fixed_ms=fixed, slot_ms=slots)


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


def _measured(latency_ms_by_key: Mapping[str, float], key: str) -> float:
    try:
        return latency_ms_by_key[key]
    except KeyError:
        raise UnmeasuredBlock(
            f"block {key} is not in the latency table; the table is of another space. "
            "Run `ofa-deploy profile` to measure this one"
        ) from None


def features(space: SearchSpace, blocks: BlockLookup, genomes: Genomes) -> Floats:
    """Per network: 1, stem and head, and the block sum of each stage, in ms.

    Returns:
        `(n, 2 + stages)`.
    """
    resolution = genomes[:, 0]
    pairs = genomes[:, space.first_slot_gene :].reshape(len(genomes), -1, 2)
    slot = np.arange(space.slot_count)[None, :]
    times = blocks.slot_ms[resolution[:, None], slot, pairs[..., 0], pairs[..., 1]]
    times = np.where(space.active_slots(genomes), times, 0.0)
    bounds = np.cumsum([0, *(stage.max_depth for stage in space.stages)])[:-1]
    stages = np.add.reduceat(times, bounds, axis=1)
    fixed = blocks.fixed_ms[resolution][:, None]
    return np.concatenate([np.ones_like(fixed), fixed, stages], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatencyPredictor:
    """Block sums times calibrated weights.

    Args:
        space: Whose genomes it takes.
        blocks: Measured blocks.
        weights: Of `features`, `(2 + stages,)`.
        residual_ratio: Relative standard error of a prediction, from networks that
            the fit had not seen.
    """

    space: SearchSpace
    blocks: BlockLookup
    weights: Floats
    residual_ratio: float

    def predict_ms(self, genomes: Genomes) -> Floats:
        """Predicted latencies `(n,)` of genomes `(n, genes)`."""
        return features(self.space, self.blocks, genomes) @ self.weights

    @property
    def upper_ratio(self) -> float:
        """What 95 % of networks stay below, as a multiple of their prediction."""
        return 1 + ONE_SIDED_95 * self.residual_ratio

    def estimate(self, config: SubnetConfig) -> LatencyEstimate:
        """The prediction for one network, with its interval."""
        ms = float(self.predict_ms(self.space.encode(config)[None])[0])
        margin = TWO_SIDED_95 * self.residual_ratio
        return LatencyEstimate(
            ms=ms, low_ms=ms * (1 - margin), high_ms=ms * (1 + margin)
        )


def fit_latency_predictor(space: SearchSpace, table: LatencyTable) -> LatencyPredictor:
    """The predictor of a table's blocks and networks.

    Raises:
        UnmeasuredBlock: The table is of another space, or holds no network.
    """
    if len(table.networks) < 2:
        raise UnmeasuredBlock(
            f"the table holds {len(table.networks)} whole networks; at least 2 are "
            "needed to calibrate. Run `ofa-deploy profile`"
        )
    blocks = look_up_blocks(space, {key: m.quiet_ms for key, m in table.blocks.items()})
    names = sorted(table.networks)
    genomes = np.stack([space.encode(SubnetConfig.from_id(name)) for name in names])
    measured = np.array([table.networks[name].quiet_ms for name in names])
    matrix = features(space, blocks, genomes)
    return LatencyPredictor(
        space=space,
        blocks=blocks,
        weights=_ridge(matrix, measured),
        residual_ratio=_left_out_error(matrix, measured),
    )


def _ridge(matrix: Floats, measured: Floats) -> Floats:
    """Least relative squares, drawn towards plain sums (weights 1, constant 0)."""
    scaled = matrix / measured[:, None]
    prior = np.ones(matrix.shape[1])
    prior[0] = 0.0
    # A prior in the units of each feature's own share of a latency.
    strength = PRIOR_STRENGTH * (scaled**2).mean(axis=0) * len(matrix)
    gram = scaled.T @ scaled + np.diag(strength)
    solution: Floats = prior + np.linalg.solve(gram, scaled.T @ (1 - scaled @ prior))
    return solution


def _left_out_error(matrix: Floats, measured: Floats, *, folds: int = 10) -> float:
    """Root mean square relative error over folds that the fit has not seen."""
    fold = np.arange(len(measured)) % min(folds, len(measured))
    errors = np.empty(len(measured))
    for left_out in np.unique(fold):
        inside = fold != left_out
        weights = _ridge(matrix[inside], measured[inside])
        errors[~inside] = matrix[~inside] @ weights / measured[~inside] - 1
    return float(np.sqrt((errors**2).mean()))
