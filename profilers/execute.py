"""Carrying out a work order: workers, a journal, and what follows from it.

The runtimes run in worker processes: one that crashes or hangs costs the model it was
at, and nothing else. Every visit is in the journal before the next one begins, so that
the same call after a kill goes on where it stopped.
"""

from __future__ import annotations

import math
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from profilers.device import Conditions, read_conditions
from profilers.errors import (
    DeviceUnfit,
    RunFailed,
    UnstableMeasurement,
)
from profilers.fresh import STDERR_TAIL_CHARACTERS, describe_exit, package_environment
from profilers.journal import Failure, Journal, VisitRecord
from profilers.measure import EXTRA_PASS_SHARE, MAX_VISITS_FACTOR
from profilers.measurement import Measurement, MeasureSettings, Visit
from profilers.summary import fit_visits, summarize
from profilers.worker import Assignment, Began, Refused, Visited, decode_report

__all__ = ["OrderResult", "execute"]

Progress = Callable[[int, int], None]
WriteModel = Callable[[str, Path], Path]

# Models open at a time. Hundreds would not fit into a board's memory; far fewer would
# be seen again and again within one phase of the machine.
GROUP_SIZE = 64

# With several groups each is seen in so many rounds, in other company each time.
ROUNDS = 2

# A model that does nothing for so long is taken to hang: loading is the longest.
DEFAULT_LIMIT_S = 120.0

# Reasons that concern all models alike: going on without one of them helps nobody.
_FATAL = {"DeviceUnfit": DeviceUnfit, "MissingDependency": RunFailed}


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderResult:
    """What came out of a work order.

    Attributes:
        measurements: By name, of the models that could be measured.
        failures: Reasons by name, of the others.
        beta: Share of the anchor's slowdown that the models have.
        anchor_reference_ns: The anchor's quiet level.
        conditions: Of the device, read at the end.
        damaged_count: Journal lines that were damaged, and measured again.
    """

    measurements: Mapping[str, Measurement]
    failures: Mapping[str, str]
    beta: float
    anchor_reference_ns: float
    conditions: Conditions
    damaged_count: int


def execute(
    names: Sequence[str],
    write_model: WriteModel,
    *,
    journal: Journal,
    backend_name: str,
    threads: int,
    settings: MeasureSettings,
    progress: Progress | None = None,
    limit_s: float = DEFAULT_LIMIT_S,
    group_size: int = GROUP_SIZE,
    command: Sequence[str] | None = None,
) -> OrderResult:
    """Measure models against each other.

    Args:
        names: Of the models; all different.
        write_model: Called with a name and a folder when the model is about to be
            measured; returns its file. The folder is removed afterwards: hundreds of
            models need not be on the disk together.
        journal: Open; what it holds is not measured again.
        backend_name: As `get_backend` takes it.
        threads: Of one inference.
        settings: How carefully; `max_seconds` bounds the visits of one call.
        progress: Called after each visit with visits made and visits known to be made.
        limit_s: Time after which a silent worker is stopped, and its model failed.
        group_size: Models open at a time.
        command: Starts a worker; None takes this package's.

    Raises:
        DeviceUnfit: `threads` is more than the cores that can be used.
        RunFailed: The backend cannot be used at all, or workers fail without a model.
        UnstableMeasurement: Not one model could be measured.
        MeasurementError: The journal cannot be written.
    """
    run = _Run(
        names=tuple(sorted(names)),
        write_model=write_model,
        journal=journal,
        backend_name=backend_name,
        threads=threads,
        settings=settings,
        progress=progress,
        limit_s=limit_s,
        command=tuple(command or (sys.executable, "-m", "profilers", "work")),
        deadline_s=time.monotonic() + settings.max_seconds,
    )
    rounds = 1 if len(names) <= group_size else ROUNDS
    rng = np.random.default_rng(settings.seed)
    for number in range(1, rounds + 1):
        target = math.ceil(settings.visits * number / rounds)
        for group in _groups(sorted(names), group_size, rng):
            run.bring_to(group, target)
    while imprecise := run.imprecise(group_size):
        run.visit(imprecise, passes=1)
    return run.result()


