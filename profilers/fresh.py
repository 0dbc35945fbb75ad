"""Timing an exported file in fresh processes: what a user's own process would see.

A process that has measured hundreds of models is not what the model will run in; and
one process is one draw of memory layout and thread placement. Here each of several new
interpreters loads the file and times it; the spread between them is part of the result.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from profilers.codec import decode_run, encode_flat, encode_run
from profilers.device import Conditions
from profilers.errors import FormatError, RunFailed
from profilers.json_reader import parse_json
from profilers.kept import KeptTexts
from profilers.measure import WARMUP_S
from profilers.measurement import (
    NO_TARGET,
    MeasurementRun,
    MeasureSettings,
    Stability,
    Visit,
    percentile_of,
    percentile_upper_of,
)
from profilers.pace import Pace
from profilers.process import run_for_line
from profilers.quiet import QuietStateFit
from profilers.summary import fit_visits, summarize_model

__all__ = [
    "AnchorModel",
    "FreshMeasurement",
    "ProcessReport",
    "measure_in_fresh_process",
]

# Of each model, beside the measuring itself: starting an interpreter, importing,
# compiling, and the visits that are made however long they take.
STARTUP_ALLOWANCE_S = 120.0

# One-sided 95 % quantiles of Student's distribution, by the number of processes; and
# of the normal one.
T_95 = {
    2: 6.31,
    3: 2.92,
    4: 2.35,
    5: 2.13,
    6: 2.02,
    7: 1.94,
    8: 1.89,
    9: 1.86,
    10: 1.83,
}
T_95_MANY = 1.645

# A call that is made again within this, and the time that a process may take, goes on
# from what its processes found before it was killed.
KEPT_S = 3600.0

# Standard error of all processes that is precise enough where none was asked of each.
MOST_ERROR_RATIO = 0.01

# A spread above this says that processes differ, whatever each one says of itself.
MAX_PROCESS_SPREAD_RATIO = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorModel:
    """A model of known latency, timed beside another one in the same processes.

    Neighbours on a shared host take memory bandwidth and caches, too, which the
    anchor's kernel does not feel. Two models of one runtime feel it alike.

    Attributes:
        path: Its file.
        quiet_ms: Its latency in the state that latencies are to speak of.
        max_off_ratio: Further off than this share of it, the machine is not that one
            any more, and the other model's latency is what it is now; None holds it
            against the anchor model in any case.
    """

    path: Path
    quiet_ms: float
    max_off_ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReport:
    """What one fresh process measured.

    Attributes:
        load_ms: Loading and compiling the model.
        first_inference_ms: The first run after it.
        memory_mb: Growth of the process's memory by loading and running, at its peak,
            in 10^6 bytes; None where the system does not tell.
        run: Everything after that; the model's measurement, and that of an anchor
            model if there was one beside it.
    """

    load_ms: float
    first_inference_ms: float
    memory_mb: float | None
    run: MeasurementRun

    def __post_init__(self) -> None:
        for field in ("load_ms", "first_inference_ms"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field}={value}; give a finite number above 0")
        if len(self.run.measurements) not in (1, 2):
            raise ValueError(
                f"run has {len(self.run.measurements)} measurements; a process "
                "measures one model, and at most an anchor model beside it"
            )

    def to_json(self) -> str:
        """Encode the report in one line."""
        return json.dumps(
            {
                "load_ms": self.load_ms,
                "first_inference_ms": self.first_inference_ms,
                "memory_mb": self.memory_mb,
                "run": encode_run(self.run),
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> ProcessReport:
        """Decode a report.

        Raises:
            FormatError: The text is not a report.
        """
        node = parse_json(text)
        fields = node.fields("load_ms", "first_inference_ms", "memory_mb", "run")
        return node.build(
            lambda: cls(
                load_ms=fields["load_ms"].positive(),
                first_inference_ms=fields["first_inference_ms"].positive(),
                memory_mb=fields["memory_mb"].optional(
                    lambda node: node.number(minimum=0)
                ),
                run=decode_run(fields["run"]),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshMeasurement:
    """An exported file's latency over several fresh processes.

    Attributes:
        visits: Raw data of all processes; each process counts its time from 0.
        process_count: Processes.
        quiet_ms: Latency in the quiet state.
        standard_error_ratio: Standard error of `quiet_ms`, as a share of it.
        median_ms: Plain median of all samples.
        p90_ms: Percentile of all samples; None where they are too few for it, or
            means of several runs.
        p95_ms: Likewise.
        process_spread_ratio: Slowest process's quiet latency over the fastest's,
            minus 1.
        first_inference_ms: Median over the processes.
        load_ms: Median over the processes.
        memory_mb: The most of any process, as `ProcessReport` counts it.
        beta: Share of the anchor's slowdown that the model has, given or fitted.
        anchor_reference_ns: The anchor's quiet level that `quiet_ms` speaks of.
        anchor_model_ms: Latency of the anchor model where `quiet_ms` is measured
            against that; None where no model was timed beside this one, or was too far
            off.
        anchor_visits: Raw data of the anchor model, if there was one.
        anchor_found_ms: What it took, as far as the anchor's kernel tells.
        conditions: As the last process read them.
        indicative: The device is shared.
        stability: Whether the precision asked for was reached.
    """

    visits: tuple[Visit, ...]
    process_count: int
    quiet_ms: float
    standard_error_ratio: float
    median_ms: float
    p90_ms: float | None
    p95_ms: float | None
    process_spread_ratio: float
    first_inference_ms: float
    load_ms: float
    memory_mb: float | None
    beta: float
    anchor_reference_ns: float
    anchor_model_ms: float | None
    anchor_visits: tuple[Visit, ...]
    anchor_found_ms: float | None
    conditions: Conditions
    indicative: bool
    stability: Stability

    @property
    def samples_ns(self) -> tuple[int, ...]:
        """All samples, process after process."""
        return tuple(sample for visit in self.visits for sample in visit.samples_ns)

    def percentile_ms(self, percentile: float) -> float | None:
        """Percentile of all runs; None where it is not known."""
        return percentile_of(self.visits, percentile)

    def percentile_upper_ms(self, percentile: float) -> float | None:
        """What that percentile is below with 95 % certainty; None likewise."""
        return percentile_upper_of(self.visits, percentile)


def measure_in_fresh_process(
    model_path: Path,
    *,
    backend_name: str,
    threads: int,
    settings: MeasureSettings,
    processes: int,
    beta: float | None = None,
    anchor_reference_ns: float | None = None,
    anchor_model: AnchorModel | None = None,
    pace: Pace | None = None,
    timeout_s: float | None = None,
    interpreter: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    give_up: Callable[[FreshMeasurement], bool] | None = None,
    kept: KeptTexts | None = None,
) -> FreshMeasurement:
    """Time a model file in fresh interpreter processes, one after the other.

    Args:
        model_path: The exported file.
        backend_name: As `get_backend` takes it.
        threads: Threads of one inference.
        settings: How carefully, in each process; each has its own seed.
        processes: At least 1; from 2 on the spread means something.
        beta: Of the table that the budget was chosen by; None fits it here, as a
            machine of one's own does in any case.
        anchor_reference_ns: Of that table, likewise. Without it, a machine that is slow
            all along makes the model look slow: on a shared host by others' work.
        anchor_model: Timed beside the model, which is held against it: the slopes and
            levels above then hardly matter. Runs are not those of a process that has
            nothing else to do: percentiles and paces have no use for one.
        pace: Of the runs; None for one after the other. The load before them is that
            of the first process that is started: the others begin while the device is
            still under it.
        timeout_s: For one process; None allows for `settings`, `pace` and the start.
        interpreter: Python to run; None takes this one.
        progress: Called with processes done and all of them.
        give_up: Whether what two processes or more found so far is enough to know that
            the rest would be for nothing; None to make them all.
        kept: Holds what processes found before the call was killed, and will hold what
            they find; None to begin anew.

    Raises:
        RunFailed: A process failed, crashed, or took too long.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}; give at least 1")
    models = 1 if anchor_model is None else 2
    longest_s = timeout_s or _limit_s(settings, pace or Pace(), models=models)
    before = _KeptReports.of(
        kept,
        model_path,
        subject=[
            backend_name,
            threads,
            encode_flat(settings),
            asdict(pace or Pace()),
            None if anchor_model is None else digest_of(anchor_model.path),
        ],
        fresh_s=KEPT_S + longest_s,
    )
    reports: list[ProcessReport] = []
    for number in range(processes):
        report = before.read(number)
        if report is None:
            report = report_of_fresh_process(
                model_path,
                backend_name=backend_name,
                threads=threads,
                settings=settings,
                number=number,
                beside=None if anchor_model is None else anchor_model.path,
                pace=pace,
                timeout_s=timeout_s,
                interpreter=interpreter,
            )
            before.keep(number, report)
            pace = None if pace is None else replace(pace, sustained_s=0.0)
        reports.append(report)
        if progress is not None:
            progress(number + 1, processes)
        if not report.run.indicative:
            # A machine of one's own is as slow as it is, whatever an earlier run found.
            beta = anchor_reference_ns = None
        if len(reports) < 2 and processes > 1:
            continue
        pooled = pool_reports(
            reports,
            settings=settings,
            beta=beta,
            anchor_reference_ns=anchor_reference_ns,
            anchor_model=anchor_model,
        )
        if len(reports) == processes or (give_up is not None and give_up(pooled)):
            break
    return pooled


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeptReports:
    """What processes found of one model, measured in one way, before a kill."""

    texts: KeptTexts | None
    digest: str
    fresh_s: float

    @classmethod
    def of(
        cls,
        texts: KeptTexts | None,
        model_path: Path,
        *,
        subject: list[object],
        fresh_s: float,
    ) -> _KeptReports:
        digest = hashlib.sha256(json.dumps(subject, sort_keys=True).encode())
        if texts is not None:
            digest.update(digest_of(model_path).encode())
        return cls(texts=texts, digest=digest.hexdigest()[:32], fresh_s=fresh_s)

    def read(self, number: int) -> ProcessReport | None:
        if self.texts is None:
            return None
        text = self.texts.read(self._name(number), fresh_s=self.fresh_s)
        try:
            return None if text is None else ProcessReport.from_json(text)
        except FormatError:  # of another version
            return None

    def keep(self, number: int, report: ProcessReport) -> None:
        if self.texts is not None:
            self.texts.keep(self._name(number), report.to_json())

    def _name(self, number: int) -> str:
        return f"{self.digest}-{number}.json"


