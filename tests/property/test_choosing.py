"""What is chosen by prediction: never a width that costs no less than a wider one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ofa_deploy.choosing import Chooser, PredictedLimits, Predictors, find_front
from ofa_deploy.predict.latency import LatencyPredictor, ResidualRatios
from ofa_deploy.predict.sizes import network_sizes
from ofa_deploy.search.evolution import Evolution
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.search.pareto import Nsga2
from ofa_deploy.space import Genomes
from tests.support import tiny

Floats = NDArray[np.float64]
SPACE = tiny.SPACE
ALL = enumerate_genomes(SPACE)
SIZES = network_sizes(SPACE)


def narrow_is_better(genomes: Genomes) -> Floats:
    """An accuracy predictor that takes every widening for a loss."""
    pairs = SPACE.slot_choices(genomes)
    return np.asarray(0.9 - 0.01 * pairs[..., 1].sum(axis=1))


def chooser(seed: int) -> Chooser:
    """By random prices: about every second width costs no less than a wider one."""
    rng = np.random.default_rng(seed)
    latency = LatencyPredictor(
        space=SPACE,
        fixed_ms=rng.uniform(0.1, 0.2, 2),
        slot_ms=rng.uniform(0.05, 0.5, (2, SPACE.slot_count, 3, 2)),
        residuals=ResidualRatios(rms=0.03, low=0.94, high=1.06, upper=1.05, count=100),
    )
    predictors = Predictors(latency=latency, accuracy=narrow_is_better, sizes=SIZES)
    search = Nsga2(population=40, generations=10, polish=10_000)
    return Chooser(
        predictors=predictors,
        front=find_front(predictors, search),
        evolution=Evolution(generations=10),
    )


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("least_accuracy", [None, 0.85])
@given(seed=st.integers(0, 2**32 - 1), place=st.floats(0.05, 1))
def test_no_width_is_chosen_that_costs_no_less_than_a_wider_one(
    least_accuracy: float | None, seed: int, place: float
) -> None:
    found = chooser(seed)
    predictors = found.predictors
    wide = predictors.widths.apply(ALL)
    able = (least_accuracy is None) | (narrow_is_better(wide) >= (least_accuracy or 0))
    latency_ms = float(np.quantile(predictors.latency.predict_ms(wide[able]), place))
    limits = PredictedLimits(latency_ms=latency_ms, min_accuracy=least_accuracy)
    rows = np.stack([SPACE.encode(config) for config in found.best(limits, count=3)])
    np.testing.assert_array_equal(predictors.widths.apply(rows), rows)
    assert (predictors.latency.predict_ms(rows) <= latency_ms).all()


def test_a_limit_on_size_makes_narrow_widths_worth_having() -> None:
    found = chooser(0)
    smallest = float(SIZES.weight_bytes(ALL).min())
    (config,) = found.best(PredictedLimits(weight_bytes=smallest))
    row = SPACE.encode(config)[None]
    assert SIZES.weight_bytes(row)[0] == smallest
    assert (found.predictors.widths.apply(row) != row).any()
