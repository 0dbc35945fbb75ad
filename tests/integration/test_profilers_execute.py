"""Work orders carried out by real processes that crash, hang, and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from profilers import measurement
from profilers.errors import DeviceUnfit, RunFailed, UnstableMeasurement
from profilers.execute import OrderResult, collect, execute
from profilers.journal import Journal, Retry
from profilers.json_reader import Json
from profilers.measurement import MeasureSettings
from profilers.order import WorkOrder
from profilers.process import package_environment
from profilers.worker import Assignment, Began, Visited, decode_report
from tests.support.faulty_worker import COMMAND, NAME, write_model
from tests.support.processes import is_running, waited_for

pytestmark = pytest.mark.quiet

SUBJECT: dict[str, Json] = {"order": "test"}
SETTINGS = MeasureSettings(
    visits=4,
    runs_per_visit=2,
    warmup_runs=1,
    warmup_windows=1,
    anchor_repeats=1,
    seed=0,
    target_relative_error=10.0,  # no extra visits
    max_seconds=60.0,
)
WARM_UP_RUNS = 1
RUNS_PER_VISIT = 3  # one of them not kept


@pytest.fixture(autouse=True)
def restless_machines_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """No visit counts as disturbed: how many there are must not depend on luck."""
    monkeypatch.setattr(measurement, "DISTURBED_ANCHOR_RATIO", 1e9)


def run(
    folder: Path,
    models: dict[str, Path],
    *,
    settings: MeasureSettings = SETTINGS,
    threads: int = 1,
    limit_s: float = 60.0,
    group_size: int = 64,
    backend: str = NAME,
    anchor_name: str | None = None,
) -> OrderResult:
    with Journal(folder / "journal", subject=SUBJECT) as journal:
        order = WorkOrder(
            names=tuple(models),
            backend=backend,
            threads=threads,
            settings=settings,
            limit_s=limit_s,
            group_size=group_size,
            anchor_name=anchor_name,
        )
        return execute(
            order, lambda name, folder: models[name], journal=journal, command=COMMAND
        )


def assert_visited(
    result: OrderResult, names: set[str], *, count: int = SETTINGS.visits
) -> None:
    """Each model got its planned visits."""
    assert {name: len(m.visits) for name, m in result.measurements.items()} == (
        dict.fromkeys(names, count)
    )


def good(folder: Path, count: int) -> dict[str, Path]:
    return {
        f"good{index}": write_model(folder / f"good{index}", us=100 + 50 * index)
        for index in range(count)
    }


def test_every_model_gets_its_visits_and_more_work_takes_longer(
    tmp_path: Path,
) -> None:
    models = {
        "short": write_model(tmp_path / "short", us=200),
        "long": write_model(tmp_path / "long", us=5_000),
    }
    result = run(tmp_path, models)
    assert_visited(result, {"short", "long"})
    assert result.failures == {}
    # It sleeps, so the quiet state, which makes up for slow phases, may be below.
    assert result.measurements["long"].median_ms > 5.0
    assert (
        result.measurements["long"].median_ms > result.measurements["short"].median_ms
    )


@pytest.mark.parametrize(
    ("fault", "after", "words"),
    [
        pytest.param("reject", 0, "bad is rejected", id="rejected"),
        pytest.param("crash loading", 0, "SIGSEGV", id="crashes while loaded"),
        pytest.param("crash", 0, "SIGSEGV", id="crashes in the first run"),
        pytest.param(
            "crash",
            WARM_UP_RUNS + 2 * RUNS_PER_VISIT,
            "about to crash",
            id="crashes in the third visit",
        ),
        pytest.param("raise", 5, "the model failed on purpose", id="raises"),
        pytest.param("exit", 4, "ended with exit code 0", id="ends the process"),
    ],
)
def test_a_model_that_fails_costs_only_itself(
    tmp_path: Path, fault: str, after: int, words: str
) -> None:
    models = good(tmp_path, 3)
    models["bad"] = write_model(tmp_path / "bad", fault=fault, after=after)
    result = run(tmp_path, models)
    assert set(result.failures) == {"bad"}
    assert words in result.failures["bad"]
    assert_visited(result, {"good0", "good1", "good2"})


def test_a_model_that_hangs_is_stopped_and_costs_only_itself(tmp_path: Path) -> None:
    models = good(tmp_path, 2)
    models["bad"] = write_model(tmp_path / "bad", fault="hang", after=4)
    result = run(tmp_path, models, limit_s=10.0)
    assert "gave no sign of life for 10 s" in result.failures["bad"]
    assert set(result.measurements) == {"good0", "good1"}


@pytest.mark.skipif(os.name != "posix", reason="kills a process as Linux does")
def test_too_many_models_for_the_memory_are_measured_a_few_at_a_time(
    tmp_path: Path,
) -> None:
    models = {
        f"large{index}": write_model(
            tmp_path / f"large{index}", fault="memory", after=3
        )
        for index in range(7)
    }
    models["huge"] = write_model(tmp_path / "huge", fault="memory", after=-1)
    # It fits, and leaves no room for the anchor model, which is not to blame.
    models["filling"] = write_model(tmp_path / "filling", fault="fill")
    models["anchor"] = write_model(tmp_path / "anchor")
    result = run(tmp_path, models, anchor_name="anchor")
    assert set(result.failures) == {"huge", "filling"}
    for reason in result.failures.values():
        assert "SIGKILL (as systems do that have no memory left)" in reason
    assert set(result.measurements) == {*models} - {"huge", "filling"}
    for name in result.measurements.keys() - {"anchor"}:
        assert len(result.measurements[name].visits) == SETTINGS.visits


def test_a_failed_model_is_not_tried_again(tmp_path: Path) -> None:
    models = good(tmp_path, 1)
    models["bad"] = write_model(tmp_path / "bad", fault="crash")
    run(tmp_path, models)
    write_model(models["bad"])  # it would work now
    result = run(tmp_path, models)
    assert set(result.failures) == {"bad"}
    assert set(result.measurements) == {"good0"}


def test_a_failed_model_is_tried_again_where_the_journal_says_so(
    tmp_path: Path,
) -> None:
    models = good(tmp_path, 1)
    models["bad"] = write_model(tmp_path / "bad", fault="crash")
    run(tmp_path, models)
    write_model(models["bad"])  # it would work now
    with Journal(tmp_path / "journal", subject=SUBJECT) as journal:
        journal.add(Retry(name="bad"))
        assert journal.failures == {}
    result = run(tmp_path, models)
    assert result.failures == {}
    assert_visited(result, {"good0", "bad"})


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    models = good(tmp_path, 3)
    first = run(tmp_path, models)
    content = (tmp_path / "journal").read_bytes()
    assert run(tmp_path, models).measurements == first.measurements
    assert (tmp_path / "journal").read_bytes() == content


def test_extra_visits_that_did_not_help_are_not_made_again(tmp_path: Path) -> None:
    settings = replace(SETTINGS, target_relative_error=1e-9, max_seconds=0.5)
    models = good(tmp_path, 2)
    first = run(tmp_path, models, settings=settings)
    content = (tmp_path / "journal").read_bytes()
    assert run(tmp_path, models, settings=settings).measurements == first.measurements
    assert (tmp_path / "journal").read_bytes() == content


def test_groups_cover_all_models_in_two_rounds(tmp_path: Path) -> None:
    models = good(tmp_path, 5)
    result = run(tmp_path, models, group_size=2)
    assert_visited(result, set(models))


@contextmanager
def at_work(
    models: dict[str, Path], told: type[Began | Visited]
) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """A worker once it has told something, and the two ends that it is spoken to by."""
    assignment = Assignment(
        backend=NAME, threads=1, settings=SETTINGS, passes=1, seed=0, models=models
    )
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        orders, reports = worker.stdin, worker.stdout
        assert orders is not None
        assert reports is not None
        orders.write(f"{assignment.to_json()}\n")
        orders.flush()
        while not isinstance(decode_report(reports.readline()), told):
            pass
        yield worker, orders, reports


def test_no_visit_begins_before_the_last_one_is_kept(tmp_path: Path) -> None:
    models = good(tmp_path, 2)
    with at_work(models, Visited) as (worker, orders, reports):
        lines: list[str] = []
        reading = threading.Thread(target=lambda: lines.append(reports.readline()))
        reading.start()
        reading.join(0.5)
        assert lines == []
        orders.write("\n")
        orders.flush()
        reading.join()
        assert isinstance(decode_report(lines[0]), Began)
        orders.close()  # its parent is gone
        assert worker.wait(60) == 1


def test_a_worker_that_hangs_ends_with_its_parent(tmp_path: Path) -> None:
    """People end a call because its runtime hangs, and that is not to go on."""
    models = {"hangs": write_model(tmp_path / "hangs", fault="hang")}
    with at_work(models, Began) as (worker, orders, _):
        orders.close()
        assert worker.wait(60) == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows tells of no parent's end")
def test_a_process_ends_with_the_one_that_began_it() -> None:
    child = (
        "import os, sys, time\n"
        "from profilers.process import end_with\n"
        "end_with(int(sys.argv[1]))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"words = [sys.executable, '-c', {child!r}, str(os.getpid())]\n"
        "begun = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)\n"
        "print(begun.stdout.readline(), end='', flush=True)\n"
        "os._exit(9)\n"  # as a kill does, without a word to anybody
    )
    done = subprocess.run(
        [sys.executable, "-c", parent],
        env=package_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    orphan = int(done.stdout)
    assert waited_for(lambda: not is_running(orphan), limit_s=60)


def test_a_pass_takes_the_time_that_is_set(tmp_path: Path) -> None:
    settings = replace(SETTINGS, pass_seconds=0.05)
    result = run(tmp_path, good(tmp_path, 1), settings=settings)
    (measured,) = result.measurements.values()
    for number, visit in enumerate(measured.visits):
        assert visit.time_ns >= number * 0.05e9


def test_a_reference_level_moves_all_latencies_alike(tmp_path: Path) -> None:
    models = good(tmp_path, 3)
    own = run(tmp_path, models)
    order = WorkOrder(names=tuple(models), backend=NAME, threads=1, settings=SETTINGS)
    with Journal(tmp_path / "journal", subject=SUBJECT) as journal:
        given = collect(
            order, journal=journal, anchor_reference_ns=2 * own.anchor_reference_ns
        )
    assert given.anchor_reference_ns == pytest.approx(2 * own.anchor_reference_ns)
    for name, entry in given.measurements.items():
        ratio = entry.quiet_ms / own.measurements[name].quiet_ms
        assert ratio == pytest.approx(2**own.beta)


def test_the_anchor_model_is_with_every_group_and_tells_it_by_its_session(
    tmp_path: Path,
) -> None:
    models = good(tmp_path, 5)
    result = run(tmp_path, models, group_size=2, anchor_name="good0")
    sessions = {
        name: {visit.session for visit in entry.visits}
        for name, entry in result.measurements.items()
    }
    # Two groups of the four others, in two rounds.
    assert sessions["good0"] == {0, 1, 2, 3}
    assert len(result.measurements["good0"].visits) == 2 * SETTINGS.visits
    for name in models.keys() - {"good0"}:
        assert len(sessions[name]) == 2
        assert len(result.measurements[name].visits) == SETTINGS.visits


def test_an_anchor_model_by_itself_is_a_model_like_others(tmp_path: Path) -> None:
    result = run(tmp_path, good(tmp_path, 1), anchor_name="good0")
    assert_visited(result, {"good0"})


def test_an_anchor_model_that_fails_costs_only_itself(tmp_path: Path) -> None:
    models = good(tmp_path, 3)
    models["bad"] = write_model(tmp_path / "bad", fault="crash")
    result = run(tmp_path, models, group_size=2, anchor_name="bad")
    assert set(result.failures) == {"bad"}
    assert_visited(result, {"good0", "good1", "good2"})


def test_all_latencies_are_brought_to_the_level_of_the_anchor_model(
    tmp_path: Path,
) -> None:
    models = good(tmp_path, 3)
    own = run(tmp_path, models, anchor_name="good1")
    order = WorkOrder(
        names=tuple(models),
        backend=NAME,
        threads=1,
        settings=SETTINGS,
        anchor_name="good1",
    )
    level_ms = 2 * own.measurements["good1"].quiet_ms
    with Journal(tmp_path / "journal", subject=SUBJECT) as journal:
        given = collect(order, journal=journal, anchor_model_ms=level_ms)
    for name, entry in given.measurements.items():
        assert entry.quiet_ms == pytest.approx(2 * own.measurements[name].quiet_ms)


def test_an_anchor_model_must_be_one_of_the_models() -> None:
    with pytest.raises(ValueError, match="anchor_name='other' is none of the models"):
        WorkOrder(
            names=("one",),
            backend=NAME,
            threads=1,
            settings=SETTINGS,
            anchor_name="other",
        )


def test_models_that_are_too_imprecise_get_more_visits(tmp_path: Path) -> None:
    settings = replace(SETTINGS, target_relative_error=1e-9, max_seconds=20.0)
    result = run(tmp_path, good(tmp_path, 2), settings=settings)
    visits = [len(m.visits) for m in result.measurements.values()]
    assert SETTINGS.visits < max(visits) <= 4 * SETTINGS.visits


def test_an_order_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = replace(SETTINGS, visits=30)
    models = good(tmp_path, 4)
    journal = tmp_path / "journal"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.test_profilers_execute", tmp_path]
    )
    deadline_s = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < deadline_s, "the order did not get going"
        assert process.poll() is None, "the order ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    result = run(tmp_path, models, settings=settings)
    assert journal.read_bytes().startswith(whole)
    assert_visited(result, set(models), count=settings.visits)


def test_what_concerns_all_models_ends_the_order(tmp_path: Path) -> None:
    models = good(tmp_path, 2)
    with pytest.raises(DeviceUnfit, match="threads=1000"):
        run(tmp_path, models, threads=1000)
    with pytest.raises(RunFailed, match="no backend 'absent'"):
        run(tmp_path, models, backend="absent")
    bad = {"bad": write_model(tmp_path / "bad", fault="reject")}
    with pytest.raises(UnstableMeasurement, match="none of 1 models could be measured"):
        run(tmp_path, bad)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    run(here, good(here, 4), settings=replace(SETTINGS, visits=30))
