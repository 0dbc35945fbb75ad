from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profilers.memory import MemoryGauge
from profilers.pace import MAX_RATE_HZ, Pace, Pacer
from profilers.process import package_environment
from profilers.stats import percentile_floor, percentile_ms, percentile_upper_ms


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, math.nan, math.inf, MAX_RATE_HZ * 2])
def test_a_rate_without_sense_is_refused(rate_hz: float) -> None:
    with pytest.raises(ValueError, match=r"^rate_hz="):
        Pace(rate_hz=rate_hz)


@pytest.mark.parametrize("sustained_s", [-1.0, math.nan, math.inf])
def test_a_load_without_sense_is_refused(sustained_s: float) -> None:
    with pytest.raises(ValueError, match=r"^sustained_s="):
        Pace(sustained_s=sustained_s)


class Application:
    """Runs at a pace on a clock that is made up; tells when each run began."""

    def __init__(self, rate_hz: float | None, *, run_s: float) -> None:
        self._now_ns = 1_000
        self._run_ns = round(run_s * 1e9)
        self._pacer = Pacer(
            Pace(rate_hz=rate_hz), clock=lambda: self._now_ns, sleep=self._sleep
        )

    def _sleep(self, seconds: float) -> None:
        self._now_ns += math.ceil(seconds * 1e9)

    def pause(self, seconds: float) -> None:
        """Do something else."""
        self._now_ns += round(seconds * 1e9)

    def begin_times_s(self, count: int) -> list[float]:
        """Of that many runs."""
        begun = []
        for _ in range(count):
            self._pacer.wait()
            begun.append(self._now_ns / 1e9)
            self._now_ns += self._run_ns
        return begun


def test_runs_begin_a_period_apart() -> None:
    times_s = Application(50.0, run_s=0.003).begin_times_s(20)
    assert np.diff(times_s) == pytest.approx(0.02, abs=1e-6)


def test_runs_that_take_longer_than_a_period_follow_one_another() -> None:
    times_s = Application(50.0, run_s=0.03).begin_times_s(20)
    assert np.diff(times_s) == pytest.approx(0.03, abs=1e-6)


def test_without_a_rate_nothing_is_waited_for() -> None:
    times_s = Application(None, run_s=0.001).begin_times_s(20)
    assert np.diff(times_s) == pytest.approx(0.001, abs=1e-9)


@given(st.floats(1, 1000), st.floats(1e-5, 0.1))
def test_no_run_begins_before_its_period_is_over(rate_hz: float, run_s: float) -> None:
    times_s = Application(rate_hz, run_s=run_s).begin_times_s(6)
    assert all(b - a >= 1 / rate_hz - 1e-6 for a, b in pairwise(times_s))


def test_after_a_long_break_runs_do_not_catch_up() -> None:
    application = Application(50.0, run_s=0.003)
    application.begin_times_s(3)
    application.pause(0.105)
    times_s = application.begin_times_s(4)
    assert np.diff(times_s) == pytest.approx(0.02, abs=1e-6)


# -- percentiles -----------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [90.0, 95.0, 99.0])
def test_the_upper_bound_of_a_percentile_is_above_it_as_often_as_it_says(
    percentile: float,
) -> None:
    rng = np.random.default_rng(0)
    true_ms = float(np.exp(0.1 * _normal_quantile(percentile / 100)))
    above = 0
    for _ in range(400):
        samples_ns = (1e6 * np.exp(0.1 * rng.standard_normal(700))).astype(int)
        upper_ms = percentile_upper_ms(samples_ns.tolist(), percentile)
        assert upper_ms is not None
        above += upper_ms >= true_ms
    assert 0.93 <= above / 400 <= 0.985


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 95.0, 99.0])
def test_an_upper_bound_is_a_sample_at_or_above_the_percentile(
    percentile: float,
) -> None:
    samples_ns = list(range(1_000_000, 1_003_500))
    upper_ms = percentile_upper_ms(samples_ns, percentile)
    found_ms = percentile_ms(samples_ns, percentile)
    assert upper_ms is not None
    assert found_ms is not None
    assert found_ms < upper_ms
    assert round(upper_ms * 1e6) in samples_ns


@pytest.mark.parametrize("percentile", [90.0, 95.0, 99.0])
def test_too_few_samples_have_no_upper_bound(percentile: float) -> None:
    few = [1_000_000] * (percentile_floor(percentile) - 1)
    assert percentile_upper_ms(few, percentile) is None


@pytest.mark.parametrize("percentile", [90.0, 95.0, 99.0])
def test_the_floor_of_a_percentile_is_enough_for_its_upper_bound(
    percentile: float,
) -> None:
    enough = [1_000_000] * percentile_floor(percentile)
    assert percentile_upper_ms(enough, percentile) == 1.0


# -- memory ----------------------------------------------------------------------------


def grown_mb(statement: str) -> float:
    """What a new process grew by; this one may have memory to spare."""
    code = (
        "import numpy as np\nfrom profilers.memory import MemoryGauge\n"
        f"gauge = MemoryGauge()\n{statement}\nprint(gauge.peak_growth_mb())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=package_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    if done.stdout.strip() == "None":
        pytest.skip("this system does not tell how much memory a process takes")
    return float(done.stdout)


def test_memory_that_is_taken_is_counted() -> None:
    assert 45 <= grown_mb("block = np.ones(50_000_000, dtype=np.uint8)") <= 80


def test_memory_that_was_given_back_is_counted_too() -> None:
    assert 45 <= grown_mb("np.ones(50_000_000, dtype=np.uint8)") <= 80


def test_a_process_that_takes_none_has_not_grown() -> None:
    assert grown_mb("pass") < 5


def test_a_system_that_does_not_tell_of_memory_gives_none(tmp_path: Path) -> None:
    assert MemoryGauge(tmp_path).peak_growth_mb() is None
    (tmp_path / "status").write_text("VmRSS:\tmuch\n")
    assert MemoryGauge(tmp_path).peak_growth_mb() is None


def test_the_kernel_counts_in_kibibytes(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmRSS:\t 1000 kB\nVmHWM:\t 3000 kB\n")
    assert MemoryGauge(tmp_path).peak_growth_mb() == 2000 * 1024 / 1e6
