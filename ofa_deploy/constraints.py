"""What may be asked of a network, and whether it was shown to keep it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from ofa_deploy.errors import SpaceError
from profilers.pace import MAX_RATE_HZ, MAX_SUSTAINED_S, MIN_RATE_HZ, Pace

PERCENTILES = (50, 90, 95, 99)
MEGABYTE = 10**6

ConstraintName = Literal["latency", "size", "compressed", "memory", "accuracy"]
Evidence = Literal["measured", "predicted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Limits, of which any may be combined; the most accurate network is asked for.

    Args:
        latency_ms: Budget for one image. Where neither this nor a rate is given, the
            latency is measured, and limited by nothing.
        percentile: Of the runs that the budget speaks of, one of 50, 90, 95 and 99. 50
            is the latency in the machine's quiet state; the others are percentiles of
            all runs, whatever state it was in.
        size_bytes: Of the files that the runtime loads.
        compressed_bytes: Of these, compressed by xz, as they are stored or sent.
        peak_memory_mb: Growth of a process's memory by loading and running the model,
            in 10^6 bytes.
        min_accuracy: Top-1, 0..1. The fastest network that keeps it is taken, instead
            of the most accurate one within the others.
        rate_hz: Runs per second of the application: timed at that pace. Without a
            latency, a run may take no longer than the time to the next one.
        sustained_s: Load before the first timed run, at that pace.

    Raises:
        SpaceError: A value makes no sense, or two contradict each other.
    """

    latency_ms: float | None = None
    percentile: int = 50
    size_bytes: int | None = None
    compressed_bytes: int | None = None
    peak_memory_mb: float | None = None
    min_accuracy: float | None = None
    rate_hz: float | None = None
    sustained_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("percentile", *_BYTES):
            _settle(self, name, _whole)
        for name in _REAL_FIELDS:
            _settle(self, name, _real)
        if getattr(self, "sustained_s") is None:  # noqa: B009 - whatever the types say
            raise SpaceError("sustained_s=None is not a number; give 0 for no load")
        self._check_values()
        if not self.limits:
            raise SpaceError(
                "no limit is given; of a supernet give latency_ms, rate_hz, "
                "size_bytes, peak_memory_mb, or min_accuracy to get the fastest "
                "network that keeps it; of a network of your own latency_ms, or, for "
                "autoprune-weights, compressed_bytes"
            )
        if self.percentile != 50 and self.budget_ms is None:
            raise SpaceError(
                f"percentile={self.percentile} of an unlimited latency says nothing; "
                "give latency_ms, the budget that this percentile is to keep, or "
                "rate_hz"
            )
        if (
            self.rate_hz is not None
            and self.latency_ms is not None
            and self.latency_ms > 1000 / self.rate_hz
        ):
            raise SpaceError(
                f"rate_hz={self.rate_hz:g} gives {1000 / self.rate_hz:.4g} ms from one "
                f"run to the next, and latency_ms={self.latency_ms:g} allows more: "
                "runs would pile up. Ask for a smaller latency or a lower rate"
            )

    def _check_values(self) -> None:
        if self.latency_ms is not None:
            require_budget(self.latency_ms)
        if self.percentile not in PERCENTILES:
            raise SpaceError(
                f"percentile={self.percentile} is not one of "
                f"{', '.join(map(str, PERCENTILES))}"
            )
        for name in (*_BYTES, "peak_memory_mb"):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise SpaceError(
                    f"{name}={value} makes no sense; give a finite number above 0"
                )
        if self.min_accuracy is not None and not 0 < self.min_accuracy < 1:
            raise SpaceError(
                f"min_accuracy={self.min_accuracy} is no share of images; give a "
                "number between 0 and 1, such as 0.9 for 90 %"
            )
        rate_hz = self.rate_hz
        if rate_hz is not None and not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
            raise SpaceError(
                f"rate_hz={rate_hz} makes no sense; give {MIN_RATE_HZ:g} to "
                f"{MAX_RATE_HZ:g}"
            )
        if not 0 <= self.sustained_s <= MAX_SUSTAINED_S:
            raise SpaceError(
                f"sustained_s={self.sustained_s} makes no sense; give 0 to "
                f"{MAX_SUSTAINED_S:g} seconds"
            )

    @property
    def budget_ms(self) -> float | None:
        """What one run may take; at a rate, no more than the time to the next one."""
        if self.latency_ms is None and self.rate_hz is not None:
            return 1000 / self.rate_hz
        return self.latency_ms

    @property
    def limits(self) -> dict[ConstraintName, float]:
        """What is asked for, by name."""
        asked: dict[ConstraintName, float | None] = {
            "latency": self.budget_ms,
            "size": self.size_bytes,
            "compressed": self.compressed_bytes,
            "memory": self.peak_memory_mb,
            "accuracy": self.min_accuracy,
        }
        return {name: limit for name, limit in asked.items() if limit is not None}

    @property
    def pace(self) -> Pace | None:
        """Of the runs that are timed; None for one after the other."""
        if self.rate_hz is None and not self.sustained_s:
            return None
        return Pace(rate_hz=self.rate_hz, sustained_s=self.sustained_s)

    @property
    def is_plain(self) -> bool:
        """Whether the latency, if any is asked for, is that of the quiet state."""
        return self.percentile == 50 and self.pace is None

    @property
    def latency_label(self) -> str:
        """What the budget speaks of, in words."""
        parts = ["latency" if self.percentile == 50 else f"p{self.percentile} latency"]
        if self.rate_hz is not None:
            parts.append(f"at {self.rate_hz:g} Hz")
        if self.sustained_s:
            parts.append(f"after {self.sustained_s:g} s of load")
        return " ".join(parts)


