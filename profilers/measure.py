"""Timing many models together on a machine whose speed changes by itself.

All models are loaded and stay open. They are visited in shuffled passes, so that each
is seen at many times far apart; every visit is bracketed by readings of the anchor; the
quiet-state estimator of `profilers.stats` turns the visits into latencies. Models whose
standard error is still too large then get extra visits, within bounds.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from profilers.anchor import Anchor, Clock, MatrixAnchor
from profilers.backends.base import (
    Arrays,
    Backend,
    DeviceTimed,
    FallsBack,
    Session,
    random_inputs,
)
from profilers.device import available_cores, read_conditions
from profilers.errors import DeviceUnfit, MeasurementError, RunFailed
from profilers.measurement import (
    Measurement,
    MeasurementRun,
    MeasureSettings,
    ModelUnderTest,
    Stability,
    Visit,
)
from profilers.pace import Pace, Pacer
from profilers.quiet import QuietStateFit
from profilers.summary import fit_visits, need_visits, summarize

__all__ = [
    "Anchor",
    "Clock",
    "MatrixAnchor",
    "MeasureSettings",
    "Measurement",
    "MeasurementRun",
    "ModelUnderTest",
    "Observer",
    "Stability",
    "Visit",
    "check_cores",
    "measure_models",
    "visit_models",
]

_logger = logging.getLogger(__name__)

Inputs = dict[str, NDArray[Any]]
Progress = Callable[[int, int], None]

# Runs of one input repeated can be faster than those of changing ones: branch
# prediction and, in sparse kernels, the data itself.
INPUT_COUNT = 8

# A call and two clock readings take up to 1 µs, and a timer can tick in 0.1 µs.
MIN_SAMPLE_NS = 50_000
MAX_INNER_LOOPS = 1024

# The warm-up's last windows, and how far apart their medians may be.
STEADY_WINDOWS = 3
STEADY_RATIO = 0.02
# After which a model is run no longer just to be warm: slow ones are after few runs.
WARMUP_S = 30.0

# Share of the models that an extra pass visits: those with the largest errors. Small,
# so that the errors are looked at often; not one by one, to keep visits apart in time.
EXTRA_PASS_SHARE = 0.25


@dataclass(slots=True)
class _Bench:
    """A loaded model and the visits it got so far."""

    name: str
    session: Session
    inputs: list[Inputs]
    inner_loops: int = 1
    run_count: int = 0
    visits: list[Visit] = field(default_factory=list)

    def sample_ns(self, clock: Clock) -> int:
        """Time one run, on the next input; the mean of `inner_loops` runs."""
        inputs = self.inputs[self.run_count % len(self.inputs)]
        self.run_count += 1
        # Binding the input is not part of the inference, so it is not timed.
        timed = _prepare_timed(self.session, inputs, clock)
        try:
            duration_ns = timed(self.inner_loops)
        except Exception as error:  # whatever the runtime raises; steps do not map
            raise RunFailed(f"{self.name!r} failed while timed: {error}") from error
        return round(duration_ns / self.inner_loops)

    @property
    def fallback(self) -> str | None:
        """Of the last sample, as the session tells it."""
        return self.session.fallback if isinstance(self.session, FallsBack) else None

    @property
    def device_timed(self) -> bool:
        """Whether samples are by the session's own clock."""
        return isinstance(self.session, DeviceTimed)


def _prepare_timed(
    session: Session, inputs: Arrays, clock: Clock
) -> Callable[[int], int]:
    """Bind inputs; times runs by the session's own clock, or else by `clock`."""
    if isinstance(session, DeviceTimed):
        return session.prepare_timed(inputs)
    step = session.prepare(inputs)

    def timed(runs: int) -> int:
        loops = range(runs)
        start_ns = clock()
        for _ in loops:
            step()
        return clock() - start_ns

    return timed


class Observer(Protocol):
    """Is told what `visit_models` does, while it does it.

    Whoever reads along knows which model a runtime crashed or hung on.
    """

    def begin(self, name: str) -> None:
        """The model is about to be loaded, warmed up, or visited."""

    def visited(self, name: str, visit: Visit) -> None:
        """The model got a visit; the next one begins when this returns."""


