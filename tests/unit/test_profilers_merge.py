"""Tables of one device put together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from profilers import LatencyTable, MeasureSettings, Visit, merge_tables
from profilers.errors import IncompatibleTables
from profilers.summary import fit_visits, summarize
from tests.unit.test_profilers_table import TABLE

SETTINGS = MeasureSettings.screen()
BETA = 0.7
QUIET_NS = {"small": 100_000, "large": 900_000}
ANCHOR_NS = 250_000


def visits(name: str, *, slowdowns: list[float]) -> tuple[Visit, ...]:
    """Visits of a model while the machine is slower by these factors."""
    return tuple(
        Visit(
            time_ns=number,
            anchor_before_ns=round(ANCHOR_NS * slowdown),
            anchor_after_ns=round(ANCHOR_NS * slowdown),
            inner_loops=1,
            samples_ns=(round(QUIET_NS[name] * slowdown**BETA),),
        )
        for number, slowdown in enumerate(slowdowns)
    )


def table(*names: str, slowdowns: list[float]) -> LatencyTable:
    found = [visits(name, slowdowns=slowdowns) for name in names]
    measured = summarize(list(names), found, fit_visits(found), SETTINGS)
    networks = {measurement.name: measurement for measurement in measured}
    return replace(
        TABLE, settings=SETTINGS, blocks=networks, networks=networks, failures={}
    )


CALM = table("small", "large", slowdowns=list(np.linspace(1.0, 1.1, 18)))
BUSY = table("small", "large", slowdowns=list(np.linspace(1.4, 1.8, 18)))


def test_one_table_merged_is_itself() -> None:
    merged = merge_tables([CALM])
    assert merged.networks == CALM.networks
    assert merged.anchor_reference_ns == pytest.approx(
        math.exp(
            fit_visits([m.visits for m in CALM.networks.values()]).reference_log_anchor
        )
    )


def test_merged_latencies_speak_of_one_level_whatever_the_machine_was_like() -> None:
    merged = merge_tables([CALM, BUSY])
    assert merged.beta == pytest.approx(BETA, rel=1e-3)
    slowdown = merged.anchor_reference_ns / ANCHOR_NS
    for kind in (merged.blocks, merged.networks):
        for name, entry in kind.items():
            expected_ms = QUIET_NS[name] * slowdown**BETA / 1e6
            assert entry.quiet_ms == pytest.approx(expected_ms, rel=1e-3)
            assert len(entry.visits) == 36


def test_a_merged_table_is_as_old_as_its_oldest_visits() -> None:
    # An hour apart; as texts they are in the other order.
    early = replace(BUSY, created_at="2026-01-31T13:00:00+02:00")
    late = replace(CALM, created_at="2026-01-31T12:00:00Z")
    for tables in ([early, late], [late, early]):
        assert merge_tables(tables).created_at == early.created_at


def test_networks_stay_random_in_a_merged_table() -> None:
    drawn = replace(BUSY, random_networks=("large",))
    assert merge_tables([CALM, drawn]).random_networks == ("large",)


def test_what_only_one_table_has_is_in_the_merged_one() -> None:
    other = table("small", slowdowns=[1.2] * 18)
    merged = merge_tables([CALM, other])
    assert set(merged.networks) == {"small", "large"}
    assert len(merged.networks["large"].visits) == 18


def test_a_model_that_failed_in_one_table_and_not_in_another_has_not_failed() -> None:
    failed = replace(CALM, failures={"small": "crashed", "gone": "crashed"})
    assert merge_tables([failed, BUSY]).failures == {"gone": "crashed"}


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("device", "cpu_model", "another processor"),
        ("device", "core_count", 128),
        ("runtime", "threads", 3),
        ("runtime", "precision", "i8"),
        ("runtime", "version", "0.0.1"),
        ("runtime", "backend", "another"),
    ],
)
def test_tables_of_other_conditions_are_refused(
    part: str, field: str, value: object
) -> None:
    changed: dict[str, Any] = {part: replace(getattr(BUSY, part), **{field: value})}
    words = f"{part} {field} is .*{value!r} in another"
    with pytest.raises(IncompatibleTables, match=words):
        merge_tables([CALM, replace(BUSY, **changed)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("space_sha256", "1" * 64),
        ("origin", "measured"),
        ("settings", MeasureSettings.confirm()),
    ],
)
def test_tables_of_other_things_or_ways_are_refused(field: str, value: object) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(IncompatibleTables, match=f"the tables differ in {field}: "):
        merge_tables([CALM, replace(BUSY, **changed)])


def test_a_table_given_twice_is_refused() -> None:
    with pytest.raises(IncompatibleTables, match=r"is given twice; .* each table once"):
        merge_tables([CALM, BUSY, CALM])


def test_no_tables_make_no_table() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        merge_tables([])
