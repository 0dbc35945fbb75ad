"""Putting tables of one device together, all their visits fitted anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from profilers.errors import IncompatibleTables
from profilers.measurement import Measurement, MeasureSettings, Visit
from profilers.summary import at_level, fit_visits, summarize, summarize_drift
from profilers.table import LatencyTable, describe_differences

__all__ = ["merge_tables"]


def merge_tables(tables: Sequence[LatencyTable]) -> LatencyTable:
    """One table with the visits of several.

    Latencies of different runs speak of different levels of the anchor, so they are not
    averaged: the raw visits of all are fitted together.

    Args:
        tables: At least one; of the same space, device, runtime, settings and origin.

    Returns:
        A table with the last one's conditions, as old as the oldest of them.

    Raises:
        IncompatibleTables: They differ in something that latency depends on.
        ValueError: There are no tables.
    """
    if not tables:
        raise ValueError("no tables; give at least one")
    first, *others = tables
    for other in others:
        _require_mergeable(first, other)
    _require_different(tables)
    tables = _with_own_sessions(tables)
    settings, last = first.settings, tables[-1]
    blocks = _pooled([table.blocks for table in tables])
    networks = _pooled([table.networks for table in tables])
    fit = fit_visits(list((networks or blocks).values()))
    reference_ns = math.exp(fit.reference_log_anchor)
    measured = _measured(networks, settings, reference_ns)
    anchor = _anchor_model(blocks, networks)
    return replace(
        last,
        beta=fit.beta,
        created_at=min(tables, key=lambda table: table.created_s).created_at,
        conditions_before=tables[0].conditions_before,
        drift=summarize_drift(fit),
        anchor_reference_ns=reference_ns,
        networks=measured,
        random_networks=tuple(
            sorted({name for table in tables for name in table.random_networks})
        ),
        blocks=_measured(
            blocks,
            settings,
            reference_ns,
            anchor_visits=networks[anchor] if anchor else (),
            anchor_ms=measured[anchor].quiet_ms if anchor else None,
        ),
        failures={
            name: reason
            for table in tables
            for name, reason in table.failures.items()
            if not any(name in t.blocks or name in t.networks for t in tables)
        },
    )


def _require_mergeable(first: LatencyTable, other: LatencyTable) -> None:
    differences = describe_differences(
        first, other.device, other.runtime, here="in another"
    )
    if differences:
        raise IncompatibleTables(
            f"the tables are not of one device and runtime: {differences}; only "
            "measurements of the same things taken in the same way can be put together"
        )
    for field in ("space_name", "space_sha256", "origin", "settings"):
        one, two = getattr(first, field), getattr(other, field)
        if one != two:
            raise IncompatibleTables(
                f"the tables differ in {field}: {one} and {two}; only measurements of "
                "the same things taken in the same way can be put together"
            )


def _require_different(tables: Sequence[LatencyTable]) -> None:
    for number, table in enumerate(tables):
        if table in tables[:number]:
            raise IncompatibleTables(
                f"the table of {table.created_at} is given twice; visits counted twice "
                "would look more certain than they are; give each table once"
            )


def _anchor_model(
    blocks: Mapping[str, Sequence[Visit]], networks: Mapping[str, Sequence[Visit]]
) -> str | None:
    """The network that was visited together with blocks; None if not just one was."""
    sessions = {visit.session for visits in blocks.values() for visit in visits}
    found = [
        name
        for name, visits in networks.items()
        if any(visit.session in sessions for visit in visits)
    ]
    return found[0] if len(found) == 1 else None


def _with_own_sessions(tables: Sequence[LatencyTable]) -> list[LatencyTable]:
    """The tables, their sessions numbered on: no two of them were one process."""
    numbered, start = [], 0
    for table in tables:
        blocks, networks = (
            {name: _numbered(entry, start) for name, entry in part.items()}
            for part in (table.blocks, table.networks)
        )
        numbered.append(replace(table, blocks=blocks, networks=networks))
        measured = [*blocks.values(), *networks.values()]
        sessions = [visit.session for entry in measured for visit in entry.visits]
        start = max(sessions, default=start - 1) + 1
    return numbered


def _numbered(measurement: Measurement, start: int) -> Measurement:
    visits = (replace(v, session=v.session + start) for v in measurement.visits)
    return replace(measurement, visits=tuple(visits))


def _pooled(
    parts: Sequence[Mapping[str, Measurement]],
) -> dict[str, tuple[Visit, ...]]:
    names = sorted({name for part in parts for name in part})
    return {
        name: tuple(
            visit for part in parts if name in part for visit in part[name].visits
        )
        for name in names
    }


def _measured(
    visits: Mapping[str, tuple[Visit, ...]],
    settings: MeasureSettings,
    reference_ns: float,
    *,
    anchor_visits: Sequence[Visit] = (),
    anchor_ms: float | None = None,
) -> dict[str, Measurement]:
    if not visits:
        return {}
    names, found = list(visits), list(visits.values())
    if anchor_ms is None:
        fit = fit_visits(found, anchor_reference_ns=reference_ns)
    else:
        # Last, so that the others keep their places.
        fit = fit_visits([*found, anchor_visits], anchor_reference_ns=reference_ns)
        fit = at_level(fit, model=len(found), latency_ms=anchor_ms)
    measured = summarize(names, found, fit, settings)
    return {measurement.name: measurement for measurement in measured}