def digest_of(model_path: Path) -> str:
    """Of a model's content, which may be several files of one stem: .xml and .bin."""
    digest = hashlib.sha256()
    for path in sorted(model_path.parent.glob(f"{model_path.stem}.*")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _limit_s(settings: MeasureSettings, pace: Pace, *, models: int) -> float:
    """What a process may take that times so many models.

    Two visits are made however long they take; at a slow pace they take long.
    """
    paced_s = 3 * settings.runs_per_visit * pace.period_s + pace.sustained_s
    starts_s = models * (STARTUP_ALLOWANCE_S + WARMUP_S)
    return settings.max_seconds + paced_s + starts_s


def report_of_fresh_process(
    model_path: Path,
    *,
    backend_name: str,
    threads: int,
    settings: MeasureSettings,
    number: int,
    beside: Path | None = None,
    pace: Pace | None = None,
    timeout_s: float | None = None,
    interpreter: str | None = None,
) -> ProcessReport:
    """Time a model file in one fresh interpreter process.

    Args:
        model_path: The exported file.
        backend_name: As `get_backend` takes it.
        threads: Threads of one inference.
        settings: How carefully.
        number: Of the process, from 0 on; changes the seed.
        beside: An anchor model, timed in the same process.
        pace: Of the runs; None for one after the other.
        timeout_s: For the process; None allows for `settings`, `pace` and the start.
        interpreter: Python to run; None takes this one.

    Raises:
        RunFailed: The process failed, crashed, or took too long.
    """
    pace = pace or Pace()
    if timeout_s is None:
        timeout_s = _limit_s(settings, pace, models=2 if beside else 1)
    seeded = {**encode_flat(settings), "seed": settings.seed + number}
    label = f"the process measuring {model_path}"
    line = run_for_line(
        [
            *("measure", str(model_path), "--backend", backend_name),
            *("--threads", str(threads), "--settings", json.dumps(seeded)),
            *(("--beside", str(beside)) if beside else ()),
            *(("--rate", repr(pace.rate_hz)) if pace.rate_hz else ()),
            *(("--sustained", repr(pace.sustained_s)) if pace.sustained_s else ()),
        ],
        label=label,
        timeout_s=timeout_s,
        cure="allow more time or measure fewer visits",
        interpreter=interpreter,
    )
    try:
        return ProcessReport.from_json(line)
    except FormatError as error:
        raise RunFailed(
            f"{label} gave no report ({error}); use the same version of this package "
            f"for both, and check that {interpreter or sys.executable} is a Python "
            "interpreter"
        ) from error


def visits_by_process(
    reports: Sequence[ProcessReport], *, place: int = 0
) -> list[list[Visit]]:
    """The visits of each process, a session of its own.

    Args:
        reports: Of the processes.
        place: 0 for the model, 1 for the anchor model beside it.
    """
    return [
        [
            replace(visit, session=number)
            for visit in report.run.measurements[place].visits
        ]
        for number, report in enumerate(reports)
    ]


def pool_reports(
    reports: Sequence[ProcessReport],
    *,
    settings: MeasureSettings,
    beta: float | None = None,
    anchor_reference_ns: float | None = None,
    anchor_model: AnchorModel | None = None,
) -> FreshMeasurement:
    """Combine what several processes measured of one model.

    Args:
        reports: At least one.
        settings: What was to be reached.
        beta: None fits it.
        anchor_reference_ns: None takes it from the visits.
        anchor_model: That was timed beside the model.
    """
    by_process = visits_by_process(reports)
    visits = tuple(visit for process in by_process for visit in process)
    pooled = fit_visits([visits], beta=beta, anchor_reference_ns=anchor_reference_ns)
    own = _fit_processes(by_process, pooled)
    effects, effect_log = own.effect_log, float(pooled.effect_log[0])
    error_log = float(pooled.standard_error_log[0])
    level_ms: float | None = None
    found_ms: float | None = None
    anchor_visits: tuple[Visit, ...] = ()
    if anchor_model is not None:
        by_anchor = visits_by_process(reports, place=1)
        anchor_visits = tuple(visit for process in by_anchor for visit in process)
        beside = _fit_processes(by_anchor, pooled)
        found_ms = math.exp(float(beside.effect_log.mean())) / 1e6
        most = anchor_model.max_off_ratio
        if most is None or abs(found_ms / anchor_model.quiet_ms - 1) <= most:
            level_ms = anchor_model.quiet_ms
            effects = effects - beside.effect_log + math.log(level_ms * 1e6)
            effect_log = float(effects.mean())
            error_log = math.hypot(_error_within(own), _error_within(beside))
    spread = math.expm1(float(effects.max() - effects.min()))
    # One process is one draw of memory layout and placement, and one phase of the
    # machine: its visits say little of the others.
    error_log = max(error_log, _error_between(effects))
    summary = summarize_model(
        reports[0].run.measurements[0].name,
        visits,
        effect_log=effect_log,
        standard_error_log=error_log,
        settings=replace(
            settings,
            visits=settings.visits * len(reports),
            target_relative_error=(
                settings.target_relative_error
                if settings.target_relative_error < NO_TARGET
                else MOST_ERROR_RATIO
            ),
        ),
    )
    reasons = summary.stability.reasons
    if spread > MAX_PROCESS_SPREAD_RATIO:
        reasons = (
            *reasons,
            f"processes differ by {spread:.1%}, more than "
            f"{MAX_PROCESS_SPREAD_RATIO:.0%}",
        )
    return FreshMeasurement(
        visits=visits,
        process_count=len(reports),
        quiet_ms=summary.quiet_ms,
        standard_error_ratio=summary.standard_error_ratio,
        median_ms=summary.median_ms,
        p90_ms=percentile_of(visits, 90),
        p95_ms=percentile_of(visits, 95),
        process_spread_ratio=spread,
        first_inference_ms=median(report.first_inference_ms for report in reports),
        load_ms=median(report.load_ms for report in reports),
        memory_mb=_most(report.memory_mb for report in reports),
        beta=pooled.beta,
        anchor_reference_ns=math.exp(pooled.reference_log_anchor),
        anchor_model_ms=level_ms,
        anchor_visits=anchor_visits,
        anchor_found_ms=found_ms,
        conditions=reports[-1].run.conditions,
        indicative=any(report.run.indicative for report in reports),
        stability=Stability(
            verdict="unstable" if reasons else "stable", reasons=reasons
        ),
    )


def _fit_processes(
    by_process: Sequence[Sequence[Visit]], pooled: QuietStateFit
) -> QuietStateFit:
    """Of each process by itself.

    With the pooled slope: a single process hardly sees the anchor vary.
    """
    return fit_visits(
        by_process,
        beta=pooled.beta,
        anchor_reference_ns=math.exp(pooled.reference_log_anchor),
        drift=False,  # one process alone in a stretch of time cannot tell of it
    )


def _error_within(fit: QuietStateFit) -> float:
    """Standard error of the processes' mean by what visits of each one differ by."""
    errors = fit.standard_error_log
    return float(np.linalg.norm(errors)) / len(errors)


def _error_between(effects: NDArray[np.float64]) -> float:
    """Standard error of the processes' mean; 0 of a single one, which cannot tell.

    Widened so that a normal distribution's one-sided 95 % bound is Student's, which
    few processes need.
    """
    count = len(effects)
    if count < 2:
        return 0.0
    widening = T_95[min(count, max(T_95))] / T_95_MANY
    return widening * float(effects.std(ddof=1)) / math.sqrt(count)


def _most(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
