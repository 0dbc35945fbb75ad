from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import pytest
from numpy.typing import NDArray

import profilers.measure as measuring
from profilers.anchor import PRODUCTS_PER_READING, MatrixAnchor
from profilers.backends.fake import FakeAnchor, FakeBackend, FakeClock, FakeDevice
from profilers.codec import decode_settings, encode_flat
from profilers.errors import DeviceUnfit, MeasurementError
from profilers.json_reader import JsonNode
from profilers.measure import WARMUP_S, measure_models
from profilers.measurement import (
    NO_TARGET,
    MeasurementRun,
    MeasureSettings,
    ModelUnderTest,
    Stability,
    Visit,
)
from profilers.pace import Pace, Pacer

Floats = NDArray[np.float32]
SETTINGS = MeasureSettings.screen()


def slow_three_quarters(now_ns: int) -> float:
    """Phases of 0.2 s and 0.6 s, as a shared machine has them."""
    return 1.0 if now_ns % 800_000_000 < 200_000_000 else 1.4


def steady(now_ns: int) -> float:
    return 1.0


def latency_ns(model: object) -> int:
    return 20_000 + 40_000 * int(str(model, "ascii") if isinstance(model, bytes) else 0)


def models(count: int) -> list[ModelUnderTest]:
    return [
        ModelUnderTest(name=f"net{index}", model=str(index).encode())
        for index in range(count)
    ]


def measure(
    count: int = 20,
    *,
    settings: MeasureSettings = SETTINGS,
    seed: int = 0,
    noise: float = 0.0,
) -> MeasurementRun:
    clock = FakeClock()
    noise_rng = np.random.default_rng(1)

    def phases(now_ns: int) -> float:
        return slow_three_quarters(now_ns) * float(
            np.exp(noise * noise_rng.standard_normal())
        )

    return measure_models(
        models(count),
        backend=FakeBackend(clock, latency_ns=latency_ns, phases=phases),
        threads=1,
        settings=settings,
        clock=clock,
        anchor=FakeAnchor(clock, phases=slow_three_quarters),
        rng=np.random.default_rng(seed),
    )


def test_quiet_latencies_are_found_on_a_machine_that_is_mostly_slow() -> None:
    run = measure()
    for index, measurement in enumerate(run.measurements):
        true_ms = latency_ns(str(index).encode()) / 1e6
        assert measurement.quiet_ms == pytest.approx(true_ms, rel=0.02)
    true_ns = [latency_ns(str(index).encode()) for index in range(20)]
    plain = [
        m.median_ms * 1e6 / true - 1
        for m, true in zip(run.measurements, true_ns, strict=True)
    ]
    assert median(plain) > 0.1
    assert run.beta == pytest.approx(1.0, abs=0.05)
    assert run.anchor_reference_ns == pytest.approx(250_000, rel=0.01)


def test_measurements_come_in_the_order_of_the_models() -> None:
    names = [measurement.name for measurement in measure(seed=3).measurements]
    assert names == [f"net{index}" for index in range(20)]


def test_the_same_seed_gives_the_same_samples() -> None:
    assert measure(seed=5).measurements == measure(seed=5).measurements
    assert measure(seed=5).measurements != measure(seed=6).measurements


def first_sample_ratio(settings: MeasureSettings) -> float:
    """Of a model that takes four times as long at first: first sample over quiet."""
    clock = FakeClock()

    def warming(now_ns: int) -> float:
        return 1.0 + 3.0 * float(np.exp(-now_ns / 10_000_000))

    run = measure_models(
        models(2)[1:],
        backend=FakeBackend(clock, latency_ns=latency_ns, phases=warming),
        threads=1,
        settings=settings,
        clock=clock,
        anchor=FakeAnchor(clock),
        rng=np.random.default_rng(0),
    )
    (measurement,) = run.measurements
    return measurement.samples_ns[0] / latency_ns(b"1")


def test_the_warm_up_lasts_until_the_model_is_steady() -> None:
    patient = MeasureSettings.certify()
    assert first_sample_ratio(patient) < 1.1
    assert first_sample_ratio(replace(patient, warmup_windows=1)) > 1.5


def test_the_warm_up_of_a_model_that_never_settles_ends() -> None:
    assert measure(2, settings=MeasureSettings.certify(), noise=0.5).measurements


