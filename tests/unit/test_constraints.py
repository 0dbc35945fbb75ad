from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.constraints import Constraints, Verdict, binding
from ofa_deploy.errors import DeviceUnfit, SpaceError, UnstableMeasurement
from ofa_deploy.verify import (
    AccuracyClaim,
    enough_runs,
    judge,
    judge_latency,
    require_time_for,
)
from profilers import Visit
from profilers.measurement import MeasureSettings
from profilers.pace import Pace
from profilers.stats import percentile_floor
from tests.support.tiny_session import fresh

CLAIM = AccuracyClaim(
    kind="predicted", value=0.9, low=0.88, high=0.92, image_count=1000
)


@pytest.mark.parametrize(
    ("given_limits", "told"),
    [
        ({}, "no limit is given; of a supernet give latency_ms, rate_hz, size_bytes"),
        ({}, "or, for autoprune-weights, compressed_bytes"),
        ({"sustained_s": 5.0}, "no limit is given"),
        ({"latency_ms": 1.0, "compressed_bytes": 0}, "compressed_bytes=0 makes no"),
        (
            {"min_accuracy": 0.9, "percentile": 95},
            "percentile=95 of an unlimited latency says nothing; give latency_ms",
        ),
        ({"latency_ms": 1.0, "percentile": 75}, "percentile=75 is not one of 50, 90"),
        ({"latency_ms": 50.0, "rate_hz": 30.0}, "33.33 ms from one run to the next"),
        ({"latency_ms": 0.0}, "a latency budget of 0.0 ms makes no sense"),
        ({"latency_ms": 1.0, "size_bytes": 0}, "size_bytes=0 makes no sense"),
        ({"latency_ms": 1.0, "size_bytes": -5}, "size_bytes=-5 makes no sense"),
        (
            {"latency_ms": 1.0, "peak_memory_mb": math.inf},
            "peak_memory_mb=inf makes no sense",
        ),
        ({"min_accuracy": 90.0}, "min_accuracy=90.0 is no share of images"),
        ({"min_accuracy": 0.0}, "min_accuracy=0.0 is no share of images"),
        ({"min_accuracy": math.nan}, "min_accuracy=nan is no share of images"),
        ({"latency_ms": 1.0, "rate_hz": 0.0}, "rate_hz=0.0 makes no sense"),
        ({"latency_ms": 1.0, "rate_hz": math.nan}, "rate_hz=nan makes no sense"),
        ({"latency_ms": 1.0, "sustained_s": -1.0}, "sustained_s=-1.0 makes no sense"),
        (
            {"latency_ms": 1.0, "sustained_s": math.inf},
            "sustained_s=inf makes no sense",
        ),
    ],
)
def test_limits_without_sense_are_refused(
    given_limits: dict[str, Any], told: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        Constraints(**given_limits)
    assert told in str(caught.value)


LIMITS: dict[str, Any] = {
    "latency_ms": 5.0,
    "size_bytes": 10**6,
    "compressed_bytes": 10**5,
    "peak_memory_mb": 50.0,
    "min_accuracy": 0.8,
    "rate_hz": 30.0,
}
# What each is kept as; the latency of a rate gives way to one that is asked for.
KEPT: dict[str, tuple[str, float]] = {
    "rate_hz": ("latency", 1000 / 30),
    "latency_ms": ("latency", 5.0),
    "size_bytes": ("size", 10**6),
    "compressed_bytes": ("compressed", 10**5),
    "peak_memory_mb": ("memory", 50.0),
    "min_accuracy": ("accuracy", 0.8),
}


@given(st.sets(st.sampled_from(sorted(LIMITS)), min_size=1))
def test_any_combination_of_limits_is_accepted(names: set[str]) -> None:
    asked = Constraints(**{name: LIMITS[name] for name in names})
    assert asked.limits == dict(kept for name, kept in KEPT.items() if name in names)


@pytest.mark.parametrize(
    ("name", "budget_ms"), [("latency_ms", 30.0), ("rate_hz", 1000 / 30)]
)
def test_a_percentile_is_of_any_limited_latency(name: str, budget_ms: float) -> None:
    budget: dict[str, Any] = {name: 30.0}
    asked = Constraints(min_accuracy=0.9, percentile=95, **budget)
    assert asked.budget_ms == budget_ms


def test_a_latency_may_be_all_of_the_time_from_one_run_to_the_next() -> None:
    assert Constraints(latency_ms=1000 / 30, rate_hz=30.0).budget_ms == 1000 / 30


def test_numbers_of_numpy_become_plain_ones_that_a_file_can_hold() -> None:
    asked = Constraints(
        latency_ms=np.float32(2),  # type: ignore[arg-type]
        size_bytes=np.int64(5),  # type: ignore[arg-type]
        percentile=np.int32(95),  # type: ignore[arg-type]
    )
    assert asked == Constraints(latency_ms=2.0, size_bytes=5, percentile=95)
    assert Constraints(**json.loads(json.dumps(asdict(asked)))) == asked


@pytest.mark.parametrize(
    ("given_limits", "told"),
    [
        ({"size_bytes": 1.5}, "size_bytes=1.5 is not a whole number"),
        ({"size_bytes": "much"}, "size_bytes='much' is not a whole number"),
        ({"latency_ms": "fast"}, "latency_ms='fast' is not a number"),
        (
            {"latency_ms": 1.0, "sustained_s": None},
            "sustained_s=None is not a number; give 0 for no load",
        ),
    ],
)
def test_what_is_no_number_is_no_limit(given_limits: dict[str, Any], told: str) -> None:
    with pytest.raises(SpaceError) as caught:
        Constraints(**given_limits)
    assert str(caught.value) == told


def test_any_sensible_limits_go_together() -> None:
    asked = Constraints(
        latency_ms=5.0,
        percentile=95,
        size_bytes=10**6,
        peak_memory_mb=50.0,
        min_accuracy=0.8,
        rate_hz=30.0,
        sustained_s=10.0,
    )
    assert asked.pace == Pace(rate_hz=30.0, sustained_s=10.0)
    assert asked.latency_label == "p95 latency at 30 Hz after 10 s of load"


def test_without_a_rate_or_load_runs_follow_one_another() -> None:
    assert Constraints(latency_ms=1.0).pace is None
    assert Constraints(latency_ms=1.0).latency_label == "latency"


# -- verdicts --------------------------------------------------------------------------


def verdict(constraint: Any, *, limit: float, bound: float) -> Verdict:
    return Verdict(
        constraint=constraint,
        limit=limit,
        found=bound,
        bound=bound,
        evidence="measured",
    )


positive = st.floats(1e-3, 1e6)


@given(positive, positive)
@pytest.mark.parametrize("constraint", ["latency", "size", "memory"])
def test_what_is_to_be_little_is_kept_up_to_its_limit(
    constraint: str, limit: float, bound: float
) -> None:
    found = verdict(constraint, limit=limit, bound=bound)
    assert found.met == (bound <= limit) == (found.used_share <= 1)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_an_accuracy_is_kept_from_its_limit_on(limit: float, bound: float) -> None:
    found = verdict("accuracy", limit=limit, bound=bound)
    assert found.met == (bound >= limit)
    assert found.used_share == pytest.approx((1 - bound) / (1 - limit))


@pytest.mark.parametrize("constraint", ["latency", "size", "memory", "accuracy"])
def test_what_is_not_a_number_keeps_nothing(constraint: str) -> None:
    assert not verdict(constraint, limit=0.5, bound=math.nan).met


def test_the_binding_constraint_leaves_the_least_room() -> None:
    tight = verdict("size", limit=100, bound=99)
    loose = verdict("latency", limit=1.0, bound=0.5)
    assert binding((loose, tight)) is tight
    assert binding((tight, loose)) is tight


# -- judging ---------------------------------------------------------------------------


def of_samples(samples_ms: list[float], *, inner_loops: int = 1) -> Any:
    visit = Visit(
        time_ns=0,
        anchor_before_ns=1,
        anchor_after_ns=1,
        inner_loops=inner_loops,
        samples_ns=tuple(round(ms * 1e6) for ms in samples_ms),
    )
    return replace(fresh(1.0), visits=(visit,))


def test_a_percentile_is_held_to_its_upper_bound() -> None:
    samples_ms = [1 + index / 1000 for index in range(1000)]
    found = judge_latency(of_samples(samples_ms), budget_ms=2.0, percentile=90)
    assert found.found == pytest.approx(1.9, abs=0.002)
    assert 1.9 < found.bound < 1.93


def test_at_a_pace_the_median_of_all_runs_is_held_to_the_budget() -> None:
    # Quiet they would take 1 ms; what slowed them down is what was asked about.
    throttled = of_samples([2.0 + index / 1000 for index in range(200)])
    found = judge_latency(throttled, budget_ms=3.0, paced=True)
    assert found.found == pytest.approx(2.1, abs=0.01)
    assert found.found < found.bound < 2.15
    quiet = judge_latency(throttled, budget_ms=3.0)
    assert quiet.found == 1.0


def test_a_percentile_of_too_few_runs_is_refused() -> None:
    few = of_samples([1.0] * 20)
    with pytest.raises(UnstableMeasurement, match=r"^no p99 is known from 20 samples"):
        judge_latency(few, budget_ms=2.0, percentile=99)


def test_a_percentile_of_runs_timed_in_several_is_refused() -> None:
    averaged = of_samples([1.0] * 2000, inner_loops=4)
    with pytest.raises(UnstableMeasurement, match="too short to be timed one by one"):
        judge_latency(averaged, budget_ms=2.0, percentile=95)


@dataclass(frozen=True)
class Files:
    loaded_bytes: int = 900_000
    compressed_bytes: int = 800_000


def test_every_constraint_gets_its_verdict() -> None:
    asked = Constraints(
        latency_ms=5.0,
        size_bytes=10**6,
        compressed_bytes=700_000,
        peak_memory_mb=50.0,
        min_accuracy=0.8,
    )
    verdicts = judge(
        asked,
        measurement=replace(fresh(4.0), memory_mb=60.0),
        files=Files(),
        accuracy=CLAIM,
    )
    met = {found.constraint: found.met for found in verdicts}
    assert met == {
        "latency": True,
        "size": True,
        "compressed": False,
        "memory": False,
        "accuracy": True,
    }
    evidence = {found.constraint: found.evidence for found in verdicts}
    assert evidence["accuracy"] == "predicted"


def test_a_memory_that_nobody_counts_is_refused() -> None:
    asked = Constraints(latency_ms=5.0, peak_memory_mb=50.0)
    with pytest.raises(DeviceUnfit, match="leave that limit out"):
        judge(
            asked,
            measurement=replace(fresh(4.0), memory_mb=None),
            files=Files(),
            accuracy=CLAIM,
        )


# -- enough runs -----------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [90, 95, 99])
@pytest.mark.parametrize("processes", [1, 3, 5])
@pytest.mark.parametrize("rate_hz", [None, 30.0])
def test_runs_are_raised_to_what_a_percentile_needs(
    percentile: int, processes: int, rate_hz: float | None
) -> None:
    asked = Constraints(latency_ms=1.0, percentile=percentile, rate_hz=rate_hz)
    few = replace(MeasureSettings.screen(), visits=2, runs_per_visit=3)
    raised = enough_runs(few, asked, processes=processes)
    total = raised.visits * raised.runs_per_visit * processes
    assert total >= 2 * percentile_floor(percentile)


def test_enough_runs_stay_as_they_are() -> None:
    settings = MeasureSettings.certify()
    asked = Constraints(latency_ms=1.0, percentile=99)
    assert enough_runs(settings, asked, processes=5) == settings


@pytest.mark.parametrize("percentile", [90, 95, 99])
def test_a_percentile_that_would_take_days_is_refused_with_the_least_rate(
    percentile: int,
) -> None:
    with pytest.raises(SpaceError, match=r"a rate of at least [\d.]+ Hz$") as caught:
        require_time_for(Constraints(percentile=percentile, rate_hz=0.001))
    least_hz = float(str(caught.value).split()[-2])
    allowed = Constraints(percentile=percentile, rate_hz=least_hz)
    require_time_for(allowed)
    settings = enough_runs(MeasureSettings.certify(), allowed, processes=5)
    # All planned visits, each with a run that is not timed, have the time they take.
    made = settings.visits * (settings.runs_per_visit + 1)
    assert settings.max_seconds >= made / least_hz
    require_time_for(Constraints(rate_hz=0.001))  # a median needs few
    require_time_for(Constraints(latency_ms=1.0, percentile=percentile))


def test_a_slow_pace_gets_the_time_that_it_takes() -> None:
    asked = Constraints(latency_ms=100.0, rate_hz=0.1)
    settings = enough_runs(MeasureSettings.certify(), asked, processes=5)
    runs = settings.visits * settings.runs_per_visit
    assert runs <= 25
    assert settings.max_seconds >= 2 * runs / 0.1
