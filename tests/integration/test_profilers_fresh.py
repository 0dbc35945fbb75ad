from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import profilers.__main__ as profilers_main
import profilers.fresh as fresh_module
from profilers import (
    Conditions,
    MeasureSettings,
    measure_in_fresh_process,
)
from profilers.codec import encode_flat
from profilers.errors import FormatError, RunFailed
from profilers.fresh import (
    AnchorModel,
    FreshMeasurement,
    ProcessReport,
    pool_reports,
)
from profilers.kept import FORGOTTEN_S, KeptTexts
from profilers.measure import WARMUP_S
from profilers.measurement import (
    NO_TARGET,
    Measurement,
    MeasurementRun,
    Stability,
    Visit,
)
from profilers.pace import Pace
from profilers.process import package_environment, profilers_command
from tests.support.processes import is_running, waited_for
from tests.support.profilers_models import conv_model

REPOSITORY = Path(__file__).resolve().parents[2]
# Those that read the ONNX model of these tests.
PACKAGES = {
    "onnxruntime-cpu": "onnxruntime",
    "openvino-cpu": "openvino",
}
SETTINGS = MeasureSettings(
    visits=3,
    runs_per_visit=3,
    warmup_runs=2,
    warmup_windows=1,
    anchor_repeats=1,
    seed=0,
    target_relative_error=1.0,
    max_seconds=5.0,
)

CONDITIONS = Conditions(
    governor=None,
    frequency_mhz=None,
    temperature_c=None,
    load_average=None,
    affinity_core_count=None,
    cgroup_quota_cores=None,
    shared_host=False,
)

posix_only = pytest.mark.skipif(os.name != "posix", reason="uses a shell script")


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(conv_model())
    return path


def script(folder: Path, text: str) -> str:
    """Make an executable that stands in for the interpreter."""
    path = folder / "interpreter.sh"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def in_new_interpreter(code: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize("backend_name", PACKAGES)
def test_a_file_is_timed_by_processes_of_its_own(
    backend_name: str, model_path: Path
) -> None:
    if find_spec(PACKAGES[backend_name]) is None:
        pytest.skip(f"{PACKAGES[backend_name]} is not installed")
    fresh = measure_in_fresh_process(
        model_path,
        backend_name=backend_name,
        threads=1,
        settings=SETTINGS,
        processes=2,
    )
    assert fresh.process_count == 2
    assert len(fresh.visits) >= 2 * SETTINGS.visits
    assert len(fresh.samples_ns) == len(fresh.visits) * SETTINGS.runs_per_visit
    assert min(fresh.quiet_ms, fresh.load_ms, fresh.first_inference_ms) > 0


@pytest.mark.parametrize(("gives_up", "made"), [(True, 2), (False, 4)])
def test_processes_that_would_be_for_nothing_are_not_started(
    gives_up: bool, made: int, model_path: Path
) -> None:
    asked: list[int] = []

    def give_up(found: FreshMeasurement) -> bool:
        asked.append(found.process_count)
        return gives_up

    fresh = measure_in_fresh_process(
        model_path,
        backend_name="onnxruntime-cpu",
        threads=1,
        settings=SETTINGS,
        processes=4,
        give_up=give_up,
    )
    assert fresh.process_count == made
    assert asked == ([2] if gives_up else [2, 3])


def test_a_model_that_the_runtime_rejects_is_reported_in_its_words(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"garbage")
    with pytest.raises(RunFailed, match=r"exit code 1; .*ModelRejected: ONNX Runtime"):
        measure_in_fresh_process(
            path,
            backend_name="onnxruntime-cpu",
            threads=1,
            settings=SETTINGS,
            processes=1,
        )


@posix_only
@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "echo some last words >&2; kill -SEGV $$",
            "by signal SIGSEGV; its last words: some last words",
            id="crash",
        ),
        pytest.param("exit 7", "exit code 7; its last words: none", id="exit"),
        pytest.param("echo hello", "gave no report", id="no report"),
        pytest.param("true", "gave no report", id="silence"),
        pytest.param("exec sleep 60", "took more than 0.2 s", id="timeout"),
    ],
)
def test_a_process_that_fails_is_a_failed_run(
    text: str, message: str, model_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunFailed, match=message):
        measure_in_fresh_process(
            model_path,
            backend_name="onnxruntime-cpu",
            threads=1,
            settings=SETTINGS,
            processes=1,
            timeout_s=0.2 if "sleep" in text else None,
            interpreter=script(tmp_path, text),
        )