def test_slow_models_are_not_run_for_minutes_just_to_be_warm() -> None:
    clock, rng = FakeClock(), np.random.default_rng(1)

    def never_settles(now_ns: int) -> float:
        return float(np.exp(0.5 * rng.standard_normal()))

    run = measure_models(
        models(1),
        backend=FakeBackend(
            clock, latency_ns=lambda _: 2_000_000_000, phases=never_settles
        ),
        threads=1,
        settings=replace(MeasureSettings.certify(), max_seconds=1.0),
        clock=clock,
        anchor=FakeAnchor(clock),
        rng=np.random.default_rng(0),
    )
    (measurement,) = run.measurements
    timed_s = sum(measurement.samples_ns) / 1e9
    assert clock() / 1e9 - timed_s < WARMUP_S + 15


def test_a_sample_of_a_short_model_is_a_mean_long_enough_for_the_timer() -> None:
    clock = FakeClock()
    run = measure_models(
        models(4),
        backend=FakeBackend(clock, latency_ns=latency_ns),
        threads=1,
        settings=SETTINGS,
        clock=clock,
        anchor=FakeAnchor(clock),
        rng=np.random.default_rng(0),
    )
    # 20, 60, 100 and 140 µs; the least sample is 50 µs.
    loops = [m.visits[0].inner_loops for m in run.measurements]
    assert loops == [3, 1, 1, 1]
    assert {sample for m in run.measurements for sample in m.samples_ns} == {
        20_000,
        60_000,
        100_000,
        140_000,
    }


