"""What certifying a network does once it is known that a limit is missed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ofa_deploy.constraints import Constraints
from ofa_deploy.device_bench import CERTIFY_SETTINGS, FAR_OFF, DeviceBench
from profilers.stats import percentile_floor
from profilers.timing import CERTIFY_PROCESSES
from tests.support.tiny_session import fresh


def gives_up(quiet_ms: float, **limits: Any) -> bool:
    bench = SimpleNamespace(constraints=Constraints(**limits))
    return DeviceBench._is_far_off(cast(DeviceBench, bench), fresh(quiet_ms))


def test_no_process_is_spent_on_a_network_far_above_its_budget() -> None:
    assert gives_up(FAR_OFF + 0.01, latency_ms=1.0)
    assert not gives_up(FAR_OFF - 0.01, latency_ms=1.0)
    assert not gives_up(0.5, latency_ms=1.0)


@pytest.mark.parametrize(
    "limits",
    [
        {"latency_ms": 1.0, "percentile": 90},
        {"rate_hz": 1000.0},
        {"latency_ms": 1.0, "sustained_s": 1.0},
        {"size_bytes": 10**6},
    ],
)
def test_of_single_runs_and_of_other_limits_a_quiet_latency_says_nothing(
    limits: dict[str, Any],
) -> None:
    assert not gives_up(100.0, **limits)


def test_what_certifies_makes_as_many_runs_as_a_99th_percentile_needs() -> None:
    runs = CERTIFY_SETTINGS.visits * CERTIFY_SETTINGS.runs_per_visit
    assert runs * CERTIFY_PROCESSES >= percentile_floor(99)
