"""What is made of a probe's timings, of which nobody took any."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ofa_deploy.probe import (
    SAME_COST,
    SLOW_RATE_SHARE,
    OperatorFact,
    OperatorProbe,
    _dominating,
    _judge,
    operator_probes,
)
from profilers.execute import OrderResult
from tests.support import tiny

PROBES = {probe.name: probe for probe in operator_probes()}
DENSE = PROBES["dense 3x3"]
MACS = DENSE.block.mac_count - DENSE.without.mac_count
BASE_MS, ERROR_RATIO = 1.0, 0.01


def fact(probe: OperatorProbe, extra_ms: float) -> OperatorFact:
    """Of an operator that takes so long, on top of a block of 1 ms."""
    whole, base = (model.name for model in probe.models)
    measured = {
        name: replace(tiny.measurement(name, ms), standard_error_ratio=ERROR_RATIO)
        for name, ms in ((whole, BASE_MS + extra_ms), (base, BASE_MS))
    }
    result = OrderResult(
        measurements=measured,
        failures={},
        beta=1.0,
        anchor_reference_ns=1.0,
        conditions_before=tiny.CONDITIONS,
        conditions_after=tiny.CONDITIONS,
        drift=tiny.latency_table(
            tiny.SPACE, networks=(), network_ms=lambda _: 1.0
        ).drift,
    )
    return _judge(probe, result, fused=None)


def test_a_rate_is_of_what_the_operator_adds() -> None:
    found = fact(DENSE, MACS / 1e6)  # a million multiply-adds in each millisecond
    assert found.extra_ms == pytest.approx(MACS / 1e6)
    assert found.giga_macs_per_s == pytest.approx(1.0)
    whole_ms = BASE_MS + MACS / 1e6
    assert found.error_ms == pytest.approx(ERROR_RATIO * math.hypot(whole_ms, BASE_MS))


def test_what_is_within_its_error_has_no_rate() -> None:
    assert fact(DENSE, 0.5 * ERROR_RATIO).giga_macs_per_s is None
    assert not fact(DENSE, 0.5 * ERROR_RATIO).slow


def test_an_operator_is_slow_by_its_rate_beside_a_pointwise_convolutions() -> None:
    base_rate = DENSE.without.mac_count / BASE_MS / 1e6
    allowed_ms = MACS / 1e6 / (SLOW_RATE_SHARE * base_rate)
    assert fact(DENSE, 1.05 * allowed_ms).slow
    assert not fact(DENSE, 0.95 * allowed_ms).slow


def test_an_operator_that_multiplies_nothing_is_slow_if_it_takes_as_long_again() -> (
    None
):
    relu = PROBES["ReLU"]
    assert relu.block.mac_count == relu.without.mac_count
    assert fact(relu, 1.1 * BASE_MS).slow
    assert not fact(relu, 0.9 * BASE_MS).slow
    assert fact(relu, 1.1 * BASE_MS).giga_macs_per_s is None


def test_a_width_gives_way_to_the_widest_that_costs_no_more() -> None:
    latencies_ms = {8: 1.0, 16: SAME_COST, 24: 0.9, 32: SAME_COST + 1e-3, 40: 2.0}
    measured = {
        width: tiny.measurement(str(width), ms) for width, ms in latencies_ms.items()
    }
    found = {width: _dominating(width, measured) for width in measured}
    assert found == {8: 24, 16: 32, 24: None, 32: None, 40: None}