class _Run:
    """One call of `execute`."""

    def __init__(
        self,
        *,
        names: tuple[str, ...],
        write_model: WriteModel,
        journal: Journal,
        backend_name: str,
        threads: int,
        settings: MeasureSettings,
        progress: Progress | None,
        limit_s: float,
        command: tuple[str, ...],
        deadline_s: float,
    ) -> None:
        self._names = names
        self._write_model = write_model
        self._journal = journal
        self._backend_name = backend_name
        self._threads = threads
        self._settings = settings
        self._progress = progress
        self._limit_s = limit_s
        self._command = command
        self._deadline_s = deadline_s

    def bring_to(self, group: Sequence[str], target: int) -> None:
        """Visit the models of a group until each has `target` visits or has failed."""
        while waiting := self._waiting(group, target):
            # Those that were interrupted need fewer passes than the rest.
            counts = {name: len(self._visits(name)) for name in waiting}
            least = min(counts.values())
            nearest = min([target, *(n for n in counts.values() if n > least)])
            self.visit(
                [name for name in waiting if counts[name] == least],
                passes=nearest - least,
            )

    def visit(self, names: Sequence[str], *, passes: int) -> None:
        """Start a worker on some models, and take down what it tells."""
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
            assignment = Assignment(
                backend=self._backend_name,
                threads=self._threads,
                settings=self._settings,
                passes=passes,
                # Another order of visits each time, and the same after a kill.
                seed=self._settings.seed
                + sum(len(self._visits(name)) for name in self._names),
                models={name: self._write_model(name, Path(folder)) for name in names},
            )
            self._do(assignment)

    def _do(self, assignment: Assignment) -> None:
        current: str | None = None
        with _worker(self._command, assignment) as worker:
            while (line := worker.read_line(self._limit_s)) is not None:
                report = decode_report(line)
                if isinstance(report, Began):
                    current = report.name
                elif isinstance(report, Visited):
                    self._journal.add(VisitRecord(name=report.name, visit=report.visit))
                    self._tell()
                else:
                    self._take_refusal(report)
                    return
            reason = worker.describe_end()
        if reason is None:
            return
        if current is None:
            raise RunFailed(f"a worker {reason} before its first model")
        self._journal.add(Failure(name=current, reason=f"the worker {reason}"))

    def imprecise(self, group_size: int) -> list[str]:
        """The models that most need another visit, while there is time for any."""
        measured = self._measured()
        if not measured or time.monotonic() >= self._deadline_s:
            return []
        fit = fit_visits([self._visits(name) for name in measured])
        most = self._settings.visits * MAX_VISITS_FACTOR
        target_log = math.log1p(self._settings.target_relative_error)
        order = np.argsort(-fit.standard_error_log, kind="stable")
        chosen = [
            measured[index]
            for index in order
            if fit.standard_error_log[index] > target_log
            and len(self._visits(measured[index])) < most
        ]
        share = math.ceil(len(measured) * EXTRA_PASS_SHARE)
        return chosen[: min(share, group_size)]

    def result(self) -> OrderResult:
        """Fit all visits together."""
        measured = self._measured()
        failures = {
            name: reason
            for name, reason in self._journal.failures.items()
            if name in self._names
        }
        if not measured:
            raise UnstableMeasurement(
                f"none of {len(self._names)} models could be measured; the first: "
                f"{next(iter(failures.values()))}"
            )
        fit = fit_visits([self._visits(name) for name in measured])
        return OrderResult(
            measurements={
                name: summarize(
                    name,
                    self._visits(name),
                    effect_log=float(fit.effect_log[index]),
                    standard_error_log=float(fit.standard_error_log[index]),
                    settings=self._settings,
                )
                for index, name in enumerate(measured)
            },
            failures=failures,
            beta=fit.beta,
            anchor_reference_ns=math.exp(fit.reference_log_anchor),
            conditions=read_conditions(),
            damaged_count=self._journal.damaged_count,
        )

    def _visits(self, name: str) -> tuple[Visit, ...]:
        return self._journal.visits_of(name)

    def _waiting(self, group: Sequence[str], target: int) -> list[str]:
        failed = self._journal.failures
        return [
            name
            for name in group
            if name not in failed and len(self._visits(name)) < target
        ]

    def _measured(self) -> list[str]:
        failed = self._journal.failures
        return [
            name for name in self._names if name not in failed and self._visits(name)
        ]

    def _take_refusal(self, report: Refused) -> None:
        if report.kind in _FATAL or report.name is None:
            raise _FATAL.get(report.kind, RunFailed)(report.message)
        self._journal.add(Failure(name=report.name, reason=report.message))

    def _tell(self) -> None:
        if self._progress is None:
            return
        failed = self._journal.failures
        counts = [len(self._visits(n)) for n in self._names if n not in failed]
        planned = sum(max(self._settings.visits, count) for count in counts)
        self._progress(sum(counts), planned)


def _groups(
    names: Sequence[str], group_size: int, rng: np.random.Generator
) -> list[list[str]]:
    """All names in groups of nearly equal size, shuffled."""
    shuffled = [names[index] for index in rng.permutation(len(names))]
    count = math.ceil(len(names) / group_size)
    return [shuffled[start::count] for start in range(count)]


class _Worker:
    """A running worker process, read line by line with a time limit."""

    def __init__(
        self, process: subprocess.Popen[str], reports: IO[str], errors: IO[bytes]
    ) -> None:
        self._process = process
        self._errors = errors
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._hung_s: float | None = None
        self._pumping = threading.Thread(
            target=self._pump, args=(reports,), daemon=True
        )
        self._pumping.start()

    def _pump(self, reports: IO[str]) -> None:
        for line in reports:
            if line.endswith("\n"):  # the end of a killed process is no report
                self._lines.put(line)
        self._lines.put(None)

    def stop(self) -> None:
        """End the process, and the reading from it."""
        self._process.kill()
        self._process.wait()
        self._pumping.join()

    def read_line(self, limit_s: float) -> str | None:
        """The next line; None once the worker has ended or hangs."""
        try:
            return self._lines.get(timeout=limit_s)
        except queue.Empty:
            self._hung_s = limit_s
            self._process.kill()
            return None

    def describe_end(self) -> str | None:
        """How it ended, with its last words; None if it did what it was to do."""
        code = self._process.wait()
        if self._hung_s is not None:
            return f"gave no sign of life for {self._hung_s:g} s and was stopped"
        if code == 0:
            return None
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace")
        tail = words[-STDERR_TAIL_CHARACTERS:].strip() or "none"
        return f"ended {describe_exit(code)}; its last words: {tail}"


@contextmanager
def _worker(command: Sequence[str], assignment: Assignment) -> Iterator[_Worker]:
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=package_environment(),
        ) as process,
    ):
        orders, reports = process.stdin, process.stdout
        if orders is None or reports is None:
            raise RuntimeError("a process started with pipes has none")
        worker = _Worker(process, reports, errors)
        try:
            with suppress(BrokenPipeError):  # it may crash before it reads
                orders.write(f"{assignment.to_json()}\n")
                orders.close()
            yield worker
        finally:
            worker.stop()
