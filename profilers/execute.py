"""Carrying out a work order: workers, a journal, and what follows from it.

The runtimes run in worker processes: one that crashes or hangs costs the model it was
at, and nothing else. Every visit is in the journal before the next one begins, so that
the same call after a kill goes on where it stopped.
"""

from __future__ import annotations

import errno
import math
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from profilers.device import Conditions, read_conditions
from profilers.errors import (
    DeviceUnfit,
    MeasurementError,
    MissingDependency,
    RunFailed,
    UnstableMeasurement,
)
from profilers.journal import Failure, Journal, OrderDone, SessionBegan, VisitRecord
from profilers.measure import EXTRA_PASS_SHARE
from profilers.measurement import Drift, Measurement
from profilers.order import WorkOrder
from profilers.process import (
    describe_exit,
    last_words,
    package_environment,
    profilers_command,
)
from profilers.summary import (
    at_level,
    fit_visits,
    need_visits,
    summarize,
    summarize_drift,
)
from profilers.worker import Assignment, Began, Refused, Visited, decode_report

__all__ = ["OrderResult", "collect", "execute"]

Progress = Callable[[int, int], None]
WriteModel = Callable[[str, Path], Path]

# With several groups each is seen in so many rounds, in other company each time.
ROUNDS = 2
# Extra visits come in so many passes: a worker loads its models for them.
EXTRA_PASSES = 6
# Share of the error that is asked for which extra visits aim at, while their time
# lasts: of two tables whose latencies are just precise enough, many differ by twice
# that error.
AIMED_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderResult:
    """What came out of a work order.

    Attributes:
        measurements: By name, of the models that could be measured.
        failures: Reasons by name, of the others.
        beta: Share of the anchor's slowdown that the models have.
        anchor_reference_ns: The anchor's quiet level.
        conditions_before: Of the device, at the first visits.
        conditions_after: Of the device, read at the end.
        drift: What the anchor did not see.
    """

    measurements: Mapping[str, Measurement]
    failures: Mapping[str, str]
    beta: float
    anchor_reference_ns: float
    conditions_before: Conditions
    conditions_after: Conditions
    drift: Drift


def execute(
    order: WorkOrder,
    write_model: WriteModel,
    *,
    journal: Journal,
    progress: Progress | None = None,
    command: Sequence[str] = (*profilers_command(), "work"),
) -> OrderResult:
    """Carry out a work order.

    Args:
        order: What to measure.
        write_model: Called with a name and a folder when the model is about to be
            measured; returns its file. The folder is removed afterwards: hundreds of
            models need not be on the disk together.
        journal: Open; what it holds is not measured again.
        progress: Called after each visit with visits made and visits known to be made,
            without those of the anchor model.
        command: Starts a worker.

    Raises:
        DeviceUnfit: The order's threads are more than the cores that can be used.
        RunFailed: The backend cannot be used at all, or workers fail without a model.
        UnstableMeasurement: Not one model could be measured.
        MeasurementError: The journal, or a model, cannot be written.
    """
    run = _Run(
        # Sorted, so that nothing depends on the order in which they were named.
        order=replace(order, names=tuple(sorted(order.names))),
        write_model=write_model,
        journal=journal,
        progress=progress,
        command=command,
    )
    run.visit_as_planned()
    if order.digest not in journal.done:
        deadline_s = time.monotonic() + order.extra_s
        while time.monotonic() < deadline_s and (needy := run.needy()):
            run.visit(needy, passes=EXTRA_PASSES)
        # Else every later call would take its time for extra visits anew.
        journal.add(OrderDone(order=order.digest))
    return collect(order, journal=journal)


