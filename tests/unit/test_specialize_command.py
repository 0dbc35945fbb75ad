"""What the words of `ofa-deploy specialize` and `fleet` become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.called import given_by


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """What a call is given by a command's words, but for what only shows progress."""

    def run(words: str) -> dict[str, Any]:
        given = given_by(words.split(), monkeypatch)
        return {k: v for k, v in given.items() if k not in SHOWING}

    return run


SHOWING = ("reporter", "on_feasibility")
DEFAULTS: dict[str, Any] = {
    "device": "openvino-cpu",
    "out": Path("b"),
    "latency_ms": None,
    "percentile": 50,
    "size_bytes": None,
    "peak_memory_mb": None,
    "min_accuracy": None,
    "rate_hz": None,
    "sustained_s": 0.0,
    "threads": None,
    "supernet": "cifar10-small",
    "table": None,
    "on_drift": "refuse",
    "calibration": None,
    "eval_data": None,
    "seed": 0,
}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("--latency-ms 2.5", {"latency_ms": 2.5}),
        ("--rate-hz 30 --percentile 95", {"rate_hz": 30.0, "percentile": 95}),
        ("--rate-hz 30 --sustained-s 60", {"rate_hz": 30.0, "sustained_s": 60.0}),
        ("--size-bytes 200000", {"size_bytes": 200_000}),
        ("--peak-memory-mb 12.5", {"peak_memory_mb": 12.5}),
        ("--min-accuracy 0.9", {"min_accuracy": 0.9}),
        ("--device litert-cpu --threads 2", {"device": "litert-cpu", "threads": 2}),
        (
            "--supernet mine --table t.json",
            {"supernet": "mine", "table": Path("t.json")},
        ),
        ("--reprofile", {"on_drift": "reprofile"}),
        ("--accept-drift", {"on_drift": "accept"}),
        ("--calibration photos", {"calibration": Path("photos")}),
        ("--eval-data test.npz --seed 7", {"eval_data": Path("test.npz"), "seed": 7}),
    ],
)
def test_words_become_what_the_call_takes(
    words: str, changed: dict[str, Any], given: Callable[[str], dict[str, Any]]
) -> None:
    assert given(f"specialize --out b {words}") == {**DEFAULTS, **changed}


def test_budgets_by_device_become_a_fleet(
    given: Callable[[str], dict[str, Any]],
) -> None:
    found = given(
        "fleet --device openvino-cpu=0.5 --device onnxruntime-cpu?threads=2=0.8 "
        "--out b --max-models 1 --supernet mine --eval-data test.npz --accept-drift "
        "--seed 3"
    )
    assert found == {
        "devices": {"openvino-cpu": 0.5, "onnxruntime-cpu?threads=2": 0.8},
        "out": Path("b"),
        "max_models": 1,
        "supernet": "mine",
        "calibration": None,
        "eval_data": Path("test.npz"),
        "on_drift": "accept",
        "seed": 3,
    }
