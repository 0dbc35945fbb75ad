from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.predict.evaluation import judge, kendall_tau

latencies = st.lists(
    st.integers(1, 10_000).map(lambda hundredths: hundredths / 100),
    min_size=2,
    max_size=20,
    unique=True,
)


@given(latencies)
def test_a_perfect_prediction_is_perfect(values: list[float]) -> None:
    measured = np.array(values)
    quality = judge(measured, measured)
    assert (quality.rmspe, quality.within_5, quality.within_10) == (0.0, 1.0, 1.0)
    assert quality.kendall_tau == pytest.approx(1.0)
    assert quality.count == len(values)


@given(latencies, st.floats(0.01, 0.5))
def test_a_common_factor_is_the_error_and_keeps_the_ranks(
    values: list[float], error: float
) -> None:
    measured = np.array(values)
    quality = judge(measured * (1 + error), measured)
    assert quality.rmspe == pytest.approx(error)
    assert quality.kendall_tau == pytest.approx(1.0)


def test_shares_are_counted_at_five_and_ten_percent() -> None:
    measured = np.array([10.0, 11.0, 12.0, 13.0])
    quality = judge(measured * np.array([1.04, 0.96, 1.09, 1.2]), measured)
    assert (quality.within_5, quality.within_10) == (0.5, 0.75)


@given(st.floats(0.001, 0.05), st.sampled_from([-1, 1]), st.integers(0, 2**32 - 1))
def test_a_slope_shows_at_both_ends(size: float, sign: int, seed: int) -> None:
    slope = sign * size
    measured = np.random.default_rng(seed).permutation(np.geomspace(1.0, 4.0, 50))
    # Predictions are right in the middle, at 2 ms.
    quality = judge(2 * (measured / 2) ** (1 + slope), measured)
    assert np.sign(quality.slowest_off) == -np.sign(quality.fastest_off)
    assert quality.slowest_off - quality.fastest_off == pytest.approx(
        1.6 * slope * np.log(2), rel=0.05, abs=1e-9
    )


def test_equal_noise_on_both_sides_is_no_slope() -> None:
    first, second = 1 + 0.05 * np.random.default_rng(0).standard_normal((2, 2000))
    quality = judge(first, second)
    assert abs(quality.fastest_off - quality.slowest_off) < 0.015


@given(latencies)
def test_turning_a_ranking_round_turns_its_tau_round(values: list[float]) -> None:
    one = np.array(values)
    other = np.sort(one)
    assert kendall_tau(one, -other) == pytest.approx(-kendall_tau(one, other))
    assert kendall_tau(other, other[::-1]) == pytest.approx(-1.0)


def test_tau_of_known_rankings_with_ties() -> None:
    # By hand: of 6 pairs 3 agree, 2 disagree, 1 is tied in the second.
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 3.0, 2.5])
    agree, disagree = 3, 2
    expected = (agree - disagree) / np.sqrt(6 * 5)
    assert kendall_tau(one, other) == pytest.approx(expected)
    assert kendall_tau(one, np.ones(4)) == 0.0


@pytest.mark.parametrize(
    ("predicted", "measured", "message"),
    [
        ([1.0], [1.0], "1 networks; give at least 2"),
        ([1.0, 2.0], [1.0], "give .* twice"),
        ([1.0, 2.0], [1.0, 0.0], "a latency is 0.0 ms"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    predicted: list[float], measured: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judge(np.array(predicted), np.array(measured))
