"""What a session keeps from call to call, and what it forgets."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ofa_deploy import pipeline
from ofa_deploy.constraints import Constraints
from ofa_deploy.drift import MAX_DRIFT_RATIO
from ofa_deploy.errors import InfeasibleBudget, RunFailed
from ofa_deploy.pipeline import FRESH_S, Specializer
from ofa_deploy.table_files import find_table, table_name
from profilers import LatencyTable
from profilers.table import LatencyTable as Table
from tests.support import tiny
from tests.support.tiny_session import table_here, write_inputs

BACKEND = "onnxruntime-cpu"


@pytest.fixture
def session(tmp_path: Path) -> Specializer:
    supernet, table = write_inputs(tmp_path, backend=BACKEND)
    return Specializer(
        BACKEND, supernet=supernet, table=table, cache=tmp_path / "cache"
    )


def slower(table: LatencyTable, factor: float) -> LatencyTable:
    """The same machine, as if it took longer for everything."""

    def scaled(entries: dict[str, Any]) -> dict[str, Any]:
        return {
            name: replace(entry, quiet_ms=factor * entry.quiet_ms)
            for name, entry in entries.items()
        }

    return replace(
        table, blocks=scaled(dict(table.blocks)), networks=scaled(dict(table.networks))
    )


def test_what_followed_from_a_table_goes_with_it(
    session: Specializer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = session.front.costs.copy(), session.predictors, session.predictor
    tenfold = slower(session.table, 10.0)
    monkeypatch.setattr(pipeline, "measure_table", lambda *_, **__: tenfold)
    session.reprofile()
    assert session.table is tenfold
    assert session.predictors.latency is session.predictor is not before[2]
    reached = session.predictor.predict_ms(session.front.genomes)
    assert reached.min() == pytest.approx(
        10 * before[2].predict_ms(session.front.genomes).min(), rel=1e-6
    )
    assert session.front.costs[:, 0].min() > 5 * before[0][:, 0].min()


@pytest.mark.parametrize(
    ("age_s", "checked"), [(FRESH_S - 1, False), (FRESH_S + 1, True)]
)
def test_a_table_of_the_last_minutes_is_held_against_nothing(
    age_s: float, checked: bool, session: Specializer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1e6)
    session._measured_s = 1e6 - age_s
    limit = session.drift_check().max_drift_ratio
    assert limit == (MAX_DRIFT_RATIO if checked else None)
    session.on_drift = "accept"
    assert session.drift_check().max_drift_ratio is None


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (None, False),
        (
            InfeasibleBudget("no", budget_ms=1.0, fastest_ms=None, nearest="n"),
            False,
        ),
        (RunFailed("it crashed"), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_what_certifying_found_is_kept_for_as_long_as_the_call_is_not_over(
    error: BaseException | None, left: bool, session: Specializer
) -> None:
    limits = Constraints(latency_ms=1.0)

    def call() -> None:
        with ExitStack() as stack:
            session._kept(limits, stack).keep("text", "found")
            if error is not None:
                raise error

    if error is None:
        call()
    else:
        with pytest.raises(type(error)):
            call()
    with ExitStack() as stack:
        again = session._kept(limits, stack)
        assert (again.read("text", fresh_s=60.0) is not None) == left
        other = session._kept(Constraints(latency_ms=2.0), stack)
        assert other.read("text", fresh_s=60.0) is None


def test_a_table_of_this_machine_comes_before_one_that_came_along(
    session: Specializer, tmp_path: Path
) -> None:
    name = table_name(tiny.SPACE, session.device, session.runtime)
    here, along = tmp_path / "here", tmp_path / "along"
    for folder, year in ((here, 2026), (along, 2025)):
        folder.mkdir()
        dated = replace(table_here(BACKEND), created_at=f"{year}-01-01T00:00:00+00:00")
        dated.save(folder / name)
    for folders, found in (((here, along), here), ((tmp_path, along), along)):
        looked = find_table(
            tiny.SPACE, session.device, session.runtime, folders=folders
        )
        assert looked == (Table.load(found / name), found / name)
