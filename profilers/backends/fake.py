"""A backend with latencies of one's choice, on a clock of its own.

For tests of whatever measures: the same seed gives the same samples, to the
nanosecond, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profilers.backends.base import Arrays, check_inputs, check_runs, check_threads
from profilers.closing import Closing
from profilers.device import RuntimeSpec
from profilers.errors import ModelRejected, RunFailed

__all__ = [
    "FakeAnchor",
    "FakeBackend",
    "FakeClock",
    "FakeDevice",
    "FakeDeviceSession",
    "FakeSession",
]

FAKE_INPUT_SHAPE = (1, 3, 8, 8)

LatencyOf = Callable[[Path | bytes], int] | Mapping[str | bytes, int]
Phases = Callable[[int], float]


def _steady(now_ns: int) -> float:
    return 1.0


class FakeClock:
    """Time that passes only when told to; call it for the time in ns."""

    def __init__(self, start_ns: int = 0) -> None:
        self.now_ns = start_ns

    def __call__(self) -> int:
        """Return the time in ns."""
        return self.now_ns

    def advance(self, duration_ns: int) -> None:
        """Let `duration_ns` pass, at least 0."""
        if duration_ns < 0:
            raise ValueError(f"duration_ns={duration_ns}; time does not run backwards")
        self.now_ns += duration_ns


class FakeAnchor:
    """An anchor whose time follows the same phases as a `FakeBackend`.

    Args:
        clock: The clock that it moves.
        quiet_ns: Its time in the quiet state.
        phases: As for `FakeBackend`.
    """

    def __init__(
        self, clock: FakeClock, *, quiet_ns: int = 250_000, phases: Phases = _steady
    ) -> None:
        self._clock = clock
        self._quiet_ns = quiet_ns
        self._phases = phases

    def measure_ns(self) -> int:
        """Let the anchor's time pass and return it."""
        duration_ns = round(self._quiet_ns * self._phases(self._clock.now_ns))
        self._clock.advance(duration_ns)
        return duration_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeDevice:
    """A processor with a clock of its own, as a GPU is.

    Attributes:
        name: As `Backend.accelerator` gives it.
        waiting_ns: What each run takes on the host's clock and not on its own.
        fallback: As `DeviceTimed.fallback` gives it.
        phases: How slow it is, as `FakeBackend` has it for the host.
    """

    name: str = "fake accelerator"
    waiting_ns: int = 0
    fallback: str | None = None
    phases: Phases = _steady


class FakeBackend:
    """Loads anything that it knows a latency for.

    Args:
        clock: The clock that every run moves.
        latency_ns: Quiet latency per model: a function of what `load` gets, or a
            mapping from a model's bytes or its file's name.
        phases: Factor on every latency as a function of the time in ns: how slow
            the machine is then. A device has its own.
        device: None makes sessions that the host times.
    """

    name = "fake"

    def __init__(
        self,
        clock: FakeClock,
        *,
        latency_ns: LatencyOf,
        phases: Phases = _steady,
        device: FakeDevice | None = None,
    ) -> None:
        if device is not None and phases is not _steady:
            raise ValueError("a device has phases of its own; give them to FakeDevice")
        self.clock = clock
        self._device = device
        self._latency_ns = latency_ns
        self._phases = phases

    def load(self, model: Path | bytes, *, threads: int) -> FakeSession:
        """See `Backend.load`."""
        check_threads(threads)
        latency_ns = self._latency_of(model)
        if self._device is None:
            return FakeSession(self.clock, latency_ns, self._phases)
        return FakeDeviceSession(self.clock, latency_ns, self._device)

    def _latency_of(self, model: Path | bytes) -> int:
        if not isinstance(self._latency_ns, Mapping):
            return self._latency_ns(model)
        key = model if isinstance(model, bytes) else model.name
        if key not in self._latency_ns:
            raise ModelRejected(
                f"the fake backend has no latency for {key!r}; "
                f"it has {sorted(map(repr, self._latency_ns))}"
            )
        return self._latency_ns[key]

    def runtime(self, *, threads: int) -> RuntimeSpec:
        """See `Backend.runtime`."""
        return RuntimeSpec(
            backend=self.name,
            version="1",
            provider="fake",
            threads=threads,
            precision="f32",
        )

    def accelerator(self) -> str | None:
        """See `Backend.accelerator`."""
        return None if self._device is None else self._device.name


class FakeSession(Closing):
    """Takes `x` of `FAKE_INPUT_SHAPE`, gives it back as `y`, and moves the clock."""

    def __init__(self, clock: FakeClock, latency_ns: int, phases: Phases) -> None:
        self._clock = clock
        self._latency_ns = latency_ns
        self._phases = phases
        self._open = True
        self.input_shapes: dict[str, tuple[int, ...]] = {"x": FAKE_INPUT_SHAPE}
        self.input_dtypes: dict[str, np.dtype[Any]] = {"x": np.dtype("float32")}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        self.prepare(inputs)()
        return {"y": np.array(inputs["x"])}

    def prepare(self, inputs: Arrays) -> Callable[[], None]:
        """See `Session.prepare`."""
        if not self._open:
            raise RunFailed("the session is closed; load the model again")
        check_inputs(inputs, shapes=self.input_shapes, dtypes=self.input_dtypes)
        return self._step

    def close(self) -> None:
        """See `Session.close`."""
        self._open = False

    def _step(self) -> None:
        self._clock.advance(self._run_ns())

    def _run_ns(self) -> int:
        return round(self._latency_ns * self._phases(self._clock.now_ns))


class FakeDeviceSession(FakeSession):
    """A session that the host's clock would time too long."""

    def __init__(self, clock: FakeClock, latency_ns: int, device: FakeDevice) -> None:
        super().__init__(clock, latency_ns, device.phases)
        self._device = device

    @property
    def fallback(self) -> str | None:
        """See `DeviceTimed.fallback`."""
        return self._device.fallback

    def prepare_timed(self, inputs: Arrays) -> Callable[[int], int]:
        """See `DeviceTimed.prepare_timed`."""
        self.prepare(inputs)

        def timed(runs: int) -> int:
            check_runs(runs)
            return sum(self._timed_step() for _ in range(runs))

        return timed

    def _step(self) -> None:
        self._timed_step()

    def _timed_step(self) -> int:
        run_ns = self._run_ns()
        self._clock.advance(run_ns + self._device.waiting_ns)
        return run_ns
