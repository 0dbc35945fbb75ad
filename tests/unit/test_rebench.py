"""What a bundle is held to when it is timed again."""

from __future__ import annotations

import pytest

from ofa_deploy import rebench
from ofa_deploy.constraints import Constraints
from ofa_deploy.errors import SpaceError


def test_what_is_not_asked_for_is_the_manifests() -> None:
    certified = Constraints(latency_ms=4.0, percentile=95, rate_hz=30.0)
    assert rebench._asked(certified, None, None) == certified
    assert rebench._asked(certified, 3.0, None) == Constraints(
        latency_ms=3.0, percentile=95, rate_hz=30.0
    )


def test_a_percentile_is_of_the_period_where_only_a_rate_was_asked_for() -> None:
    asked = rebench._asked(Constraints(rate_hz=100.0), None, 99)
    assert (asked.budget_ms, asked.percentile) == (10.0, 99)


def test_a_percentile_without_any_budget_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"^percentile=99 of an unlimited latency"):
        rebench._asked(Constraints(size_bytes=10**6), None, 99)
