from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from profilers.quiet import QuietStateFit, quiet_state
from profilers.stats import percentile_floor, percentile_ms

QUIET_ANCHOR_LOG = np.log(250_000)
SLOW_ANCHOR_LOG = np.log(1.6)
SLOW_SHARE = 0.75
BETA = 0.72


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Visits of models with known latencies, on a machine that is mostly slow."""

    effect_log: NDArray[np.float64]
    log_latency: NDArray[np.float64]
    log_anchor: NDArray[np.float64]
    model_index: NDArray[np.intp]

    def fit(self, order: NDArray[np.intp] | None = None) -> QuietStateFit:
        kept = slice(None) if order is None else order
        return quiet_state(
            self.log_latency[kept],
            self.log_anchor[kept],
            self.model_index[kept],
            model_count=self.effect_log.size,
        )


def simulate(seed: int, *, model_count: int = 40, visits: int = 18) -> Simulated:
    rng = np.random.default_rng(seed)
    effect = rng.uniform(np.log(20_000), np.log(1_000_000), model_count)
    index = np.concatenate([rng.permutation(model_count) for _ in range(visits)])
    slow = rng.random(index.size) < SLOW_SHARE
    slowdown = SLOW_ANCHOR_LOG * slow * rng.uniform(0.8, 1.0, index.size)
    return Simulated(
        effect_log=effect,
        log_latency=effect[index] + BETA * slowdown + rng.normal(0, 0.015, index.size),
        log_anchor=QUIET_ANCHOR_LOG + slowdown + rng.normal(0, 0.005, index.size),
        model_index=index,
    )


@pytest.mark.parametrize("seed", range(5))
def test_quiet_latencies_are_found_where_plain_medians_are_far_off(seed: int) -> None:
    simulated = simulate(seed)
    medians = np.array(
        [
            np.median(simulated.log_latency[simulated.model_index == model])
            for model in range(simulated.effect_log.size)
        ]
    )
    plain = np.expm1(np.abs(medians - simulated.effect_log))
    quiet = np.expm1(np.abs(simulated.fit().effect_log - simulated.effect_log))
    assert np.median(plain) > 0.1
    assert quiet.max() < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_beta_is_recovered(seed: int) -> None:
    assert simulate(seed).fit().beta == pytest.approx(BETA, abs=0.02)


def test_the_standard_error_is_about_the_error_made() -> None:
    errors = []
    for seed in range(20):
        simulated = simulate(seed)
        fit = simulated.fit()
        offset = fit.effect_log - simulated.effect_log
        # The level of the anchor is common to all models, and no scatter between them.
        errors.append((offset - offset.mean()) / fit.standard_error_log)
    assert np.std(errors) == pytest.approx(1.0, abs=0.2)


def test_one_visit_in_ten_disturbed_moves_no_latency_by_two_percent() -> None:
    simulated = simulate(0)
    rng = np.random.default_rng(1)
    disturbed = rng.random(simulated.log_latency.size) < 0.1
    simulated.log_latency[disturbed] += np.log(1.5)
    fit = simulated.fit()
    offset = fit.effect_log - simulated.effect_log
    assert np.median(np.abs(offset)) < 0.02


@given(seed=st.integers(0, 2**16))
def test_the_order_of_visits_is_irrelevant(seed: int) -> None:
    simulated = simulate(7, model_count=5, visits=6)
    order = np.random.default_rng(seed).permutation(simulated.log_latency.size)
    fit, shuffled = simulated.fit(), simulated.fit(order)
    assert shuffled.beta == pytest.approx(fit.beta)
    np.testing.assert_allclose(shuffled.effect_log, fit.effect_log)
    np.testing.assert_allclose(shuffled.standard_error_log, fit.standard_error_log)


@given(factor_log=st.floats(-5, 5))
def test_latencies_scale_with_the_samples(factor_log: float) -> None:
    simulated = simulate(7, model_count=5, visits=6)
    fit = simulated.fit()
    scaled = quiet_state(
        simulated.log_latency + factor_log,
        simulated.log_anchor,
        simulated.model_index,
        model_count=5,
    )
    np.testing.assert_allclose(scaled.effect_log, fit.effect_log + factor_log)
    np.testing.assert_allclose(scaled.standard_error_log, fit.standard_error_log)


def test_a_constant_anchor_gives_beta_zero_and_plain_means() -> None:
    fit = quiet_state(
        np.log([10.0, 20.0, 10.0, 20.0]),
        np.full(4, 12.3),
        np.array([0, 1, 0, 1]),
        model_count=2,
    )
    assert fit.beta == 0
    np.testing.assert_allclose(np.exp(fit.effect_log), [10, 20])


def test_a_known_reference_moves_a_run_that_was_slow_all_along_to_the_quiet_state() -> (
    None
):
    slow_log = np.log(1.5)
    fit = quiet_state(
        np.log(np.full(4, 100.0)) + slow_log,
        np.full(4, QUIET_ANCHOR_LOG + slow_log),
        np.zeros(4, dtype=np.intp),
        model_count=1,
        beta=1.0,
        reference_log_anchor=QUIET_ANCHOR_LOG,
    )
    np.testing.assert_allclose(np.exp(fit.effect_log), [100])


def test_two_visits_that_agree_by_luck_are_not_certain() -> None:
    fit = quiet_state(
        np.array([1.0, 1.0, 2.0, 2.1, 3.0, 2.8, 3.1, 2.9]),
        np.zeros(8),
        np.array([0, 0, 1, 1, 2, 2, 2, 2]),
        model_count=3,
    )
    assert fit.standard_error_log.min() > 0


@pytest.mark.parametrize(
    ("log_latency", "log_anchor", "model_index", "message"),
    [
        pytest.param([1.0], [1.0, 2.0], [0], "one entry per visit", id="lengths"),
        pytest.param([], [], [], r"give \(n,\), n > 0", id="none"),
        pytest.param([np.nan], [1.0], [0], "not finite", id="nan"),
        pytest.param([1.0], [-np.inf], [0], "not finite", id="infinite"),
        pytest.param([1.0], [1.0], [1], "visit every model", id="not visited"),
    ],
)
def test_visits_that_cannot_be_fitted_are_refused(
    log_latency: list[float],
    log_anchor: list[float],
    model_index: list[int],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        quiet_state(
            np.array(log_latency),
            np.array(log_anchor),
            np.array(model_index, dtype=np.intp),
            model_count=1,
        )


@pytest.mark.parametrize(
    ("percentile", "floor"), [(10, 1), (50, 1), (90, 64), (95, 130), (99, 662)]
)
def test_a_percentile_needs_its_floor_of_samples(percentile: float, floor: int) -> None:
    assert percentile_floor(percentile) == floor
    assert percentile_ms([1_000_000] * floor, percentile) == 1.0
    assert percentile_ms([1_000_000] * (floor - 1), percentile) is None


@pytest.mark.parametrize("percentile", [0, 100, -1, float("nan")])
def test_percentiles_outside_0_to_100_are_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 100"):
        percentile_floor(percentile)
