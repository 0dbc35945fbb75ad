"""How a predictor is judged by networks that it has not seen, of timings made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ofa_deploy import held_out
from ofa_deploy.held_out import HeldOutQuality, evaluate_predictor
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.reporting import Silent
from ofa_deploy.space import SubnetConfig
from tests.support import tiny
from tests.support.tiny_session import table_here

TABLE = table_here("onnxruntime-cpu")
PREDICTOR = fit_latency_predictor(tiny.SPACE, TABLE)
COUNT = 40


def judged(
    monkeypatch: pytest.MonkeyPatch, ratio: Callable[[int, int], float | None]
) -> HeldOutQuality:
    """By networks that take so much longer than predicted; None if one fails.

    Args:
        monkeypatch: Has them take it.
        ratio: Of a network, by its place and its run, 1 or 2.
    """

    def measured(*_: Any, names: list[str], run: int, **__: Any) -> dict[str, float]:
        found = {}
        for place, name in enumerate(names):
            factor = ratio(place, run)
            if factor is not None:
                config = SubnetConfig.from_id(name)
                found[name] = factor * PREDICTOR.estimate(config).ms
        return found

    monkeypatch.setattr(held_out, "_measure", measured)
    return evaluate_predictor(
        tiny.SPACE,
        TABLE,
        count=COUNT,
        settings=TABLE.settings,
        folder=Path(),
        reporter=Silent(),
    )


def test_an_exact_predictor_is_off_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(monkeypatch, lambda place, run: 1.0)
    assert found.predicted.rmspe == pytest.approx(0.0, abs=1e-9)
    assert (found.coverage, found.below_upper, found.left_out) == (1.0, 1.0, 0)


def test_errors_are_of_both_runs_together_and_noise_is_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = judged(monkeypatch, lambda place, run: 1.1 if run == 1 else 1.2)
    # Of measured over predicted, the geometric mean of both runs.
    off = 1 - 1 / np.sqrt(1.1 * 1.2)
    assert found.predicted.rmspe == pytest.approx(off, rel=1e-6)
    assert found.noise.rmspe == pytest.approx(abs(1.1 / 1.2 - 1), rel=1e-6)


def test_intervals_are_counted_on_their_own_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds = PREDICTOR.residuals
    ratios = (0.99 * bounds.low, 1.0, 1.01 * max(bounds.high, bounds.upper), 1.0)
    found = judged(monkeypatch, lambda place, run: ratios[place % 4])
    assert found.coverage == 0.5
    assert found.below_upper == 0.75


def test_what_fails_in_one_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(
        monkeypatch,
        lambda place, run: None if (place, run) in ((3, 1), (5, 2)) else 1.0,
    )
    assert found.left_out == 2
    assert found.predicted.count == found.noise.count == COUNT - 2
