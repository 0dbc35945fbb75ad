"""The values that timing starts from and results in: settings, visits, measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from profilers import stats
from profilers.device import Conditions

__all__ = [
    "Drift",
    "MeasureSettings",
    "Measurement",
    "MeasurementRun",
    "ModelUnderTest",
    "Stability",
    "Visit",
]


# Change of the anchor between the two ends of a visit.
DISTURBED_ANCHOR_RATIO = 0.05

StabilityVerdict = Literal["stable", "unstable"]


# Of a relative error: nothing is to be reached.
NO_TARGET = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSettings:
    """How carefully to measure.

    Attributes:
        visits: Planned visits of each model, at least 2; they are far apart in time.
        runs_per_visit: Timed runs of one visit.
        warmup_runs: Runs of one window of the warm-up, before the first visit.
        warmup_windows: Windows at most; the warm-up ends when the medians of the last
            three agree. 1 to wait for nothing.
        anchor_repeats: Repeats of the anchor's kernel for one reading.
        seed: Seed of inputs and order, where the caller makes the generator from it.
        target_relative_error: Standard error at which a latency is precise enough,
            as a share of the latency; above it the model gets extra visits. From
            `NO_TARGET` on the planned visits are all there are.
        max_seconds: End of visiting, counted from the first visit: loading comes on
            top. Two visits of each model are always made. Of a work order, whose
            planned visits are all made, the time for extra ones of every 64 models.
        pass_seconds: Least time of one pass of a work order over its models. Small
            models are through in no time, and all their visits would be within one
            phase of the machine.
    """

    visits: int
    runs_per_visit: int
    warmup_runs: int
    warmup_windows: int
    anchor_repeats: int
    seed: int
    target_relative_error: float
    max_seconds: float
    pass_seconds: float = 0.0

    def __post_init__(self) -> None:
        for field in ("target_relative_error", "max_seconds", "pass_seconds"):
            # As they are read again: digests are of their digits.
            object.__setattr__(self, field, float(getattr(self, field)))
        least = {
            "visits": 2,
            "runs_per_visit": 1,
            "warmup_runs": 1,
            "warmup_windows": 1,
            "anchor_repeats": 1,
            "seed": 0,
        }
        for field, minimum in least.items():
            value = getattr(self, field)
            if value < minimum:
                raise ValueError(f"{field}={value}; give at least {minimum}")
        for field in ("target_relative_error", "max_seconds"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field}={value}; give a finite number above 0")
        if not (math.isfinite(self.pass_seconds) and self.pass_seconds >= 0):
            raise ValueError(
                f"pass_seconds={self.pass_seconds}; give a finite number, at least 0"
            )

    @classmethod
    def screen(cls, *, seed: int = 0) -> MeasureSettings:
        """For fitting a predictor: many models, a percent or two each."""
        return cls(
            visits=18,
            runs_per_visit=9,
            warmup_runs=5,
            warmup_windows=1,
            anchor_repeats=6,
            seed=seed,
            target_relative_error=0.015,
            max_seconds=45.0,
        )

    @classmethod
    def confirm(cls, *, seed: int = 0) -> MeasureSettings:
        """For choosing among a few: precise to less than a percent."""
        return cls(
            visits=22,
            runs_per_visit=12,
            warmup_runs=10,
            warmup_windows=10,
            anchor_repeats=6,
            seed=seed,
            target_relative_error=0.0075,
            max_seconds=90.0,
        )

    @classmethod
    def certify(cls, *, seed: int = 0) -> MeasureSettings:
        """For a shipped model: enough runs for a 99th percentile."""
        return cls(
            visits=28,
            runs_per_visit=25,
            warmup_runs=20,
            warmup_windows=20,
            anchor_repeats=6,
            seed=seed,
            target_relative_error=0.01,
            max_seconds=120.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One stay at a model: anchor, runs, anchor. Raw, for better estimators to come.

    Attributes:
        time_ns: When the visit began, counted from the start of its session.
        anchor_before_ns: The anchor's time just before the runs.
        anchor_after_ns: The anchor's time just after the runs.
        inner_loops: Runs that one sample is the mean of; more than one where a
            single run is too short for the timer.
        samples_ns: Time of one run, per sample.
        fallback: Why the model ran in another way than the runtime's fastest; None
            if it did not.
        session: Which of the processes that measured made it, from 0 on.
        device_timed: Whether the samples are by the clock of the processor that ran
            the model, and not the host's.
    """

    time_ns: int
    anchor_before_ns: int
    anchor_after_ns: int
    inner_loops: int
    samples_ns: tuple[int, ...]
    fallback: str | None = None
    session: int = 0
    device_timed: bool = False

    def __post_init__(self) -> None:
        for field in ("time_ns", "session"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)}; give at least 0")
        for field in ("anchor_before_ns", "anchor_after_ns", "inner_loops"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; give at least 1")
        if not self.samples_ns:
            raise ValueError("samples_ns is empty; a visit has at least one sample")
        if min(self.samples_ns) < 1:
            raise ValueError(
                f"samples_ns holds {min(self.samples_ns)}; a run takes at least 1 ns"
            )
        if self.fallback == "":
            raise ValueError("fallback is empty; say why, or give None")

    @property
    def feels_host(self) -> bool:
        """Whether what slows the host, and so its anchor, slowed the runs.

        Not those of a processor that timed them itself, unless the host had to launch
        its work piece by piece.
        """
        return not self.device_timed or self.fallback is not None

    @property
    def disturbed(self) -> bool:
        """Whether the machine changed its speed during the visit, as the model felt it.

        On a shared machine a visit in twenty was, and its residual scattered two to
        six times as much as the others'.
        """
        low, high = sorted((self.anchor_before_ns, self.anchor_after_ns))
        return self.feels_host and high > low * (1 + DISTURBED_ANCHOR_RATIO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """Whether a measurement can be trusted, and compared with others.

    Attributes:
        verdict: `unstable` exactly if there are reasons.
        reasons: What went wrong, for people.
    """

    verdict: StabilityVerdict
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.verdict not in ("stable", "unstable"):
            raise ValueError(f"verdict={self.verdict!r}; give 'stable' or 'unstable'")
        if (self.verdict == "unstable") != bool(self.reasons):
            raise ValueError(
                f"verdict={self.verdict!r} with {len(self.reasons)} reasons; an "
                "unstable measurement has at least one, a stable one none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What slowed all models of a window of time alike, and the anchor not.

    It is taken out of every latency.

    Attributes:
        window_count: Windows, of a few seconds each; 1 if the models are too few to
            tell.
        flagged_count: Of which drifted by more than 2 %.
        discarded_count: Of which drifted by more than 5 %, so that their visits do
            not count.
        largest_ratio: Of all, either way.
    """

    window_count: int
    flagged_count: int
    discarded_count: int
    largest_ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.discarded_count <= self.flagged_count <= self.window_count:
            raise ValueError(
                f"{self.discarded_count} discarded of {self.flagged_count} flagged of "
                f"{self.window_count} windows; each is a part of the next"
            )
        if not (math.isfinite(self.largest_ratio) and self.largest_ratio >= 0):
            raise ValueError(
                f"largest_ratio={self.largest_ratio}; give a finite number, at least 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One model's latency.

    Attributes:
        name: The model's name.
        visits: Raw data.
        quiet_ms: Latency in the machine's quiet state; what budgets speak of.
        standard_error_ratio: Standard error of `quiet_ms`, as a share of it.
        median_ms: Plain median of all samples, in whatever state the machine was.
        stability: Whether the precision asked for was reached, in the runtime's
            fastest way of running.
    """

    name: str
    visits: tuple[Visit, ...]
    quiet_ms: float
    standard_error_ratio: float
    median_ms: float
    stability: Stability

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty; name the model")
        if not self.visits:
            raise ValueError(f"{self.name!r} has no visits; measure it first")
        for field in ("quiet_ms", "median_ms"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field}={value}; give a finite number above 0")
        error = self.standard_error_ratio
        if not (math.isfinite(error) and error >= 0):
            raise ValueError(
                f"standard_error_ratio={error}; give a finite number, at least 0"
            )

    @property
    def samples_ns(self) -> tuple[int, ...]:
        """All samples, visit after visit."""
        return tuple(sample for visit in self.visits for sample in visit.samples_ns)

    def percentile_ms(self, percentile: float) -> float | None:
        """Percentile of all runs; None where it is not known."""
        return percentile_of(self.visits, percentile)


def percentile_of(visits: Sequence[Visit], percentile: float) -> float | None:
    """Percentile of all runs in ms.

    None where they are too few for it, and, above the median, where samples are means
    of several runs: a mean hides the slow ones.
    """
    samples_ns = _single_runs_ns(visits, percentile)
    return stats.percentile_ms(samples_ns, percentile) if samples_ns else None


def percentile_upper_of(visits: Sequence[Visit], percentile: float) -> float | None:
    """What that percentile is below with 95 % certainty, in ms; None likewise."""
    samples_ns = _single_runs_ns(visits, percentile)
    return stats.percentile_upper_ms(samples_ns, percentile) if samples_ns else None


def _single_runs_ns(visits: Sequence[Visit], percentile: float) -> list[int]:
    averaged = any(visit.inner_loops > 1 for visit in visits)
    if averaged and percentile > 50:
        return []
    return [sample for visit in visits for sample in visit.samples_ns]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUnderTest:
    """A model to measure.

    Attributes:
        name: Names the measurement.
        model: What the backend's `load` takes.
    """

    name: str
    model: Path | bytes

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty; name the model")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRun:
    """Models measured together, under one anchor.

    Attributes:
        measurements: In the order of the models given.
        beta: Share of the anchor's slowdown that the models have.
        anchor_reference_ns: The anchor's quiet level, which `quiet_ms` speaks of.
        conditions: Of the device, read at the end.
        duration_s: Of everything, loading included.
        indicative: The device is shared: figures are good for choosing and not for
            certifying.
    """

    measurements: tuple[Measurement, ...]
    beta: float
    anchor_reference_ns: float
    conditions: Conditions
    duration_s: float
    indicative: bool

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta={self.beta}; give a finite number, at least 0")
        for field in ("anchor_reference_ns", "duration_s"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field}={value}; give a finite number above 0")