_BYTES = ("size_bytes", "compressed_bytes")
_REAL_FIELDS = (
    "latency_ms",
    "peak_memory_mb",
    "min_accuracy",
    "rate_hz",
    "sustained_s",
)


def _settle(
    constraints: Constraints, name: str, convert: Callable[[object], object]
) -> None:
    """Make a plain number of what may be numpy's: it goes into a file."""
    value = getattr(constraints, name)
    if value is None:
        return
    try:
        plain = convert(value)
    except (TypeError, ValueError) as error:
        raise SpaceError(
            f"{name}={value!r} is not {'a whole' if convert is _whole else 'a'} number"
        ) from error
    object.__setattr__(constraints, name, plain)


def _whole(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return operator.index(value)  # type: ignore[arg-type]


def _real(value: object) -> float:
    return float(value)  # type: ignore[arg-type]


def require_budget(budget_ms: float) -> None:
    """Refuse a budget that no latency can be compared with.

    Raises:
        SpaceError: Not a finite number above 0.
    """
    if not _positive(budget_ms):
        raise SpaceError(
            f"a latency budget of {budget_ms} ms makes no sense; give a finite number "
            "above 0, such as 0.5"
        )


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One constraint, and what was found.

    Args:
        constraint: Which.
        limit: What was asked for.
        found: What was found, in the limit's unit.
        bound: What must be on the right side of the limit: of a latency its one-sided
            95 % upper bound, of anything else what was found.
        evidence: Whether it was measured on the exported file, or predicted.
    """

    constraint: ConstraintName
    limit: float
    found: float
    bound: float
    evidence: Evidence

    @property
    def met(self) -> bool:
        """Whether the constraint is kept; never by a value that is not a number."""
        if self.constraint == "accuracy":
            return self.bound >= self.limit
        return self.bound <= self.limit

    def told(self, value: float) -> str:
        """A value of this constraint, in words."""
        return in_words(self.constraint, value)

    @property
    def used_share(self) -> float:
        """How much of what is allowed is used up; above 1 it is exceeded.

        Of an accuracy, errors made over errors allowed.
        """
        if self.constraint == "accuracy":
            return (1 - self.bound) / (1 - self.limit)
        return self.bound / self.limit


def binding(verdicts: tuple[Verdict, ...]) -> Verdict:
    """The constraint that leaves the least room.

    Raises:
        ValueError: There are none.
    """
    return max(verdicts, key=lambda verdict: verdict.used_share)


def in_words(constraint: ConstraintName, value: float) -> str:
    """A constraint's value with its unit."""
    if constraint == "accuracy":
        return f"{value:.2%}"
    if constraint in ("size", "compressed"):
        return f"{value:,.0f} bytes"
    return f"{value:.4g} {'ms' if constraint == 'latency' else 'MB'}"


CONSTRAINT_NAMES: tuple[ConstraintName, ...] = get_args(ConstraintName)