def test_what_lies_in_the_current_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("statistics", "argparse", "profilers"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [*profilers_command(), "--help"],
        env=package_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


@posix_only
def test_what_is_measured_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    """It would disturb whatever is begun in its place."""
    told = tmp_path / "pid"
    # What the child does first, and then nothing that reads its input.
    first = '"${2%%import runpy*}import time; time.sleep(60)"'
    child = script(tmp_path, f"echo $$ > {told}\nexec {sys.executable} -c {first}")
    code = (
        "from profilers.process import run_for_line; run_for_line(['work'], label='x', "
        f"timeout_s=60, cure='', interpreter={child!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        pid = int(waited_for(lambda: told.is_file() and told.read_text().strip()))
        os.kill(pid, 0)
    finally:
        parent.kill()
        parent.wait()
    assert waited_for(lambda: not is_running(pid))


@posix_only
def test_what_a_runtime_prints_is_not_the_report(tmp_path: Path) -> None:
    """C's own buffer is written at the end, behind what Python printed."""
    code = (
        "import ctypes, sys; from profilers.process import own_stdout; "
        "libc = ctypes.CDLL(None); tell = own_stdout(); "
        "libc.printf(b'runtime: a word'); print('and another'); tell('the report')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "the report\n"
    assert "runtime: a word" in done.stderr


def test_an_interpreter_that_is_not_there_is_a_failed_run(model_path: Path) -> None:
    with pytest.raises(RunFailed, match="could not be started"):
        measure_in_fresh_process(
            model_path,
            backend_name="onnxruntime-cpu",
            threads=1,
            settings=SETTINGS,
            processes=1,
            interpreter="/nowhere/python",
        )


def report(
    *latencies_ns: int, slowdown: float = 1.0, shared: bool = False
) -> ProcessReport:
    """A process that saw the same latency at each visit.

    Args:
        latencies_ns: Of the model, and of the anchor model if there is one.
        slowdown: Of these, and of the anchor.
        shared: Whether others' work can slow the machine down.
    """
    return ProcessReport(
        load_ms=10.0,
        first_inference_ms=2.0,
        memory_mb=None,
        run=MeasurementRun(
            measurements=tuple(
                seen(f"net {place}", latency_ns, slowdown=slowdown)
                for place, latency_ns in enumerate(latencies_ns)
            ),
            beta=0.0,
            anchor_reference_ns=250_000.0,
            conditions=replace(CONDITIONS, shared_host=shared),
            duration_s=1.0,
            indicative=shared,
        ),
    )


def seen(name: str, latency_ns: int, *, slowdown: float) -> Measurement:
    visit = Visit(
        time_ns=0,
        anchor_before_ns=round(250_000 * slowdown),
        anchor_after_ns=round(250_000 * slowdown),
        inner_loops=1,
        samples_ns=(round(latency_ns * slowdown),) * 25,
    )
    return Measurement(
        name=name,
        visits=(visit,) * 3,
        quiet_ms=latency_ns / 1e6,
        standard_error_ratio=0.0,
        median_ms=latency_ns / 1e6,
        stability=Stability(verdict="stable"),
    )


@pytest.mark.parametrize("shared", [True, False])
def test_a_lower_clock_is_taken_off_on_shared_hosts_alone(
    shared: bool, monkeypatch: pytest.MonkeyPatch, model_path: Path
) -> None:
    """Whatever level an earlier run had: a machine of one's own is as slow as it is."""
    twice = report(100_000, slowdown=2.0, shared=shared)
    monkeypatch.setattr(fresh_module, "report_of_fresh_process", lambda *_, **__: twice)
    found = measure_in_fresh_process(
        model_path,
        backend_name="onnxruntime-cpu",
        threads=1,
        settings=SETTINGS,
        processes=2,
        beta=1.0,
        anchor_reference_ns=250_000.0,
    )
    assert found.quiet_ms == pytest.approx(0.1 if shared else 0.2)
    assert found.median_ms == pytest.approx(0.2)


@pytest.mark.parametrize("latencies_ns", [(1000,), (1000, 2000)])
def test_a_report_survives_its_line(latencies_ns: tuple[int, ...]) -> None:
    text = report(*latencies_ns).to_json()
    assert "\n" not in text
    assert ProcessReport.from_json(text) == report(*latencies_ns)
    with pytest.raises(FormatError, match="'load_ms' is missing"):
        ProcessReport.from_json(text.replace("load_ms", "surprise", 1))


@pytest.mark.parametrize("count", [0, 3])
def test_a_report_of_other_models_than_one_and_its_anchor_is_refused(
    count: int,
) -> None:
    with pytest.raises(ValueError, match=f"run has {count} measurements"):
        report(*[1000] * count)


class Killed(BaseException):
    """In place of a kill."""


@dataclass
class Processes:
    """Processes that end at once; the call is killed when one of a number begins.

    Args:
        killed_at: That number; None for never.
        numbers: Those that were started, and the load that each had borne.
    """

    killed_at: int | None = None
    numbers: list[tuple[int, float]] = field(default_factory=list)

    def __call__(
        self, model_path: Path, *, number: int, pace: Pace | None, **_: object
    ) -> ProcessReport:
        if number == self.killed_at:
            raise Killed
        self.numbers.append((number, 0.0 if pace is None else pace.sustained_s))
        return report(100_000 + number)


PACE = Pace(rate_hz=100.0, sustained_s=60.0)


def kept_call(
    model_path: Path,
    patch: pytest.MonkeyPatch,
    *,
    killed_at: int | None = None,
    pace: Pace | None = PACE,
    settings: MeasureSettings = SETTINGS,
    subject: str = "a call",
    anchor_model: AnchorModel | None = None,
) -> tuple[FreshMeasurement | None, list[tuple[int, float]]]:
    """What a call found, unless it was killed, and the processes that it started."""
    processes = Processes(killed_at=killed_at)
    patch.setattr(fresh_module, "report_of_fresh_process", processes)
    kept = KeptTexts.of(model_path.parent / "kept", {"call": subject})
    found = None
    with suppress(Killed):
        found = measure_in_fresh_process(
            model_path,
            backend_name="onnxruntime-cpu",
            threads=1,
            settings=settings,
            processes=4,
            anchor_model=anchor_model,
            pace=pace,
            kept=kept,
        )
    return found, processes.numbers


@pytest.mark.parametrize("killed_at", range(4))
def test_a_call_that_was_killed_goes_on_and_starts_no_process_twice(
    killed_at: int, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = kept_call(model_path, monkeypatch, subject="another call")
    _, before = kept_call(model_path, monkeypatch, killed_at=killed_at)
    found, after = kept_call(model_path, monkeypatch)
    assert [number for number, _ in before + after] == [0, 1, 2, 3]
    # The device has cooled down: the first one that is started bears the load anew.
    assert [load_s for _, load_s in after] == [60.0] + [0.0] * (3 - killed_at)
    assert found == whole


def test_only_the_same_model_measured_in_the_same_way_is_gone_on_with(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_call(model_path, monkeypatch, killed_at=3)
    changes: list[dict[str, Any]] = [
        {"pace": None},
        {"pace": replace(PACE, rate_hz=50.0)},
        {"settings": replace(SETTINGS, visits=9)},
        {"subject": "another call"},
        {"anchor_model": AnchorModel(path=model_path, quiet_ms=1.0)},
    ]
    for change in changes:
        _, started = kept_call(model_path, monkeypatch, killed_at=1, **change)
        assert [number for number, _ in started] == [0]
    model_path.with_suffix(".bin").write_bytes(b"other weights")
    _, started = kept_call(model_path, monkeypatch)
    assert [number for number, _ in started] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("age_s", "left"), [(0, [3]), (3600, [3]), (3600 + 300, [0, 1, 2, 3])]
)
def test_what_is_old_is_measured_anew(
    age_s: float, left: list[int], model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_call(model_path, monkeypatch, killed_at=3)
    (folder,) = (model_path.parent / "kept").iterdir()
    then_s = folder.stat().st_mtime - age_s
    os.utime(folder, (then_s, then_s))
    _, started = kept_call(model_path, monkeypatch)
    assert [number for number, _ in started] == left


def test_a_model_beside_another_may_take_as_long_as_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed_s = []

    def run(words: Sequence[str], *, timeout_s: float, **_: object) -> str:
        allowed_s.append(timeout_s)
        raise RunFailed("not run")

    monkeypatch.setattr(fresh_module, "run_for_line", run)
    for beside in (None, Path("anchor.onnx")):
        with pytest.raises(RunFailed):
            fresh_module.report_of_fresh_process(
                Path("model.onnx"),
                backend_name="onnxruntime-cpu",
                threads=1,
                settings=SETTINGS,
                number=0,
                beside=beside,
            )
    alone_s, together_s = allowed_s
    a_model_s = fresh_module.STARTUP_ALLOWANCE_S + WARMUP_S
    assert together_s - alone_s == a_model_s


@pytest.mark.parametrize(
    "pace", [Pace(), Pace(rate_hz=1 / 3), Pace(rate_hz=30.0, sustained_s=0.1)]
)
@pytest.mark.parametrize("beside", [None, Path("anchor.onnx")])
def test_a_process_measures_what_was_asked_for(
    beside: Path | None, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words that it is started with are what it reads."""
    asked: dict[str, object] = {}

    def measured(model_path: Path, **how: object) -> ProcessReport:
        asked.update(how, model_path=model_path)
        return report(100_000)

    def run(words: Sequence[str], **_: object) -> str:
        told: list[str] = []
        assert profilers_main.main(words, take_stdout=lambda: told.append) == 0
        return told[0]

    monkeypatch.setattr(profilers_main, "_measure", measured)
    monkeypatch.setattr(fresh_module, "run_for_line", run)
    found = fresh_module.report_of_fresh_process(
        Path("model.onnx"),
        backend_name="onnxruntime-cpu",
        threads=2,
        settings=SETTINGS,
        number=3,
        beside=beside,
        pace=pace,
    )
    assert found == report(100_000)
    settings = replace(SETTINGS, seed=SETTINGS.seed + 3)
    assert json.loads(str(asked.pop("settings_text"))) == encode_flat(settings)
    assert asked == {
        "model_path": Path("model.onnx"),
        "backend_name": "onnxruntime-cpu",
        "threads": 2,
        "beside": beside,
        "pace": pace,
    }


def test_what_is_damaged_is_measured_anew(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_call(model_path, monkeypatch, killed_at=3)
    (damaged,) = (model_path.parent / "kept").glob("*/*-1.json")
    damaged.write_text("{")
    _, started = kept_call(model_path, monkeypatch)
    assert [number for number, _ in started] == [1, 3]


def test_what_nobody_came_back_for_is_removed(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_call(model_path, monkeypatch, killed_at=3)
    (folder,) = (model_path.parent / "kept").iterdir()
    long_ago_s = folder.stat().st_mtime - 2 * FORGOTTEN_S
    os.utime(folder, (long_ago_s, long_ago_s))
    KeptTexts.of(folder.parent, {"call": "another call"})
    assert not folder.exists()


def test_the_spread_between_processes_makes_a_figure_unstable() -> None:
    alike = pool_reports([report(100_000), report(101_000)], settings=SETTINGS)
    assert alike.process_spread_ratio == pytest.approx(0.01)
    assert alike.stability.verdict == "stable"
    apart = pool_reports([report(100_000), report(110_000)], settings=SETTINGS)
    assert apart.process_spread_ratio == pytest.approx(0.10)
    assert apart.stability.reasons == ("processes differ by 10.0%, more than 3%",)


def test_processes_that_made_fewer_visits_than_planned_say_so() -> None:
    made = len(report(100_000).run.measurements[0].visits)
    settings = replace(SETTINGS, visits=made + 1)
    found = pool_reports([report(100_000)] * 3, settings=settings)
    assert found.stability.reasons == (
        f"only {3 * made} of {3 * made + 3} planned visits fitted into "
        f"{SETTINGS.max_seconds:g} s",
    )


@pytest.mark.parametrize("count", [4, 40])
def test_however_many_processes_are_held_against_the_anchor(count: int) -> None:
    """A window of drift would be one process alone, and take its slow phase along."""
    slow = [report(100_000, slowdown=1.5), report(100_000)]
    pooled = pool_reports(slow * (count // 2), settings=SETTINGS)
    assert pooled.process_spread_ratio == pytest.approx(0.0, abs=1e-3)


def test_two_processes_bound_a_latency_as_students_distribution_does() -> None:
    """A normal distribution's quantile would be three quarters too low."""
    pooled = pool_reports([report(100_000), report(102_000)], settings=SETTINGS)
    by_student, by_normal = 6.314, 1.645  # of one degree of freedom, and of many
    error_of_mean = math.log(1.02) / 2
    assert pooled.standard_error_ratio == pytest.approx(
        math.expm1(by_student / by_normal * error_of_mean), rel=1e-2
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_an_upper_bound_by_few_processes_holds_as_often_as_it_says(count: int) -> None:
    draws = np.random.default_rng(0).standard_normal((4000, count))
    errors = np.array([fresh_module._error_between(effects) for effects in draws])
    held = np.mean(draws.mean(axis=1) + fresh_module.T_95_MANY * errors >= 0)
    assert held == pytest.approx(0.95, abs=0.01)


def test_processes_are_told_of_by_the_most_memory_and_the_median_start() -> None:
    reports = [
        replace(report(100_000), memory_mb=memory, load_ms=load, first_inference_ms=run)
        for memory, load, run in ((3.0, 9.0, 5.0), (None, 10.0, 2.0), (5.0, 50.0, 1.0))
    ]
    pooled = pool_reports(reports, settings=SETTINGS)
    found = (pooled.memory_mb, pooled.load_ms, pooled.first_inference_ms)
    assert found == (5.0, 10.0, 2.0)
    assert not pooled.indicative
    one_shared = [*reports, report(100_000, shared=True)]
    assert pool_reports(one_shared, settings=SETTINGS).indicative


def test_an_error_is_told_of_where_no_process_was_asked_for_precision() -> None:
    settings = replace(SETTINGS, target_relative_error=NO_TARGET)
    found = pool_reports([report(100_000), report(108_000)], settings=settings)
    assert any("target 1.0%" in reason for reason in found.stability.reasons)


def test_a_process_in_a_slow_phase_is_no_spread() -> None:
    pooled = pool_reports(
        [report(100_000), report(100_000, slowdown=1.5)], settings=SETTINGS
    )
    assert pooled.quiet_ms == pytest.approx(0.1, rel=1e-3)
    assert pooled.process_spread_ratio == pytest.approx(0.0, abs=1e-3)


ANCHOR_MODEL = AnchorModel(path=Path("anchor.onnx"), quiet_ms=0.3)


def test_what_slows_down_the_anchor_model_too_is_no_latency_of_the_model() -> None:
    """Memory that neighbours use, which the anchor's kernel does not feel."""
    reports = [
        report(round(100_000 * busy), round(300_000 * busy)) for busy in (1.0, 1.2, 1.4)
    ]
    alone = pool_reports(reports, settings=SETTINGS)
    assert alone.process_spread_ratio == pytest.approx(0.4)
    assert alone.anchor_model_ms is None
    beside = pool_reports(reports, settings=SETTINGS, anchor_model=ANCHOR_MODEL)
    assert beside.quiet_ms == pytest.approx(0.1, rel=1e-4)
    assert beside.process_spread_ratio == pytest.approx(0.0, abs=1e-4)
    assert beside.standard_error_ratio < alone.standard_error_ratio / 100
    assert beside.anchor_model_ms == 0.3
    # All runs are the model's own.
    assert beside.samples_ns == alone.samples_ns
    assert beside.median_ms == alone.median_ms


@pytest.mark.parametrize(("slower", "level_ms"), [(1.04, 0.3), (1.06, None)])
def test_a_machine_that_is_another_one_now_is_not_held_against_what_it_was(
    slower: float, level_ms: float | None
) -> None:
    reports = [report(round(100_000 * slower), round(300_000 * slower))] * 2
    found = pool_reports(
        reports,
        settings=SETTINGS,
        anchor_model=replace(ANCHOR_MODEL, max_off_ratio=0.05),
    )
    assert found.anchor_found_ms == pytest.approx(0.3 * slower)
    assert found.anchor_model_ms == level_ms
    now_ms = 0.1 if level_ms else 0.1 * slower
    assert found.quiet_ms == pytest.approx(now_ms, rel=1e-4)
    assert len(found.anchor_visits) == len(found.visits)


def test_a_model_that_is_slower_than_its_anchor_model_says_is_slower() -> None:
    reports = [report(110_000, 300_000), report(113_000, 300_000)]
    beside = pool_reports(reports, settings=SETTINGS, anchor_model=ANCHOR_MODEL)
    assert beside.quiet_ms == pytest.approx(0.1115, rel=1e-3)
    assert beside.process_spread_ratio == pytest.approx(0.0273, abs=1e-3)


def test_a_file_is_timed_beside_an_anchor_model(model_path: Path) -> None:
    anchor_path = model_path.with_name("anchor.onnx")
    anchor_path.write_bytes(conv_model())
    fresh = measure_in_fresh_process(
        model_path,
        backend_name="onnxruntime-cpu",
        threads=1,
        settings=replace(SETTINGS, visits=20, runs_per_visit=20),
        processes=3,
        anchor_model=AnchorModel(path=anchor_path, quiet_ms=5.0),
    )
    assert fresh.anchor_model_ms == 5.0
    assert len(fresh.anchor_visits) >= 3 * 20  # either may get more, where it scatters
    # They are the same model; how alike they are timed is the machine's business.
    assert fresh.anchor_found_ms is not None
    assert math.isfinite(fresh.quiet_ms)


def test_percentiles_are_given_from_their_floors_on() -> None:
    one, two = report(100_000), report(100_000)
    # 75 samples are enough for the 90th percentile, and not for the 95th.
    assert pool_reports([one], settings=SETTINGS).p90_ms == pytest.approx(0.1)
    assert pool_reports([one], settings=SETTINGS).p95_ms is None
    assert pool_reports([one, two], settings=SETTINGS).p95_ms == pytest.approx(0.1)


def test_importing_the_package_imports_no_runtime_and_nothing_of_the_library() -> None:
    code = (
        "import sys, pkgutil, importlib, profilers\n"
        "for m in pkgutil.walk_packages(profilers.__path__, 'profilers.'):\n"
        "    importlib.import_module(m.name)\n"
        "names = {m.split('.')[0] for m in sys.modules}\n"
        "print(sorted(names & {'ofa_deploy', 'torch', 'openvino', 'onnxruntime', "
        "'onnx'}))"
    )
    assert in_new_interpreter(code) == "[]"


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_loading_openvino_leaves_its_telemetry_out() -> None:
    code = (
        "import sys\n"
        "from profilers import get_backend\n"
        "get_backend('openvino-cpu').runtime(threads=1)\n"
        "print('openvino' in sys.modules, 'openvino_telemetry' in sys.modules)"
    )
    assert in_new_interpreter(code) == "True False"


def test_the_command_line_diagnoses_the_device() -> None:
    code = (
        "import sys\n"
        "from profilers.__main__ import main\n"
        "sys.exit(0 if main(['doctor']) in (0, 1) else 2)"
    )
    assert "cores" in in_new_interpreter(code)
