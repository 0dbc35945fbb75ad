"""When a table is held to be stale, by timings that nobody took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ofa_deploy import drift
from ofa_deploy.drift import DriftCheck
from ofa_deploy.errors import RunFailed, StaleTable
from ofa_deploy.profiling import anchor_network
from ofa_deploy.reporting import Silent
from ofa_deploy.target import Target
from profilers import LatencyTable
from profilers.device import Conditions
from profilers.execute import OrderResult
from tests.support import tiny

ANCHOR_MS = 2.0
REFERENCE_NS = 250_000


def table(*, anchored: bool = True) -> LatencyTable:
    """With the anchor model, or with a network as fast that is of middling latency."""
    configs = (tiny.SPACE.smallest(), *tiny.random_configs(tiny.SPACE, 2))
    middling_ms = 5.0 if anchored else ANCHOR_MS
    latencies_ms = dict(
        zip((c.id for c in configs), (0.1, middling_ms, 9.0), strict=True)
    )
    anchor = anchor_network(tiny.SPACE)
    assert anchor not in latencies_ms
    if anchored:
        latencies_ms[anchor] = ANCHOR_MS
    networks = {name: tiny.measurement(name, ms) for name, ms in latencies_ms.items()}
    return replace(
        tiny.latency_table(tiny.SPACE, networks=(), network_ms=lambda _: 1.0),
        networks=networks,
        anchor_reference_ns=REFERENCE_NS,
    )


def checking(
    monkeypatch: pytest.MonkeyPatch,
    *,
    anchor_ms: float,
    kernel_ns: int = REFERENCE_NS,
    shared: bool = True,
    anchored: bool = True,
    max_drift_ratio: float | None = drift.MAX_DRIFT_RATIO,
) -> DriftCheck:
    """A check on a machine where the anchor model takes so long, as does the kernel."""
    conditions = replace(tiny.CONDITIONS, shared_host=shared)
    monkeypatch.setattr(drift, "read_conditions", lambda: conditions)
    monkeypatch.setattr(
        DriftCheck, "_time", lambda *_: timed(anchor_ms, kernel_ns, conditions)
    )
    return DriftCheck(
        space=tiny.SPACE,
        target=Target(backend="onnxruntime-cpu", threads=1),
        table=table(anchored=anchored),
        profile_command="ofa-deploy profile",
        reporter=Silent(),
        max_drift_ratio=max_drift_ratio,
    )


def timed(anchor_ms: float, kernel_ns: int, conditions: Conditions) -> OrderResult:
    found = tiny.measurement("the anchor model", anchor_ms)
    visit = replace(
        found.visits[0], anchor_before_ns=kernel_ns, anchor_after_ns=kernel_ns
    )
    return OrderResult(
        measurements={found.name: replace(found, visits=(visit,))},
        failures={},
        beta=1.0,
        anchor_reference_ns=kernel_ns,
        conditions_before=conditions,
        conditions_after=conditions,
        drift=table().drift,
    )


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("off", [-0.04, 0.0, 0.04])
def test_a_table_that_is_off_by_less_than_the_limit_holds(
    off: float, anchored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checking(monkeypatch, anchor_ms=ANCHOR_MS * (1 + off), anchored=anchored)
    check.check()
    assert check.anchor_ratio == pytest.approx(1 + off)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("off", [-0.06, 0.06])
def test_a_table_that_is_off_by_more_is_stale_unless_that_is_accepted(
    off: float, anchored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor_ms = ANCHOR_MS * (1 + off)
    check = checking(monkeypatch, anchor_ms=anchor_ms, anchored=anchored)
    with pytest.raises(StaleTable) as caught:
        check.check()
    assert caught.value.ratio == pytest.approx(1 + off)
    assert f"takes {off:+.1%} now (allowed ±5%)" in str(caught.value)
    accepting = checking(
        monkeypatch, anchor_ms=anchor_ms, anchored=anchored, max_drift_ratio=None
    )
    assert accepting.time_with({}) == {}
    assert accepting.anchor_ratio == pytest.approx(1 + off)


@pytest.mark.parametrize("shared", [True, False])
def test_a_slower_kernel_excuses_the_anchor_model_on_shared_hosts_alone(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checking(
        monkeypatch,
        anchor_ms=1.2 * ANCHOR_MS,
        kernel_ns=round(1.2 * REFERENCE_NS),
        shared=shared,
    )
    if shared:
        check.check()
    else:
        with pytest.raises(StaleTable, match=r"takes \+20.0% now"):
            check.check()


def test_the_anchor_model_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check = checking(monkeypatch, anchor_ms=ANCHOR_MS)
    check.time_with({})
    slower = checking(monkeypatch, anchor_ms=2 * ANCHOR_MS)
    check.check()
    check.time_with({})
    assert check.anchor_ratio == pytest.approx(1.0)
    with pytest.raises(StaleTable):
        slower.check()


def confirmed_ms(monkeypatch: pytest.MonkeyPatch, check: DriftCheck) -> float:
    """What a network is told to take that takes three times the anchor model."""
    result = check._time({})
    (anchor,) = result.measurements.values()
    net = tiny.measurement("net", 3 * anchor.quiet_ms)
    visit = replace(anchor.visits[0], samples_ns=(3 * anchor.visits[0].samples_ns[0],))
    both = {"net": replace(net, visits=(visit,)), **result.measurements}
    with monkeypatch.context() as patch:
        patch.setattr(
            DriftCheck, "_time", lambda *_: replace(result, measurements=both)
        )
        return check.time_with({"net": Path("net.onnx")})["net"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("off", [-0.04, 0.04, 0.2])
def test_others_work_is_taken_off_by_the_anchor_model_on_shared_hosts_alone(
    off: float, shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = checking(
        monkeypatch,
        anchor_ms=ANCHOR_MS * (1 + off),
        shared=shared,
        max_drift_ratio=None,
    )
    found_ms = confirmed_ms(monkeypatch, check)
    anchor_model = check.anchor_model(lambda: tmp_path)
    # A machine of one's own is slower; so is another one than the table's.
    level_ms = ANCHOR_MS * (1.0 if shared and off < 0.05 else 1 + off)
    assert found_ms == pytest.approx(3 * level_ms)
    if not shared:
        assert anchor_model is None
        return
    assert anchor_model is not None
    assert anchor_model.quiet_ms == pytest.approx(level_ms)
    assert anchor_model.path.stat().st_size > 1000
    # Once a call: what comes later is others' work.
    later = checking(monkeypatch, anchor_ms=1.3 * ANCHOR_MS)
    later.anchor_ratio = check.anchor_ratio
    assert confirmed_ms(monkeypatch, later) == pytest.approx(3 * level_ms)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("slower", [1.04, 1.2])
def test_a_machine_of_ones_own_that_has_become_slower_is_as_slow_as_it_is(
    slower: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel is, too; on a shared host both are others' work."""
    check = checking(
        monkeypatch,
        anchor_ms=slower * ANCHOR_MS,
        kernel_ns=round(slower * REFERENCE_NS),
        shared=shared,
        max_drift_ratio=None,
    )
    found_ms = confirmed_ms(monkeypatch, check)
    level = 1.0 if shared else slower
    assert check.reference_ns == (REFERENCE_NS if shared else None)
    assert found_ms == pytest.approx(3 * ANCHOR_MS * level, rel=1e-3)


def test_before_it_was_timed_the_anchor_model_says_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = checking(monkeypatch, anchor_ms=ANCHOR_MS)
    assert check.anchor_model(lambda: tmp_path) is None


def test_files_that_all_fail_are_told_of_with_the_first_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = checking(monkeypatch, anchor_ms=ANCHOR_MS)
    alone = replace(check._time({}), failures={"a": "it crashed", "b": "so did it"})
    monkeypatch.setattr(DriftCheck, "_time", lambda *_: alone)
    with pytest.raises(RunFailed) as caught:
        check.time_with({"a": Path("a.onnx"), "b": Path("b.onnx")})
    assert (
        str(caught.value) == "onnxruntime-cpu failed on all of 2 networks: it crashed"
    )
    assert check.time_with({}) == {}  # with no files there is nothing to fail


def test_a_network_in_the_anchor_models_place_is_not_timed_beside_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = checking(monkeypatch, anchor_ms=ANCHOR_MS, anchored=False)
    check.check()
    assert check.anchor_model(lambda: tmp_path) is None
