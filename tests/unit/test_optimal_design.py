from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.predict.optimal_design import choose_informative


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_chosen_rows_are_different_and_not_taken(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((40, 5))
    taken = rng.permutation(40)[:10]
    chosen = choose_informative(matrix, count=count, taken=taken)
    assert len(set(chosen)) == count
    assert not set(chosen) & set(taken)


def test_choices_determine_a_fit_better_than_chance() -> None:
    def spread(rows: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
        return float(np.linalg.slogdet(rows.T @ rows)[1])

    better = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        matrix = np.abs(rng.standard_normal((500, 6)))
        chosen = choose_informative(matrix, count=15)
        drawn = rng.permutation(500)[:15]
        better += spread(matrix[chosen]) > spread(matrix[drawn])
    assert better == 20


def test_a_direction_that_nothing_has_shown_comes_first() -> None:
    matrix = np.array([[1.0, 0.0], [1.1, 0.0], [0.9, 0.0], [0.0, 1.0]])
    assert choose_informative(matrix, count=1, taken=np.array([0]))[0] == 3


def test_more_than_there_is_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="give at most 1"):
        choose_informative(np.eye(3), count=2, taken=np.array([0, 1]))