def visit_models(
    models: Sequence[ModelUnderTest],
    *,
    backend: Backend,
    threads: int,
    settings: MeasureSettings,
    passes: int,
    clock: Clock = time.perf_counter_ns,
    anchor: Anchor | None = None,
    observer: Observer,
    rng: np.random.Generator,
) -> None:
    """Visit models in shuffled passes, and leave it to others what follows from it.

    Args:
        models: With different names.
        backend: Where they run.
        threads: Threads of one inference.
        settings: Of a visit; its number of visits and its bounds do not matter here.
        passes: Visits of each model, at least 1.
        clock: Time in ns; runs are timed by it unless the session has its own.
        anchor: None takes a `MatrixAnchor` on `clock`.
        observer: Gets the visits; their times count from the first pass on.
        rng: Gives the inputs and the order.

    Raises:
        DeviceUnfit: `threads` is more than the cores that this process can use.
        ModelRejected: A model cannot be loaded.
        RunFailed: A model cannot be run.
        MeasurementError: A model takes no time by this clock.
    """
    check_cores(threads)
    if anchor is None:
        anchor = MatrixAnchor(repeats=settings.anchor_repeats, clock=clock)
    with ExitStack() as stack:
        benches = _load_all(models, backend, threads, stack, rng, begin=observer.begin)
        for bench in benches:
            _warm_up(bench, settings, clock, begin=observer.begin)
        start_ns = clock()
        for number in range(passes):
            due_ns = start_ns + round(number * settings.pass_seconds * 1e9)
            anchor_ns = anchor.measure_ns()
            while clock() < due_ns:  # busy: a machine that sleeps changes its speed
                anchor_ns = anchor.measure_ns()
            for index in rng.permutation(len(benches)):
                bench = benches[index]
                observer.begin(bench.name)
                _visit(bench, settings, clock, anchor, anchor_ns, start_ns)
                observer.visited(bench.name, bench.visits[-1])
                # The observer may have let the processor sleep; this wakes it, too.
                anchor_ns = anchor.measure_ns()


def measure_models(
    models: Sequence[ModelUnderTest],
    *,
    backend: Backend,
    threads: int,
    settings: MeasureSettings,
    clock: Clock = time.perf_counter_ns,
    anchor: Anchor | None = None,
    progress: Progress | None = None,
    rng: np.random.Generator,
    beta: float | None = None,
    anchor_reference_ns: float | None = None,
    pace: Pace | None = None,
) -> MeasurementRun:
    """Measure models against each other.

    Args:
        models: With different names.
        backend: Where they run.
        threads: Threads of one inference.
        settings: How carefully.
        clock: Time in ns; runs are timed by it unless the session has its own.
        anchor: None takes a `MatrixAnchor` on `clock`.
        progress: Called after each visit with visits made and visits known to be
            made; the latter grows if some models need extra ones.
        rng: Gives the inputs and the order.
        beta: As an earlier, longer run on this machine found it; None fits it here. 0,
            whatever is given, where no visit feels the host.
        anchor_reference_ns: Likewise, the anchor's quiet level of an earlier run. A
            run of seconds needs it: the machine may be slow all along.
        pace: Of the runs; None for one after the other.

    Raises:
        DeviceUnfit: `threads` is more than the cores that this process can use.
        ModelRejected: A model cannot be loaded.
        RunFailed: A model cannot be run.
        MeasurementError: A model takes no time by this clock.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"{len(names)} models with {len(set(names))} different names; "
            "give at least one model, and each its own name"
        )
    check_cores(threads)
    start_ns = clock()
    if anchor is None:
        anchor = MatrixAnchor(repeats=settings.anchor_repeats, clock=clock)
    known = _Known(beta=beta, anchor_reference_ns=anchor_reference_ns)
    with ExitStack() as stack:
        benches = _load_all(models, backend, threads, stack, rng)
        for bench in benches:
            _warm_up(bench, settings, clock)
        pacer = None if pace is None else Pacer(pace, clock=clock)
        if pace is not None:
            for bench in benches:
                # Of several runs in a row, all but the first would be off the pace.
                bench.inner_loops = 1 if pace.rate_hz else bench.inner_loops
            _sustain(benches, pace, clock)
        fit = _visit_all(
            benches, settings, clock, anchor, progress, rng, known, pacer=pacer
        )
    conditions = read_conditions()
    return MeasurementRun(
        measurements=summarize(names, [b.visits for b in benches], fit, settings),
        beta=fit.beta,
        anchor_reference_ns=math.exp(fit.reference_log_anchor),
        conditions=conditions,
        duration_s=max(1, clock() - start_ns) / 1e9,
        indicative=conditions.shared_host,
    )


def check_cores(threads: int) -> None:
    """Refuse more threads than can run.

    Raises:
        DeviceUnfit: `threads` is more than the cores that this process can use.
    """
    cores = available_cores()
    if threads > cores:
        # They would wait for each other, and the latency would be the scheduler's.
        raise DeviceUnfit(
            f"threads={threads}; this process can use {cores} cores; "
            "ask for no more threads than that"
        )


def _load_all(
    models: Sequence[ModelUnderTest],
    backend: Backend,
    threads: int,
    stack: ExitStack,
    rng: np.random.Generator,
    *,
    begin: Callable[[str], None] = lambda name: None,
) -> list[_Bench]:
    """Load the models for as long as the stack is open."""
    shared_inputs: dict[object, list[Inputs]] = {}
    benches = []
    for model in models:
        begin(model.name)
        session = stack.enter_context(backend.load(model.model, threads=threads))
        inputs = _inputs_for(session, shared_inputs, rng)
        benches.append(_Bench(name=model.name, session=session, inputs=inputs))
    return benches


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What an earlier run on this machine found."""

    beta: float | None
    anchor_reference_ns: float | None


