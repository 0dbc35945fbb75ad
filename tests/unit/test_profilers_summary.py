"""What drift makes of visits: which count, which models are visited again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from profilers.measurement import MeasureSettings, Visit
from profilers.summary import (
    MIN_DRIFT_MODELS,
    WINDOW_VISITS,
    fit_visits,
    need_visits,
    summarize,
    summarize_drift,
)

MODELS = WINDOW_VISITS
PASSES = 6
ANCHOR_NS = 200_000
SETTINGS = replace(MeasureSettings.screen(), visits=PASSES)
NAMES = [f"net{number}" for number in range(MODELS)]


def visits(slow_passes: dict[int, float], *, models: int = MODELS) -> list[list[Visit]]:
    """Each pass over all models is a window; some are slower, the anchor never."""
    rng = np.random.default_rng(0)
    return [
        [
            Visit(
                time_ns=number * 1_000_000 + model,
                anchor_before_ns=ANCHOR_NS,
                anchor_after_ns=ANCHOR_NS,
                inner_loops=1,
                samples_ns=(
                    round(
                        (1 + model)
                        * 1e6
                        * slow_passes.get(number, 1.0)
                        * np.exp(rng.normal(0, 0.002))
                    ),
                ),
            )
            for number in range(PASSES)
        ]
        for model in range(models)
    ]


def test_a_devices_own_times_follow_its_drift_and_not_the_hosts_anchor() -> None:
    rng = np.random.default_rng(1)

    def on_device(visit: Visit) -> Visit:
        busy_ns = round(ANCHOR_NS * rng.uniform(1, 1.3))
        return replace(visit, anchor_before_ns=busy_ns, device_timed=True)

    still = visits({2: 1.03})
    moved = [[on_device(visit) for visit in of_model] for of_model in still]
    fit = fit_visits(moved, beta=1.0)
    assert fit.beta == 0
    for name in ("effect_log", "standard_error_log", "drift_log"):
        assert getattr(fit, name) == pytest.approx(getattr(fit_visits(still), name))
    verdicts = {m.stability.verdict for m in summarize(NAMES, moved, fit, SETTINGS)}
    assert verdicts == {"stable"}


def test_only_the_runs_that_the_host_had_to_launch_are_brought_to_its_level() -> None:
    """Half of the models fell back, and the host is slow in half of the passes."""
    slow = dict.fromkeys(range(0, PASSES, 2), 1.2)
    found = []
    for number, (felt, still) in enumerate(
        zip(visits(slow, models=8), visits({}, models=8), strict=True)
    ):
        fell_back = number % 2 == 0
        found.append(
            [
                replace(
                    visit,
                    anchor_before_ns=round(slow.get(turn, 1) * ANCHOR_NS),
                    anchor_after_ns=round(slow.get(turn, 1) * ANCHOR_NS),
                    device_timed=True,
                    fallback="no graph" if fell_back else None,
                )
                for turn, visit in enumerate(felt if fell_back else still)
            ]
        )
    fit = fit_visits(found)
    assert fit.beta == pytest.approx(1, abs=0.02)
    latencies_ms = np.exp(fit.effect_log) / 1e6
    assert latencies_ms == pytest.approx(np.arange(1, 9), rel=0.01)


def test_a_quiet_run_has_no_drift_and_needs_nothing() -> None:
    found = visits({})
    fit = fit_visits(found)
    drift = summarize_drift(fit)
    assert drift.window_count == PASSES
    assert drift.flagged_count == drift.discarded_count == 0
    assert need_visits(found, fit, SETTINGS) == []
    entries = summarize(NAMES, found, fit, SETTINGS)
    assert {entry.stability.verdict for entry in entries} == {"stable"}


def test_a_window_slower_by_three_percent_is_flagged_and_counts() -> None:
    found = visits({2: 1.03})
    fit = fit_visits(found)
    drift = summarize_drift(fit)
    assert (drift.flagged_count, drift.discarded_count) == (1, 0)
    assert drift.largest_ratio == pytest.approx(0.025, abs=0.003)
    assert need_visits(found, fit, SETTINGS) == []


def test_the_models_of_a_window_slower_by_a_tenth_are_visited_again() -> None:
    found = visits({2: 1.10})
    fit = fit_visits(found)
    drift = summarize_drift(fit)
    assert (drift.flagged_count, drift.discarded_count) == (1, 1)
    assert sorted(need_visits(found, fit, SETTINGS)) == list(range(MODELS))
    (first, *_) = summarize(NAMES, found, fit, SETTINGS)
    assert first.quiet_ms == pytest.approx(1.0, rel=0.005)
    assert first.stability.reasons == (
        f"only {PASSES - 1} of {PASSES} visits count: the machine had drifted too far "
        "during the others",
    )


def test_visits_made_in_their_place_settle_it() -> None:
    found = [
        [*of_model, replace(of_model[0], session=1, time_ns=number)]
        for number, of_model in enumerate(visits({2: 1.10}))
    ]
    fit = fit_visits(found)
    assert need_visits(found, fit, SETTINGS) == []
    entries = summarize(NAMES, found, fit, SETTINGS)
    assert {entry.stability.verdict for entry in entries} == {"stable"}


def test_a_few_models_cannot_tell_of_drift() -> None:
    fit = fit_visits(visits({2: 1.10}, models=MIN_DRIFT_MODELS - 1))
    assert fit.drift_log.tolist() == [0.0]
    assert summarize_drift(fit).window_count == 1


def test_sessions_are_windows_of_their_own() -> None:
    found = [
        [replace(visit, session=number) for number, visit in enumerate(of_model)]
        for of_model in visits({2: 1.03})
    ]
    assert fit_visits(found).drift_log == pytest.approx(
        fit_visits(visits({2: 1.03})).drift_log
    )