def collect(
    order: WorkOrder,
    *,
    journal: Journal,
    anchor_reference_ns: float | None = None,
    anchor_model_ms: float | None = None,
) -> OrderResult:
    """What a journal tells of a work order, all visits fitted together.

    Args:
        order: What was measured.
        journal: That `execute` filled.
        anchor_reference_ns: The anchor's level that latencies are to speak of; None
            for the quiet level of this order's own visits.
        anchor_model_ms: The anchor model's latency as another run found it, which all
            latencies are brought to the level of; None for what these visits say.

    Raises:
        UnstableMeasurement: Not one model could be measured.
    """
    measured = _measured(order, journal)
    failures = {
        name: reason for name, reason in journal.failures.items() if name in order.names
    }
    if not measured:
        raise UnstableMeasurement(
            f"none of {len(order.names)} models could be measured; the first: "
            f"{next(iter(failures.values()))}"
        )
    visits = [journal.visits_of(name) for name in measured]
    fit = fit_visits(visits, anchor_reference_ns=anchor_reference_ns)
    if anchor_model_ms is not None and order.anchor_name in measured:
        model = measured.index(order.anchor_name)
        fit = at_level(fit, model=model, latency_ms=anchor_model_ms)
    after = read_conditions()
    measurements = summarize(measured, visits, fit, order.settings)
    return OrderResult(
        measurements={entry.name: entry for entry in measurements},
        failures=failures,
        beta=fit.beta,
        anchor_reference_ns=math.exp(fit.reference_log_anchor),
        conditions_before=(*journal.sessions, after)[0],
        conditions_after=after,
        drift=summarize_drift(fit),
    )