def _inputs_for(
    session: Session, shared: dict[object, list[Inputs]], rng: np.random.Generator
) -> list[Inputs]:
    # Hundreds of models have a handful of input shapes; their own inputs would take
    # a gigabyte.
    key = (
        tuple(session.input_shapes.items()),
        tuple((name, str(dtype)) for name, dtype in session.input_dtypes.items()),
    )
    if key not in shared:
        shared[key] = [random_inputs(session, rng) for _ in range(INPUT_COUNT)]
    return shared[key]


def _warm_up(
    bench: _Bench,
    settings: MeasureSettings,
    clock: Clock,
    *,
    begin: Callable[[str], None] = lambda name: None,
) -> None:
    """Run until it is steady, or long enough; then decide what one sample is."""
    windows: list[list[int]] = []
    end_ns = clock() + round(WARMUP_S * 1e9)
    while len(windows) < settings.warmup_windows and not _steady(windows):
        begin(bench.name)  # a sign of life: all of them can take minutes
        window = [bench.sample_ns(clock)]
        while len(window) < settings.warmup_runs and clock() < end_ns:
            window.append(bench.sample_ns(clock))
        windows.append(window)
        if clock() >= end_ns:  # of a slow model few runs say what many would
            break
    # The least of all: the first runs still allocate.
    duration_ns = min(map(min, windows))
    if duration_ns < 1:
        raise MeasurementError(
            f"{bench.name!r} takes {duration_ns} ns by this clock; a run must take at "
            "least 1 ns; check that the clock counts in ns and the model does something"
        )
    bench.inner_loops = min(math.ceil(MIN_SAMPLE_NS / duration_ns), MAX_INNER_LOOPS)


def _sustain(benches: Sequence[_Bench], pace: Pace, clock: Clock) -> None:
    """Run the models in turn, at their pace, for as long as asked."""
    pacer = Pacer(pace, clock=clock)
    end_ns = clock() + round(pace.sustained_s * 1e9)
    while clock() < end_ns:
        for bench in benches:
            pacer.wait()
            bench.sample_ns(clock)


def _steady(windows: Sequence[Sequence[int]]) -> bool:
    medians = [statistics.median(window) for window in windows[-STEADY_WINDOWS:]]
    return len(medians) == STEADY_WINDOWS and max(medians) <= min(medians) * (
        1 + STEADY_RATIO
    )


def _visit_all(
    benches: Sequence[_Bench],
    settings: MeasureSettings,
    clock: Clock,
    anchor: Anchor,
    progress: Progress | None,
    rng: np.random.Generator,
    known: _Known,
    *,
    pacer: Pacer | None,
) -> QuietStateFit:
    start_ns = clock()
    deadline_ns = start_ns + round(settings.max_seconds * 1e9)
    done = 0
    planned = settings.visits * len(benches)

    def visit(chosen: Sequence[_Bench], *, bounded: bool) -> None:
        nonlocal done
        anchor_ns = anchor.measure_ns()
        for index in rng.permutation(len(chosen)):
            if bounded and clock() >= deadline_ns:
                return
            anchor_ns = _visit(
                chosen[index], settings, clock, anchor, anchor_ns, start_ns, pacer=pacer
            )
            done += 1
            if progress is not None:
                progress(done, max(planned, done))

    for number in range(settings.visits):
        # Two visits each are needed for a standard error, however long they take.
        visit(benches, bounded=number >= 2)

    pass_size = math.ceil(len(benches) * EXTRA_PASS_SHARE)
    while True:  # each turn adds visits, and both their number and time are bounded
        visits = [bench.visits for bench in benches]
        fit = fit_visits(
            visits, beta=known.beta, anchor_reference_ns=known.anchor_reference_ns
        )
        needy = need_visits(visits, fit, settings)[:pass_size]
        if not needy or clock() >= deadline_ns:
            return fit
        _logger.debug("extra visits for %d models", len(needy))
        planned = max(planned, done + len(needy))
        visit([benches[index] for index in needy], bounded=True)


def _visit(
    bench: _Bench,
    settings: MeasureSettings,
    clock: Clock,
    anchor: Anchor,
    anchor_before_ns: int,
    start_ns: int,
    *,
    pacer: Pacer | None = None,
) -> int:
    """Visit a model once; return the anchor's reading after it.

    That reading may stand before the next visit, if nothing happens in between.
    """
    time_ns = clock() - start_ns
    if pacer is not None:
        pacer.wait()
    bench.sample_ns(clock)  # brings the model back into the caches; not kept
    samples_ns = []
    for _ in range(settings.runs_per_visit):
        if pacer is not None:
            pacer.wait()
        samples_ns.append(max(1, bench.sample_ns(clock)))
    anchor_after_ns = anchor.measure_ns()
    bench.visits.append(
        Visit(
            time_ns=time_ns,
            anchor_before_ns=anchor_before_ns,
            anchor_after_ns=anchor_after_ns,
            inner_loops=bench.inner_loops,
            samples_ns=tuple(samples_ns),
            fallback=bench.fallback,
            device_timed=bench.device_timed,
        )
    )
    return anchor_after_ns
