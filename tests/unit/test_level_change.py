"""A machine that is slower than when it was measured last is told of."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from ofa_deploy.cli.tables import show_level
from ofa_deploy.profiling import LevelChange, level_change
from profilers import LatencyTable
from tests.support import tiny

NETWORKS = [tiny.SPACE.smallest(), tiny.SPACE.middle(), tiny.SPACE.largest()]


def table(*, networks: int = 3, slowdown: float = 1.0) -> LatencyTable:
    return tiny.latency_table(
        tiny.SPACE,
        networks=NETWORKS[:networks],
        network_ms=lambda config: slowdown * sum(map(len, config.stages)),
        anchor_reference_ns=250_000.0 * slowdown,
    )


def told(change: LevelChange | None) -> str:
    console = Console(file=StringIO(), width=500)
    show_level(console, change)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_anchor_and_networks_are_compared() -> None:
    earlier = replace(table(networks=2), created_at="2026-01-01T00:00:00+00:00")
    change = level_change(table(slowdown=1.2), earlier)
    assert change.since == earlier.created_at
    assert change.anchor_ratio == pytest.approx(1.2)
    assert change.network_ratio == pytest.approx(1.2)


def test_tables_without_a_network_in_common_compare_by_the_anchor() -> None:
    change = level_change(table(slowdown=0.9), table(networks=0))
    assert change.network_ratio is None
    assert "the anchor -10.0%. The machine" in told(change)


@pytest.mark.parametrize(
    ("slowdown", "silent"), [(1.0, True), (1.02, True), (1.2, False)]
)
def test_only_a_change_worth_telling_is_told(slowdown: float, silent: bool) -> None:
    words = told(level_change(table(slowdown=slowdown), table()))
    assert (words == "") == silent
    if not silent:
        assert "the anchor +20.0%, networks +20.0%. The machine" in words


def test_what_the_host_does_is_not_told_of_a_device_that_times_itself() -> None:
    def on_device(found: LatencyTable) -> LatencyTable:
        networks = {
            name: replace(
                entry,
                visits=tuple(replace(v, device_timed=True) for v in entry.visits),
            )
            for name, entry in found.networks.items()
        }
        return replace(found, networks=networks)

    slow_host = replace(on_device(table()), anchor_reference_ns=500_000.0)
    change = level_change(slow_host, on_device(table()))
    assert change.anchor_ratio is None
    assert told(change) == ""
    slow_device = level_change(on_device(table(slowdown=1.2)), on_device(table()))
    assert "00: networks +20.0%. The machine" in told(slow_device)
    nothing = level_change(slow_host, on_device(table(networks=0)))
    assert told(nothing) == ""


def test_without_an_earlier_table_nothing_is_told() -> None:
    assert told(None) == ""
