"""Leaving dominated widths out never makes a network slower or narrower."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_deploy.families import mbv3
from ofa_deploy.predict.latency import LatencyPredictor, ResidualRatios
from ofa_deploy.search.dominated_widths import promotion
from ofa_deploy.space import SearchSpace
from tests.support import tiny

RESIDUALS = ResidualRatios(rms=0.03, low=0.94, high=1.06, upper=1.05, count=100)


def priced(space: SearchSpace, seed: int) -> LatencyPredictor:
    rng = np.random.default_rng(seed)
    kernels = max(len(stage.kernels) for stage in space.stages)
    expands = max(len(stage.expands) for stage in space.stages)
    sizes = (len(space.resolutions), space.slot_count, kernels, expands)
    return LatencyPredictor(
        space=space,
        fixed_ms=rng.uniform(0.1, 0.2, sizes[0]),
        slot_ms=rng.uniform(0.05, 0.5, sizes),
        residuals=RESIDUALS,
    )


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("space", [tiny.SPACE, mbv3.small()], ids=lambda s: s.name)
@given(seed=st.integers(0, 2**32 - 1))
def test_promoted_networks_are_wider_and_no_slower(
    space: SearchSpace, seed: int
) -> None:
    predictor = priced(space, seed)
    rule = promotion(space, predictor.slot_ms)
    genomes = space.sample(50, np.random.default_rng(seed))
    promoted = rule.apply(genomes)
    assert (promoted >= genomes).all()
    assert (predictor.predict_ms(promoted) <= predictor.predict_ms(genomes)).all()
    for row in promoted:  # still networks of the space, in canonical form
        np.testing.assert_array_equal(space.encode(space.decode(row)), row)
    np.testing.assert_array_equal(rule.apply(promoted), promoted)


def test_rising_prices_leave_everything_as_it_is() -> None:
    space = mbv3.small()
    slot_ms = np.broadcast_to(np.arange(1.0, 4.0), (3, space.slot_count, 3, 3))
    rule = promotion(space, slot_ms)
    genomes = space.sample(50, np.random.default_rng(0))
    np.testing.assert_array_equal(rule.apply(genomes), genomes)
    assert rule.dominated_share == 0.0


def test_a_staircase_leaves_its_edges() -> None:
    space = mbv3.small()
    # The middle width costs as much as the widest.
    slot_ms = np.broadcast_to([1.0, 2.0, 2.0], (3, space.slot_count, 3, 3))
    rule = promotion(space, slot_ms)
    assert rule.dominated_share == pytest.approx(1 / 3)
    assert (rule.expands == [0, 2, 2]).all()
