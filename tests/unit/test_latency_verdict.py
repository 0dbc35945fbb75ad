from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.verify import judge_latency
from tests.support.tiny_session import fresh

latencies_ms = st.floats(1e-3, 1e3)
error_ratios = st.floats(0, 0.5)
# How far above 1 a factor is that a comparison must see.
slightly = st.floats(1e-9, 1e-3).map(lambda excess: 1 + excess)
# Of a normal distribution; the library's own constant is rounded.
ONE_SIDED_95 = NormalDist().inv_cdf(0.95)


def upper_ms(measured_ms: float, error_ratio: float) -> float:
    """The bound that is exceeded once in twenty measurements."""
    return measured_ms * (1 + ONE_SIDED_95 * error_ratio)


def meets(measured_ms: float, error_ratio: float, *, budget_ms: float) -> bool:
    measurement = fresh(measured_ms, error_ratio=error_ratio)
    return judge_latency(measurement, budget_ms=budget_ms).met


@given(latencies_ms, error_ratios, latencies_ms)
def test_an_upper_bound_above_the_budget_never_meets_it(
    measured_ms: float, error_ratio: float, budget_ms: float
) -> None:
    if upper_ms(measured_ms, error_ratio) > budget_ms:
        assert not meets(measured_ms, error_ratio, budget_ms=budget_ms)


@given(latencies_ms, error_ratios, slightly)
def test_a_budget_just_above_the_upper_bound_is_met_and_one_just_below_is_not(
    measured_ms: float, error_ratio: float, factor: float
) -> None:
    measurement = fresh(measured_ms, error_ratio=error_ratio)
    bound_ms = judge_latency(measurement, budget_ms=1.0).bound
    assert meets(measured_ms, error_ratio, budget_ms=bound_ms * factor)
    assert not meets(measured_ms, error_ratio, budget_ms=bound_ms / factor)


@given(latencies_ms, error_ratios)
def test_the_upper_bound_is_that_of_95_percent(
    measured_ms: float, error_ratio: float
) -> None:
    measurement = fresh(measured_ms, error_ratio=error_ratio)
    verdict = judge_latency(measurement, budget_ms=1.0)
    assert verdict.bound == pytest.approx(upper_ms(measured_ms, error_ratio), rel=1e-4)


@given(latencies_ms, st.floats(1e-6, 0.5))
def test_an_uncertain_measurement_equal_to_the_budget_does_not_meet_it(
    measured_ms: float, error_ratio: float
) -> None:
    assert not meets(measured_ms, error_ratio, budget_ms=measured_ms)


@given(latencies_ms)
def test_a_certain_measurement_equal_to_the_budget_meets_it(measured_ms: float) -> None:
    assert meets(measured_ms, 0.0, budget_ms=measured_ms)


@given(latencies_ms, error_ratios, latencies_ms, slightly)
def test_a_budget_that_is_met_is_met_when_raised(
    measured_ms: float, error_ratio: float, budget_ms: float, factor: float
) -> None:
    if meets(measured_ms, error_ratio, budget_ms=budget_ms):
        assert meets(measured_ms, error_ratio, budget_ms=budget_ms * factor)


@given(latencies_ms, error_ratios, latencies_ms, slightly)
def test_a_slower_or_less_certain_measurement_does_not_meet_what_a_better_one_misses(
    measured_ms: float, error_ratio: float, budget_ms: float, factor: float
) -> None:
    if not meets(measured_ms, error_ratio, budget_ms=budget_ms):
        assert not meets(measured_ms * factor, error_ratio, budget_ms=budget_ms)
        assert not meets(measured_ms, error_ratio * factor, budget_ms=budget_ms)


@given(latencies_ms, latencies_ms)
@pytest.mark.parametrize("error_ratio", [math.nan, math.inf])
def test_an_error_that_nobody_knows_meets_no_budget(
    error_ratio: float, measured_ms: float, budget_ms: float
) -> None:
    assert not meets(measured_ms, error_ratio, budget_ms=budget_ms)


@given(latencies_ms, error_ratios, latencies_ms)
def test_the_verdict_tells_the_measurement_and_the_budget(
    measured_ms: float, error_ratio: float, budget_ms: float
) -> None:
    measurement = fresh(measured_ms, error_ratio=error_ratio)
    verdict = judge_latency(measurement, budget_ms=budget_ms)
    assert (verdict.found, verdict.limit) == (measured_ms, budget_ms)
    assert verdict.found <= verdict.bound