def _measured(order: WorkOrder, journal: Journal) -> list[str]:
    failed = journal.failures
    return [
        name
        for name in sorted(order.names)
        if name not in failed and journal.visits_of(name)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One call of `execute`; all that changes is in the journal."""

    order: WorkOrder
    write_model: WriteModel
    journal: Journal
    progress: Progress | None
    command: Sequence[str]

    def visit_as_planned(self) -> None:
        """Give every model the planned visits."""
        names, settings = self.order.grouped_names, self.order.settings
        rounds = 1 if len(names) <= self.order.group_size else ROUNDS
        rng = np.random.default_rng(settings.seed)
        for number in range(1, rounds + 1):
            target = math.ceil(settings.visits * number / rounds)
            for group in _groups(names, self.order.group_size, rng):
                self._bring_to(group, target)

    def _bring_to(self, group: Sequence[str], target: int) -> None:
        """Visit the models of a group until each has `target` visits or has failed."""
        while waiting := self._waiting(group, target):
            # Those that were interrupted need fewer passes than the rest.
            counts = {name: self.journal.count_of(name) for name in waiting}
            least = min(counts.values())
            nearest = min([target, *(n for n in counts.values() if n > least)])
            self.visit(
                [name for name in waiting if counts[name] == least],
                passes=nearest - least,
            )

    def visit(self, names: Sequence[str], *, passes: int) -> None:
        """Start a worker on some models and the anchor model; keep what it tells.

        One that the system kills had too many open, as a rule: which of them it was at
        says nothing. Each half has a worker of its own then, down to a single model.
        """
        targets = {name: self.journal.count_of(name) + passes for name in names}
        fits = self._visit_at_once(names, passes=passes)
        if fits or len(names) == 1:
            return
        for half in (names[::2], names[1::2]):
            left = max(targets[name] - self.journal.count_of(name) for name in half)
            if left > 0:
                self.visit(half, passes=left)

    def _visit_at_once(self, names: Sequence[str], *, passes: int) -> bool:
        """The same with one worker; whether the system let it be."""
        anchor = self.order.anchor_name
        alone = names[0] if len(names) == 1 else None
        if anchor is not None and anchor not in {*names, *self.journal.failures}:
            names = [*names, anchor]
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
            assignment = Assignment(
                backend=self.order.backend,
                threads=self.order.threads,
                settings=self.order.settings,
                passes=passes,
                # Another order of visits each time, and the same after a kill.
                seed=self.order.settings.seed
                + sum(self.journal.count_of(name) for name in self.order.names),
                models=self._write_models(names, Path(folder)),
            )
            return self._do(assignment, alone=alone)

    def _write_models(self, names: Sequence[str], folder: Path) -> dict[str, Path]:
        try:
            return {name: self.write_model(name, folder) for name in names}
        except OSError as error:
            raise MeasurementError(
                f"the models to time cannot be written to {tempfile.gettempdir()}: "
                f"{error}; free space there, or set TMPDIR to another folder, and run "
                "this again"
            ) from error

    def _do(self, assignment: Assignment, *, alone: str | None) -> bool:
        """Have a worker make the visits; False where the system killed it.

        Args:
            assignment: Its models.
            alone: The only one of them beside the anchor model: blamed for a lack of
                memory, and no other assignment would do.
        """
        session = self.journal.next_session
        self.journal.add(
            SessionBegan(conditions=read_conditions(), began_s=time.time())
        )
        current: str | None = None
        left = assignment.passes * len(assignment.models)
        with _worker(self.command, assignment) as worker:
            while (line := worker.read_line(self.order.limit_s)) is not None:
                report = decode_report(line)
                if isinstance(report, Began):
                    current = report.name
                elif isinstance(report, Visited):
                    visit = replace(report.visit, session=session)
                    self.journal.add(VisitRecord(name=report.name, visit=visit))
                    left -= 1
                    if left:
                        worker.go_on()
                    self._tell()
                    if not left:
                        return True  # a crash on the way out costs nobody anything
                else:
                    self._take_refusal(report)
                    return True
            reason = worker.describe_end()
            killed = worker.was_killed()
        if current is None:
            raise RunFailed(f"a worker {reason} before its first model")
        if killed:
            if alone is None:
                return False
            current = alone
        self.journal.add(Failure(name=current, reason=f"the worker {reason}"))
        return True

    def needy(self) -> list[str]:
        """The models that most need more visits."""
        measured = _measured(self.order, self.journal)
        if not measured:
            return []
        visits = [self.journal.visits_of(name) for name in measured]
        asked = self.order.settings
        aimed = AIMED_SHARE * asked.target_relative_error
        needy = need_visits(
            visits, fit_visits(visits), replace(asked, target_relative_error=aimed)
        )
        share = math.ceil(len(measured) * EXTRA_PASS_SHARE)
        return [measured[i] for i in needy[: min(share, self.order.group_size)]]

    def _waiting(self, group: Sequence[str], target: int) -> list[str]:
        failed = self.journal.failures
        return [
            name
            for name in group
            if name not in failed and self.journal.count_of(name) < target
        ]

    def _take_refusal(self, report: Refused) -> None:
        # What concerns all models alike: going on without one of them helps nobody.
        if report.kind == DeviceUnfit.__name__:
            raise DeviceUnfit(report.message)
        if report.kind == MissingDependency.__name__ or report.name is None:
            raise RunFailed(report.message)
        self.journal.add(Failure(name=report.name, reason=report.message))

    def _tell(self) -> None:
        if self.progress is None:
            return
        failed = self.journal.failures
        counts = [
            self.journal.count_of(name)
            for name in self.order.grouped_names
            if name not in failed
        ]
        planned = sum(max(self.order.settings.visits, count) for count in counts)
        self.progress(sum(counts), planned)


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
        self,
        process: subprocess.Popen[str],
        orders: IO[str],
        reports: IO[str],
        errors: IO[bytes],
    ) -> None:
        self._process = process
        self._orders = orders
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
        with _dead_reader():
            self._orders.close()

    def go_on(self) -> None:
        """Let the worker begin its next visit."""
        self.tell("")

    def tell(self, line: str) -> None:
        """Write a line to the worker, which may be dead; the reports say so."""
        with _dead_reader():
            self._orders.write(f"{line}\n")
            self._orders.flush()

    def read_line(self, limit_s: float) -> str | None:
        """The next line; None once the worker has ended or hangs."""
        try:
            return self._lines.get(timeout=limit_s)
        except queue.Empty:
            self._hung_s = limit_s
            self._process.kill()
            return None

    def was_killed(self) -> bool:
        """Whether it ended by SIGKILL, and not by this process's."""
        killed = getattr(signal, "SIGKILL", None)
        return (
            killed is not None
            and self._hung_s is None
            and self._process.wait() == -killed
        )

    def describe_end(self) -> str:
        """How it ended before its work was done, with its last words."""
        code = self._process.wait()
        if self._hung_s is not None:
            return f"gave no sign of life for {self._hung_s:g} s and was stopped"
        self._errors.seek(0)
        words = last_words(self._errors.read().decode(errors="replace"))
        return f"ended {describe_exit(code)}; its last words: {words}"


@contextmanager
def _dead_reader() -> Iterator[None]:
    """Do not mind that nobody reads; Windows calls that an invalid argument."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            raise


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
        worker = _Worker(process, orders, reports, errors)
        try:
            worker.tell(assignment.to_json())
            yield worker
        finally:
            worker.stop()