def measure_paced(
    pace: Pace | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[MeasurementRun, FakeClock]:
    """A model of 20 µs, by an application that sleeps on the same clock."""
    clock = FakeClock()

    def sleep(seconds: float) -> None:
        clock.advance(math.ceil(seconds * 1e9))

    monkeypatch.setattr(measuring, "Pacer", partial(Pacer, sleep=sleep))
    run = measure_models(
        models(1),
        backend=FakeBackend(clock, latency_ns=latency_ns),
        threads=1,
        settings=replace(SETTINGS, target_relative_error=NO_TARGET),
        clock=clock,
        anchor=FakeAnchor(clock),
        rng=np.random.default_rng(0),
        pace=pace,
    )
    return run, clock


def test_at_a_rate_every_run_is_timed_by_itself_and_takes_a_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once, _ = measure_paced(None, monkeypatch)
    paced, _ = measure_paced(Pace(rate_hz=100.0), monkeypatch)
    assert {visit.inner_loops for visit in at_once.measurements[0].visits} == {3}
    visits = paced.measurements[0].visits
    assert {visit.inner_loops for visit in visits} == {1}
    assert {len(visit.samples_ns) for visit in visits} == {SETTINGS.runs_per_visit}
    # All but the first run wait for their turn, the one that warms up the caches at the
    # begin of each visit, too; what is between them takes less than a period.
    run_count = SETTINGS.visits * (SETTINGS.runs_per_visit + 1)
    assert paced.duration_s - at_once.duration_s == pytest.approx(
        run_count * 0.01, rel=0.03
    )


def test_load_comes_before_the_first_timed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    without, _ = measure_paced(None, monkeypatch)
    loaded, _ = measure_paced(Pace(sustained_s=0.5), monkeypatch)
    assert loaded.duration_s - without.duration_s == pytest.approx(0.5, abs=1e-3)
    assert loaded.measurements == without.measurements


def measure_on_device(device: FakeDevice) -> MeasurementRun:
    clock = FakeClock()
    return measure_models(
        models(2),
        backend=FakeBackend(clock, latency_ns=latency_ns, device=device),
        threads=1,
        settings=SETTINGS,
        clock=clock,
        anchor=FakeAnchor(clock),
        rng=np.random.default_rng(0),
    )


def test_a_device_that_times_itself_is_believed_over_the_hosts_clock() -> None:
    run = measure_on_device(FakeDevice(waiting_ns=30_000))
    # 20 and 60 µs, and 30 µs more by the host; the least sample is 50 µs.
    assert [m.median_ms for m in run.measurements] == [0.02, 0.06]
    assert [m.visits[0].inner_loops for m in run.measurements] == [3, 1]
    assert all(m.stability.verdict == "stable" for m in run.measurements)


def test_what_slows_the_host_is_nothing_to_a_device_that_times_itself() -> None:
    clock = FakeClock()
    run = measure_models(
        models(2),
        backend=FakeBackend(clock, latency_ns=latency_ns, device=FakeDevice()),
        threads=1,
        settings=SETTINGS,
        clock=clock,
        anchor=JumpingAnchor(),
        rng=np.random.default_rng(0),
        beta=1.0,
        anchor_reference_ns=1_000,
    )
    assert run.beta == 0
    for measurement, expected_ms in zip(run.measurements, (0.02, 0.06), strict=True):
        assert measurement.quiet_ms == pytest.approx(expected_ms, rel=1e-9)
        assert measurement.stability.verdict == "stable"
        assert len(measurement.visits) == SETTINGS.visits


def test_another_way_of_running_is_kept_and_makes_the_figure_unstable() -> None:
    run = measure_on_device(FakeDevice(fallback="no graph"))
    for measurement in run.measurements:
        assert {visit.fallback for visit in measurement.visits} == {"no graph"}
        assert measurement.stability == Stability(
            verdict="unstable",
            reasons=(
                f"{SETTINGS.visits} of {SETTINGS.visits} visits ran in another way "
                "than the runtime's fastest: no graph",
            ),
        )


def test_every_model_gets_its_planned_visits_far_apart() -> None:
    run = measure()
    for measurement in run.measurements:
        assert len(measurement.visits) >= SETTINGS.visits
        assert all(
            len(visit.samples_ns) == SETTINGS.runs_per_visit
            for visit in measurement.visits
        )
    # Between two visits of a model of a pass and the next but one lies a whole pass.
    first = run.measurements[0].visits
    others = run.measurements[1].visits
    for earlier, later in zip(first, first[2:], strict=False):
        assert any(earlier.time_ns < other.time_ns < later.time_ns for other in others)


def test_extra_visits_stop_at_the_bound_and_the_rest_is_called_unstable() -> None:
    settings = replace(SETTINGS, visits=3, target_relative_error=1e-6)
    run = measure(4, settings=settings, noise=0.3)
    for measurement in run.measurements:
        assert len(measurement.visits) == 4 * settings.visits
        assert measurement.stability.verdict == "unstable"
        assert "above the target" in measurement.stability.reasons[0]


def test_extra_visits_go_to_the_imprecise_models_until_they_are_precise() -> None:
    settings = replace(SETTINGS, visits=4, target_relative_error=0.02)
    run = measure(8, settings=settings, noise=0.15)
    assert any(len(m.visits) > settings.visits for m in run.measurements)
    for measurement in run.measurements:
        assert measurement.standard_error_ratio <= settings.target_relative_error
        assert measurement.stability == Stability(verdict="stable")


def test_measuring_ends_on_time_with_two_visits_of_each_model() -> None:
    run = measure(settings=replace(SETTINGS, max_seconds=1e-6))
    for measurement in run.measurements:
        assert len(measurement.visits) == 2
        reasons = measurement.stability.reasons
        assert any("only 2 of 18 planned visits" in reason for reason in reasons)


class JumpingAnchor:
    """Every other reading is a half longer: no visit is without a change."""

    def __init__(self) -> None:
        self.count = 0

    def measure_ns(self) -> int:
        self.count += 1
        return 1_000 + 500 * (self.count % 2)


def measure_disturbed(settings: MeasureSettings) -> MeasurementRun:
    """Two models, no visit of which is without a change of the machine's speed."""
    clock = FakeClock()
    return measure_models(
        models(2),
        backend=FakeBackend(clock, latency_ns=latency_ns),
        threads=1,
        settings=settings,
        clock=clock,
        anchor=JumpingAnchor(),
        rng=np.random.default_rng(0),
    )


def test_models_whose_visits_were_disturbed_get_more_and_are_told_of() -> None:
    settings = replace(SETTINGS, visits=3, target_relative_error=10.0)
    run = measure_disturbed(settings)
    for measurement in run.measurements:
        assert all(visit.disturbed for visit in measurement.visits)
        assert len(measurement.visits) == 4 * settings.visits
        assert measurement.stability.reasons == (
            "the machine changed its speed during 12 of 12 visits",
        )


def test_where_nothing_is_to_be_reached_the_planned_visits_are_all() -> None:
    run = measure_disturbed(
        replace(SETTINGS, visits=3, target_relative_error=NO_TARGET)
    )
    assert [len(found.visits) for found in run.measurements] == [3, 3]


def test_a_known_anchor_level_corrects_a_run_that_was_slow_all_along() -> None:
    clock = FakeClock()

    def slow(now_ns: int) -> float:
        return 1.4

    run = measure_models(
        models(2),
        backend=FakeBackend(clock, latency_ns=latency_ns, phases=slow),
        threads=1,
        settings=SETTINGS,
        clock=clock,
        anchor=FakeAnchor(clock, phases=slow),
        rng=np.random.default_rng(0),
        beta=1.0,
        anchor_reference_ns=250_000,
    )
    assert run.measurements[0].quiet_ms == pytest.approx(0.02, rel=1e-3)
    assert run.measurements[0].median_ms == pytest.approx(0.028)


def test_progress_counts_every_visit_and_ends_at_the_total() -> None:
    clock = FakeClock()
    seen: list[tuple[int, int]] = []
    measure_models(
        models(3),
        backend=FakeBackend(clock, latency_ns=latency_ns),
        threads=1,
        settings=SETTINGS,
        clock=clock,
        anchor=FakeAnchor(clock),
        progress=lambda done, total: seen.append((done, total)),
        rng=np.random.default_rng(0),
    )
    assert [done for done, _ in seen] == list(range(1, 3 * SETTINGS.visits + 1))
    assert seen[-1] == (3 * SETTINGS.visits, 3 * SETTINGS.visits)


def test_a_model_that_takes_no_time_is_refused() -> None:
    clock = FakeClock()
    with pytest.raises(MeasurementError, match="takes 0 ns by this clock"):
        measure_models(
            models(1),
            backend=FakeBackend(clock, latency_ns=lambda model: 0),
            threads=1,
            settings=SETTINGS,
            clock=clock,
            anchor=FakeAnchor(clock),
            rng=np.random.default_rng(0),
        )


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(DeviceUnfit, match="threads=4096; this process can use"):
        measure_models(
            models(1),
            backend=FakeBackend(FakeClock(), latency_ns=latency_ns),
            threads=4096,
            settings=SETTINGS,
            rng=np.random.default_rng(0),
        )


@pytest.mark.parametrize(
    "names", [pytest.param([], id="none"), pytest.param(["a", "a"], id="twice")]
)
def test_models_need_names_of_their_own(names: list[str]) -> None:
    with pytest.raises(ValueError, match="each its own name"):
        measure_models(
            [ModelUnderTest(name=name, model=b"0") for name in names],
            backend=FakeBackend(FakeClock(), latency_ns=latency_ns),
            threads=1,
            settings=SETTINGS,
            rng=np.random.default_rng(0),
        )


def test_the_anchor_reads_the_median_of_its_bursts() -> None:
    # Bursts of 1, 100 and 3 ns: two clock readings each.
    times = iter([0, 1, 10, 110, 200, 203])
    assert MatrixAnchor(repeats=3, clock=lambda: next(times)).measure_ns() == 3


def test_a_burst_is_of_many_products_each_too_small_for_several_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, ...]] = []
    multiply = np.dot

    def counted(left: Floats, right: Floats, *, out: Floats) -> Floats:
        sizes.append((*left.shape, right.shape[1]))
        return multiply(left, right, out=out)

    monkeypatch.setattr(np, "dot", counted)
    MatrixAnchor(repeats=2).measure_ns()
    assert len(sizes) == 2 * PRODUCTS_PER_READING
    # Above 64**3 multiplications numpy's library may use all cores.
    assert all(math.prod(size) < 64**3 for size in sizes)
    # The work of one product of 256 by 256, which takes about a quarter of a ms.
    work = PRODUCTS_PER_READING * math.prod(sizes[0])
    assert 0.5 < work / 256**3 < 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("visits", 1),
        ("runs_per_visit", 0),
        ("warmup_runs", 0),
        ("warmup_windows", 0),
        ("anchor_repeats", 0),
        ("seed", -1),
        ("target_relative_error", 0.0),
        ("max_seconds", float("inf")),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    given = {name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}
    with pytest.raises(ValueError, match=f"{field}={value}"):
        MeasureSettings(**{**given, field: value})


def test_settings_are_read_back_as_they_were_given() -> None:
    """Digests are of their digits: 10 and 10.0 are two."""
    given = replace(SETTINGS, max_seconds=10, pass_seconds=1)
    kept = json.dumps(encode_flat(given))
    assert decode_settings(JsonNode(json.loads(kept), "")) == given
    again = encode_flat(decode_settings(JsonNode(json.loads(kept), "")))
    assert json.dumps(again) == kept


def test_certified_runs_are_enough_for_a_99th_percentile() -> None:
    settings = MeasureSettings.certify()
    assert settings.visits * settings.runs_per_visit >= 662


def test_a_visit_without_a_positive_sample_is_refused() -> None:
    for samples_ns in ((), (5, 0)):
        with pytest.raises(ValueError, match="samples_ns"):
            Visit(
                time_ns=0,
                anchor_before_ns=1,
                anchor_after_ns=1,
                inner_loops=1,
                samples_ns=samples_ns,
            )


def test_unstable_needs_a_reason_and_stable_has_none() -> None:
    with pytest.raises(ValueError, match="0 reasons"):
        Stability(verdict="unstable")
    with pytest.raises(ValueError, match="1 reasons"):
        Stability(verdict="stable", reasons=("noise",))
