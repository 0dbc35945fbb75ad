from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.known_ratio import FRESH_S, LEAST_KNOWN, REMEMBERED, KnownRatio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "of" / "known.json"


def noted(path: Path, ratios: list[float], *, at_s: float = 1e9) -> KnownRatio:
    known = KnownRatio(path=path, now_s=lambda: at_s)
    for ratio in ratios:
        known.note(ratio)
    return known


def test_a_few_say_too_little(path: Path) -> None:
    assert noted(path, []).expected is None
    assert noted(path, [0.9] * (LEAST_KNOWN - 1)).expected is None
    assert noted(path, [0.9]).expected == pytest.approx(0.9)


@given(st.lists(st.floats(0.5, 2.0), min_size=LEAST_KNOWN, max_size=3 * REMEMBERED))
def test_what_is_expected_is_among_the_last_and_above_their_middle(
    tmp_path_factory: pytest.TempPathFactory, ratios: list[float]
) -> None:
    path = tmp_path_factory.mktemp("known") / "known.json"
    expected = noted(path, ratios).expected
    last = sorted(ratios[-REMEMBERED:])
    assert expected is not None
    assert last[len(last) // 2 - (len(last) % 2 == 0)] <= expected <= last[-1]


def test_what_is_a_day_old_says_nothing(path: Path) -> None:
    noted(path, [0.9] * LEAST_KNOWN)
    for at_s in (1e9 + FRESH_S + 1, 1e9 - FRESH_S - 1):
        assert noted(path, [], at_s=at_s).expected is None


@pytest.mark.parametrize(
    "content", ["", "[[1, 2", "{}", "[[1]]", '[["a", "b"]]', "[[1e9, NaN]]", "\xff"]
)
def test_a_damaged_file_says_nothing_and_is_replaced(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content, encoding="latin-1")
    assert KnownRatio(path=path, now_s=lambda: 1e9).expected is None
    assert noted(path, [1.1] * LEAST_KNOWN).expected == pytest.approx(1.1)
