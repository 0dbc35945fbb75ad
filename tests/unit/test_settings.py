"""Settings of trainings and searches: what makes no sense is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.errors import DeployError, SpaceError
from ofa_deploy.ranges import COUNT, DECAY, POSITIVE, Range, require_in_range

pytest.importorskip("torch", reason="settings of trainings come with torch")

from ofa_deploy.shrink.legr import LegrSettings
from ofa_deploy.shrink.pas import PasSettings
from ofa_deploy.shrink.recipe import default_shrink_recipe
from ofa_deploy.shrink.sparse import SparsitySettings
from ofa_deploy.shrink.tas import TasSettings
from ofa_deploy.train.recipe import default_recipe

SETTINGS: list[Any] = [
    LegrSettings(),
    PasSettings(target_share=0.5),
    SparsitySettings(),
    TasSettings(),
    default_shrink_recipe(),
    default_recipe(),
    default_recipe().phases[0],
]
NO_NUMBERS = (float("nan"), float("inf"), -1, -0.5)


def numbers_of(settings: Any) -> Iterator[str]:
    """Names of its fields that hold a number, or may."""
    for field in fields(settings):
        if any(kind in str(field.type) for kind in ("int", "float")):
            yield field.name


CASES = [(one, name) for one in SETTINGS for name in numbers_of(one)]


@pytest.mark.parametrize("bad", NO_NUMBERS)
@pytest.mark.parametrize(
    ("settings", "name"),
    CASES,
    ids=[f"{type(one).__name__}.{name}" for one, name in CASES],
)
def test_every_number_is_looked_at(settings: Any, name: str, bad: float) -> None:
    value = (bad, bad) if name == "betas" else bad
    with pytest.raises(DeployError, match=name):
        replace(settings, **{name: value})


@pytest.mark.parametrize("betas", [(), (0.5,), (0.5, 0.9, 0.99)])
def test_two_betas_are_asked_for(betas: Any) -> None:
    with pytest.raises(SpaceError, match=r"betas=.*; give two"):
        TasSettings(betas=betas)
    as_list: Any = [0.5, 0.9]
    assert TasSettings(betas=as_list).betas == (0.5, 0.9)


def test_there_are_numbers_to_look_at() -> None:
    assert len(CASES) > 50


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_range_holds_what_lies_between_its_bounds(value: float) -> None:
    between = Range(least=0, below=1)
    assert (value in between) == (0 <= value < 1)


@pytest.mark.parametrize("value", [1.5, True, "1", None, float("nan"), 0, -3])
def test_what_is_no_count_is_none(value: object) -> None:
    assert value not in COUNT


def test_what_is_refused_is_told_with_what_is_allowed() -> None:
    with pytest.raises(SpaceError) as caught:
        require_in_range(SparsitySettings(), Range(least=2, whole=True), "momentum")
    assert str(caught.value) == ("momentum=0.9; give a whole number that is at least 2")
    assert str(DECAY) == "a number that is at least 0 and below 1"
    assert str(POSITIVE) == "a number that is above 0"
