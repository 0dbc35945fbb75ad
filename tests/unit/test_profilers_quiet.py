"""Drift: what slows all models of a window, and the anchor does not see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from profilers.quiet import MAX_DRIFT_LOG, QuietStateFit, quiet_state

GROUP_SIZE = 30
PASSES = 9
ROUNDS = 2
NOISE = 0.02
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Visits of models in groups, each group in a window of its own, twice."""

    effect_log: Floats
    drift_log: Floats
    log_latency: Floats
    log_anchor: Floats
    model_index: NDArray[np.intp]
    window_index: NDArray[np.intp]

    def fit(
        self, order: NDArray[np.intp] | None = None, *, windows: bool = True
    ) -> QuietStateFit:
        kept = slice(None) if order is None else order
        return quiet_state(
            self.log_latency[kept],
            self.log_anchor[kept],
            self.model_index[kept],
            model_count=self.effect_log.size,
            window_index=self.window_index[kept] if windows else None,
        )


def simulate(
    seed: int, *, groups: int = 3, drift: float = 0.02, slowdown: float = 0.1
) -> Run:
    rng = np.random.default_rng(seed)
    count = groups * GROUP_SIZE
    models, windows = [], []
    for number in range(ROUNDS):
        for group, part in enumerate(np.split(rng.permutation(count), groups)):
            models += [rng.permutation(part) for _ in range(PASSES)]
            windows += [np.full(PASSES * GROUP_SIZE, number * groups + group)]
    model, window = np.concatenate(models), np.concatenate(windows)
    effect = rng.uniform(np.log(1e6), np.log(1e7), count)
    drifts = np.clip(rng.normal(0, drift, groups * ROUNDS), -0.045, 0.045)
    drifts -= drifts.mean()
    slow = rng.uniform(0, slowdown, groups * ROUNDS)
    # Readings of the anchor scatter by themselves; the models do not share that.
    jitter = rng.normal(0, 0.03, model.size)
    return Run(
        effect_log=effect,
        drift_log=drifts,
        log_latency=(
            effect[model] + (slow + drifts)[window] + rng.normal(0, NOISE, model.size)
        ),
        log_anchor=12.0 + slow[window] + jitter,
        model_index=model,
        window_index=window,
    )


def scatter(fit: QuietStateFit, run: Run) -> float:
    """Standard deviation of the errors between models; their level is common."""
    return float((fit.effect_log - run.effect_log).std())


@pytest.mark.parametrize("seed", range(5))
def test_models_visited_at_different_times_compare_as_if_visited_together(
    seed: int,
) -> None:
    run = simulate(seed)
    together = NOISE / np.sqrt(ROUNDS * PASSES)
    assert scatter(run.fit(), run) < 1.3 * together
    assert scatter(run.fit(windows=False), run) > scatter(run.fit(), run)


@pytest.mark.parametrize("seed", range(5))
def test_the_drift_of_every_window_is_found(seed: int) -> None:
    run = simulate(seed, slowdown=0.0)
    assert run.fit().drift_log == pytest.approx(run.drift_log, abs=0.01)


def test_the_standard_error_is_about_the_error_made() -> None:
    ratios = []
    for seed in range(20):
        run = simulate(seed)
        fit = run.fit()
        offset = fit.effect_log - run.effect_log
        ratios.append((offset - offset.mean()) / fit.standard_error_log)
    assert np.std(ratios) == pytest.approx(1.0, abs=0.2)


@given(seed=st.integers(0, 2**16))
def test_neither_the_order_of_visits_nor_the_numbers_of_windows_matter(
    seed: int,
) -> None:
    run, rng = simulate(7), np.random.default_rng(seed)
    order = rng.permutation(run.log_latency.size)
    names = rng.permutation(run.drift_log.size)
    fit = run.fit()
    shuffled = quiet_state(
        run.log_latency[order],
        run.log_anchor[order],
        run.model_index[order],
        model_count=run.effect_log.size,
        window_index=names[run.window_index[order]],
    )
    np.testing.assert_allclose(shuffled.effect_log, fit.effect_log, atol=1e-4)
    np.testing.assert_allclose(shuffled.drift_log[names], fit.drift_log, atol=1e-4)


def test_a_window_that_drifted_far_counts_for_no_model() -> None:
    run = simulate(3)
    far = run.window_index == 1
    spoilt = run.log_latency + far * 3 * MAX_DRIFT_LOG
    # Its models do not even slow down alike.
    spoilt += far * (run.model_index % 2) * 0.1
    fit = quiet_state(
        spoilt,
        run.log_anchor,
        run.model_index,
        model_count=run.effect_log.size,
        window_index=run.window_index,
    )
    assert not fit.counted[far].any()
    assert fit.counted[~far].all()
    assert scatter(fit, run) < 2 * NOISE / np.sqrt(PASSES)


def test_of_two_states_the_commoner_one_counts() -> None:
    run = simulate(3, groups=5, drift=0.0, slowdown=0.0)
    rare = run.window_index >= 7
    fit = quiet_state(
        run.log_latency + rare * 3 * MAX_DRIFT_LOG,
        run.log_anchor,
        run.model_index,
        model_count=run.effect_log.size,
        window_index=run.window_index,
    )
    assert fit.discarded.tolist() == [False] * 7 + [True] * 3
    assert np.abs(fit.effect_log - run.fit().effect_log).mean() < 0.01


def test_a_model_that_has_no_steady_window_keeps_its_visits() -> None:
    run = simulate(3, groups=1)
    alone = np.full(5, run.effect_log.size)
    fit = quiet_state(
        np.concatenate([run.log_latency, np.full(5, 15.0)]),
        np.concatenate([run.log_anchor, np.full(5, 13.0)]),
        np.concatenate([run.model_index, alone]),
        model_count=run.effect_log.size + 1,
        window_index=np.concatenate([run.window_index, np.full(5, 2)]),
    )
    assert fit.counted[-5:].all()
    assert np.isfinite(fit.effect_log).all()


def test_slow_phases_tell_beta_and_the_jitter_of_readings_does_not() -> None:
    # A machine that is slow for minutes, by as much as its anchor: beta is 1.
    run = simulate(0, groups=20, drift=0.01, slowdown=0.4)
    assert run.fit().beta == pytest.approx(1.0, abs=0.1)
    assert run.fit(windows=False).beta < 0.95


def test_windows_must_be_numbered_from_zero() -> None:
    with pytest.raises(ValueError, match="2 windows up to 2; number them from 0"):
        quiet_state(
            np.ones(2),
            np.ones(2),
            np.zeros(2, dtype=np.intp),
            model_count=1,
            window_index=np.array([0, 2]),
        )
