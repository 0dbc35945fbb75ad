"""Latency of a network from measured blocks, calibrated by measured networks.

A network is not the sum of its blocks: the runtime fuses and keeps caches warm across
them. So the sums of each stage are features, with the network's sizes beside them, and
a small set of whole networks, measured in the same run, says what each is worth, and
how that changes with the resolution: larger images leave the caches sooner.
Everything is in quiet-state milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import UnmeasuredBlock
from ofa_deploy.predict.block_costs import (
    COSTS,
    BlockCosts,
    Floats,
    features,
    stage_starts,
    table_blocks,
)
from ofa_deploy.space import Genomes, SearchSpace, SubnetConfig
from profilers.table import LatencyTable

TWO_SIDED_95 = 1.96
ONE_SIDED_95 = 1.645
# Share of networks that an interval, or an upper bound, is to hold.
COVERAGE = 0.95
# Strength of the prior that a block costs alone what it costs in a network, as a share
# of what the networks themselves tell, however many they are.
PRIOR_STRENGTH = 3e-4
# The same of the prior that it is worth as much at every resolution: cross-validated on
# nine tables, of two spaces, three runtimes and two machines, from 48 networks up.
RESOLUTION_PRIOR_STRENGTH = 0.1
# A measurement with a standard error of this share of its latency counts half as much
# as an exact one: about what the fit misses of networks that were measured well.
MODEL_ERROR_RATIO = 0.02
# As few random networks have no rank that 97.5 % stay below; all of a table's then say
# how far predictions are off.
LEAST_RANDOM = 39
# Networks priced at a time: their prices stay in the processor's cache.
BATCH = 16_384

Objective = Callable[[Genomes], Floats]


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
        count: Of the networks that tell.
    """

    rms: float
    low: float
    high: float
    upper: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatencyPredictor:
    """A list of prices, by gene; infinite for a block that the runtime fails on.

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
        """Predicted latencies `(n,)` of genomes `(n, genes)`.

        Infinite for networks with a block that the runtime fails on.
        """
        latencies = np.empty(len(genomes))
        for start in range(0, len(genomes), BATCH):
            part = genomes[start : start + BATCH]
            latencies[start : start + BATCH] = self._price(part)
        return latencies

    def _price(self, genomes: Genomes) -> Floats:
        space = self.space
        _, slot_count, kernels, expands = self.slot_ms.shape
        pairs = space.slot_choices(genomes)
        resolution = genomes[:, 0]
        place = resolution[:, None] * slot_count + np.arange(slot_count)
        place = (place * kernels + pairs[..., 0]) * expands + pairs[..., 1]
        prices = self.slot_ms.ravel().take(place)
        prices[~space.active_slots(genomes)] = 0.0
        total: Floats = prices.sum(axis=1) + self.fixed_ms[resolution]
        return total

    def where_runnable(self, value: Objective) -> Objective:
        """The same, but infinite for networks with a block that the runtime fails on.

        Args:
            value: Genomes `(n, genes)` to values `(n,)`.
        """

        def of_runnable(genomes: Genomes) -> Floats:
            return np.where(
                np.isfinite(self.predict_ms(genomes)), value(genomes), np.inf
            )

        return of_runnable

    def fastest(self) -> Genomes:
        """The fastest network, `(genes,)`: exact, as latencies are sums of prices."""
        space = self.space
        count, slot_count, kernels, expands = self.slot_ms.shape
        choices = space.choice_counts[space.first_slot_gene :].reshape(-1, 2, 1, 1)
        there_are = np.arange(kernels)[:, None] < choices[:, 0]
        there_are = there_are & (np.arange(expands) < choices[:, 1])
        prices = np.where(there_are, self.slot_ms, np.inf)
        prices = prices.reshape(count, slot_count, -1)
        pairs = np.stack(np.divmod(prices.argmin(axis=2), expands), axis=2)
        total, depths = self.fixed_ms.copy(), []
        starts = [*stage_starts(space), slot_count]
        for stage, first, end in zip(space.stages, starts, starts[1:], strict=False):
            by_depth = prices[:, first:end].min(axis=2).cumsum(axis=1)
            by_depth = by_depth[:, np.array(stage.depths) - 1]
            total += by_depth.min(axis=1)
            depths.append(by_depth.argmin(axis=1))
        best = int(total.argmin())
        genome = [best, *(depth[best] for depth in depths), *pairs[best].ravel()]
        found: Genomes = space.canonical(np.array([genome], dtype=np.int64))[0]
        return found

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
    blocks, known = table_blocks(space, table), calibration(space, table)
    weights = fit_weights(
        known.matrix, known.measured_ms, error_ratios=known.error_ratios
    )
    return price_list(space, blocks, weights, residuals=_residuals(known))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """The networks that a predictor is fitted to.

    Args:
        names: Of those in the table that have no block that failed.
        matrix: Their `features_by_resolution`, `(n, 2 × features)`.
        measured_ms: `(n,)`.
        error_ratios: Standard errors of these, as shares of them, `(n,)`.
        random: Which were drawn at random, `(n,)`.
    """

    names: tuple[str, ...]
    matrix: Floats
    measured_ms: Floats
    error_ratios: Floats
    random: NDArray[np.bool_]

    def left_out(self) -> Floats:
        """See `left_out_ratios`."""
        return left_out_ratios(
            self.matrix, self.measured_ms, error_ratios=self.error_ratios
        )


def calibration(space: SearchSpace, table: LatencyTable) -> Calibration:
    """What a table tells of whole networks.

    Raises:
        UnmeasuredBlock: The table is of another space, or holds no network.
    """
    genomes = {
        name: space.encode(SubnetConfig.from_id(name))
        for name in sorted(table.networks)
    }
    blocks = table_blocks(space, table)
    rows = np.array([*genomes.values()], dtype=np.int64)
    rows = rows.reshape(-1, len(space.choice_counts))
    matrix = features(space, blocks, rows)
    runnable = np.flatnonzero(np.isfinite(matrix).all(axis=1))
    every = list(genomes)
    names = tuple(every[row] for row in runnable)
    if len(names) < 2:
        raise UnmeasuredBlock(
            f"the table holds {len(names)} whole networks; at least 2 are needed to "
            "calibrate. Run `ofa-deploy profile`"
        )
    networks = [table.networks[name] for name in names]
    return Calibration(
        names=names,
        matrix=features_by_resolution(space, matrix[runnable], rows[runnable]),
        measured_ms=np.array([network.quiet_ms for network in networks]),
        error_ratios=np.array([network.standard_error_ratio for network in networks]),
        random=np.isin(names, table.random_networks),
    )


def features_by_resolution(
    space: SearchSpace, matrix: Floats, genomes: Genomes
) -> Floats:
    """The `features` of networks that run, and the same by their resolution.

    These are times its place between the least, -1, and the largest, 1.

    Returns:
        `(n, 2 × features)`.
    """
    place = _resolution_places(space)[genomes[:, 0], None]
    return np.concatenate([matrix, place * matrix], axis=1)


def _resolution_places(space: SearchSpace) -> Floats:
    """Where each resolution lies between the least, -1, and the largest, 1."""
    resolutions = np.array(space.resolutions, dtype=np.float64)
    middle = (resolutions[0] + resolutions[-1]) / 2
    half = (resolutions[-1] - resolutions[0]) / 2
    return (resolutions - middle) / half if half else np.zeros(1)


def price_list(
    space: SearchSpace,
    blocks: BlockCosts,
    weights: Floats,
    *,
    residuals: ResidualRatios,
) -> LatencyPredictor:
    """The predictor that weighs `features_by_resolution` with `weights`."""
    base, slopes = np.split(weights, 2)
    # By resolution, as the prices are.
    found = base + _resolution_places(space)[:, None] * slopes
    rest = found[:, 2 + len(space.stages) :]
    starts = np.array(stage_starts(space))
    stage = np.searchsorted(starts, np.arange(space.slot_count), side="right") - 1
    stage_weights = found[:, 2 + stage]
    return LatencyPredictor(
        space=space,
        fixed_ms=found[:, 0] + _prices(blocks.fixed, found[:, 1], rest),
        slot_ms=_prices(
            blocks.slots, stage_weights[..., None, None], rest[:, None, None, None]
        ),
        residuals=residuals,
    )


def _prices(costs: Floats, weight: Floats, rest: Floats) -> Floats:
    """Costs `(..., costs)` weighed, `(...)`; infinite stays so, whatever the weight."""
    failed = np.isinf(costs[..., 0])
    weighed = weight * np.where(failed, 0.0, costs[..., 0])
    weighed = weighed + (costs[..., 1:] * rest).sum(axis=-1)
    return np.where(failed, np.inf, weighed)


def fit_weights(matrix: Floats, measured_ms: Floats, *, error_ratios: Floats) -> Floats:
    """Least relative squares, drawn towards plain sums of the blocks' milliseconds.

    Args:
        matrix: `features_by_resolution` of measured networks, `(n, 2 × features)`.
        measured_ms: Their latencies, `(n,)`.
        error_ratios: Standard errors of these, as shares of them: what could not be
            measured well counts less.
    """
    trust = 1 / np.sqrt(1 + (error_ratios / MODEL_ERROR_RATIO) ** 2)
    scaled = matrix * (trust / measured_ms)[:, None]
    count = matrix.shape[1] // 2
    prior = np.zeros(2 * count)
    prior[1 : count - (len(COSTS) - 1)] = 1.0
    # A prior in the units of each feature's own share of a latency.
    strength = (scaled**2).sum(axis=0)
    strength *= np.repeat([PRIOR_STRENGTH, RESOLUTION_PRIOR_STRENGTH], count)
    strength[strength == 0] = 1.0  # what no network has is worth what the prior says
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


def _residuals(known: Calibration) -> ResidualRatios:
    """Of random networks, where a table says which ones are.

    A conformal bound holds for what is like the networks that it is taken from: those
    chosen for what they tell are at the space's edges.
    """
    ratios = known.left_out()
    enough = known.random.sum() >= LEAST_RANDOM
    return _conformal(ratios[known.random] if enough else ratios)


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
        count=len(ratios),
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
