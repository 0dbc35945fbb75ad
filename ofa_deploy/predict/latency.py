"""Latency of a network from measured blocks, calibrated by measured networks.

A network is not the sum of its blocks: the runtime fuses and keeps caches warm across
them. So the sums of each stage are features, with the network's sizes beside them, and
a small set of whole networks, measured in the same run, says what each is worth.
Everything is in quiet-state milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ofa_deploy.errors import UnmeasuredBlock
from ofa_deploy.predict.block_costs import (
    COSTS,
    BlockCosts,
    Floats,
    features,
    look_up_blocks,
    stage_starts,
)
from ofa_deploy.space import Genomes, SearchSpace, SubnetConfig
from profilers.table import LatencyTable

TWO_SIDED_95 = 1.96
ONE_SIDED_95 = 1.645
# Share of networks that an interval, or an upper bound, is to hold.
COVERAGE = 0.95
# Strength of the prior that a block costs alone what it costs in a network, in units
# of the squared relative error that one network's measurement carries.
PRIOR_STRENGTH = 3e-4
# A measurement with a standard error of this share of its latency counts half as much
# as an exact one: about what the fit misses of networks that were measured well.
MODEL_ERROR_RATIO = 0.02
# Networks priced at a time: their prices stay in the processor's cache.
BATCH = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyEstimate:
    """A predicted latency with its 95 % interval."""

    ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualRatios:
    """How measured latencies lie around predictions that had not seen them.

    Args:
        rms: Root mean square of measured over predicted, minus 1.
        low: What 97.5 % of networks lie above, as a multiple of their prediction.
        high: What 97.5 % lie below.
        upper: What 95 % lie below.
    """

    rms: float
    low: float
    high: float
    upper: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatencyPredictor:
    """A list of prices, by gene.

    Args:
        space: Whose genomes it takes.
        fixed_ms: Stem, head and what every network costs, `(resolutions,)`.
        slot_ms: `(resolutions, slots, kernels, expands)`.
        residuals: Of networks that the fit had not seen.
    """

    space: SearchSpace
    fixed_ms: Floats
    slot_ms: Floats
    residuals: ResidualRatios

    def predict_ms(self, genomes: Genomes) -> Floats:
        """Predicted latencies `(n,)` of genomes `(n, genes)`."""
        latencies = np.empty(len(genomes))
        for start in range(0, len(genomes), BATCH):
            part = genomes[start : start + BATCH]
            latencies[start : start + BATCH] = self._price(part)
        return latencies

    def _price(self, genomes: Genomes) -> Floats:
        space = self.space
        _, slot_count, kernels, expands = self.slot_ms.shape
        pairs = genomes[:, space.first_slot_gene :].reshape(len(genomes), -1, 2)
        resolution = genomes[:, 0]
        place = resolution[:, None] * slot_count + np.arange(slot_count)
        place = (place * kernels + pairs[..., 0]) * expands + pairs[..., 1]
        prices = self.slot_ms.ravel().take(place)
        prices *= space.active_slots(genomes)
        total: Floats = prices.sum(axis=1) + self.fixed_ms[resolution]
        return total

    @property
    def residual_ratio(self) -> float:
        """Relative standard error of a prediction."""
        return self.residuals.rms

    @property
    def upper_ratio(self) -> float:
        """What 95 % of networks stay below, as a multiple of their prediction."""
        return self.residuals.upper

    def estimate(self, config: SubnetConfig) -> LatencyEstimate:
        """The prediction for one network, with its interval."""
        ms = float(self.predict_ms(self.space.encode(config)[None])[0])
        return LatencyEstimate(
            ms=ms, low_ms=ms * self.residuals.low, high_ms=ms * self.residuals.high
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
    networks = [table.networks[name] for name in names]
    measured_ms = np.array([network.quiet_ms for network in networks])
    errors = np.array([network.standard_error_ratio for network in networks])
    matrix = features(space, blocks, genomes)
    return price_list(
        space,
        blocks,
        fit_weights(matrix, measured_ms, error_ratios=errors),
        residuals=_conformal(left_out_ratios(matrix, measured_ms, error_ratios=errors)),
    )


def price_list(
    space: SearchSpace,
    blocks: BlockCosts,
    weights: Floats,
    *,
    residuals: ResidualRatios,
) -> LatencyPredictor:
    """The predictor that weighs `features` with `weights`."""
    count = len(space.stages)
    constant, fixed_weight, rest = weights[0], weights[1], weights[2 + count :]
    starts = np.array(stage_starts(space))
    stage = np.searchsorted(starts, np.arange(space.slot_count), side="right") - 1
    stage_weight = weights[2 + stage]
    return LatencyPredictor(
        space=space,
        fixed_ms=(
            constant + fixed_weight * blocks.fixed[:, 0] + blocks.fixed[:, 1:] @ rest
        ),
        slot_ms=(
            stage_weight[:, None, None] * blocks.slots[..., 0]
            + blocks.slots[..., 1:] @ rest
        ),
        residuals=residuals,
    )


def fit_weights(matrix: Floats, measured_ms: Floats, *, error_ratios: Floats) -> Floats:
    """Least relative squares, drawn towards plain sums of the blocks' milliseconds.

    Args:
        matrix: `features` of measured networks, `(n, features)`.
        measured_ms: Their latencies, `(n,)`.
        error_ratios: Standard errors of these, as shares of them: what could not be
            measured well counts less.
    """
    trust = 1 / np.sqrt(1 + (error_ratios / MODEL_ERROR_RATIO) ** 2)
    scaled = matrix * (trust / measured_ms)[:, None]
    prior = np.ones(matrix.shape[1])
    prior[0] = 0.0
    prior[-(len(COSTS) - 1) :] = 0.0
    # A prior in the units of each feature's own share of a latency.
    strength = PRIOR_STRENGTH * (scaled**2).mean(axis=0) * len(matrix)
    gram = scaled.T @ scaled + np.diag(strength)
    solution: Floats = prior + np.linalg.solve(
        gram, scaled.T @ (trust - scaled @ prior)
    )
    return solution


def left_out_ratios(
    matrix: Floats, measured_ms: Floats, *, error_ratios: Floats, folds: int = 10
) -> Floats:
    """Measured over predicted, `(n,)`, each by a fit that had not seen it."""
    fold = np.arange(len(measured_ms)) % min(folds, len(measured_ms))
    ratios = np.empty(len(measured_ms))
    for left_out in np.unique(fold):
        inside = fold != left_out
        weights = fit_weights(
            matrix[inside], measured_ms[inside], error_ratios=error_ratios[inside]
        )
        ratios[~inside] = measured_ms[~inside] / (matrix[~inside] @ weights)
    return ratios


def _conformal(ratios: Floats) -> ResidualRatios:
    """Bounds from the ratios' own ranks, with no assumption about their shape.

    Source: V. Vovk, "Cross-conformal predictors", 2015: the scores of networks left
    out in turn take the place of a calibration set's.
    """
    tail = (1 - COVERAGE) / 2
    return ResidualRatios(
        rms=float(np.sqrt(((ratios - 1) ** 2).mean())),
        low=1 / _rank_bound(1 / ratios, 1 - tail),
        high=_rank_bound(ratios, 1 - tail),
        upper=_rank_bound(ratios, COVERAGE),
    )


def _rank_bound(ratios: Floats, coverage: float) -> float:
    """The least ratio that a new one stays below with at least `coverage`.

    With too few for that, the normal bound of their scatter, where it is larger.
    """
    rank = math.ceil((len(ratios) + 1) * coverage)
    if rank <= len(ratios):
        return float(np.sort(ratios)[rank - 1])
    quantile = TWO_SIDED_95 if coverage > COVERAGE else ONE_SIDED_95
    normal = 1 + quantile * float(np.sqrt(((ratios - 1) ** 2).mean()))
    return max(normal, float(ratios.max()))
