"""`python -m profilers time`: files in, a table or JSON out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from profilers import timing
from profilers.__main__ import main
from profilers.codec import decode_visit
from profilers.json_reader import JsonNode
from profilers.measurement import MeasureSettings
from tests.support.profilers_models import conv_model

QUICK = replace(
    MeasureSettings.screen(), visits=3, target_relative_error=10.0, max_seconds=5.0
)


@pytest.fixture(autouse=True)
def quick_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TIERS", dict.fromkeys(timing.TIERS, lambda: QUICK))
    monkeypatch.setattr(timing, "CERTIFY_PROCESSES", 2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(conv_model())
    return path


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"nothing like a model")
    return path


def run(*words: str | Path) -> int:
    return main(["time", *map(str, words), "--backend", "onnxruntime-cpu"])


@pytest.mark.parametrize("tier", ["screen", "certify"])
def test_files_are_timed_and_one_that_cannot_be_costs_only_itself(
    tier: str, model: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, damaged, "--tier", tier, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["runtime"]["backend"] == "onnxruntime-cpu"
    assert told["tier"] == tier
    assert told["indicative"] == told["conditions"]["shared_host"]
    timed, failed = told["models"]
    assert timed["model"] == str(model)
    assert timed["quiet_ms"] > 0
    visits = [decode_visit(JsonNode(visit, "")) for visit in timed["visits"]]
    assert len(visits) >= QUICK.visits
    assert failed["quiet_ms"] is None
    assert "damaged.onnx" in failed["problem"]


def test_the_table_names_every_file(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model) == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["model", "quiet"]
    assert row.startswith(str(model))


def test_certified_files_take_turns_and_compare(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "same.onnx"
    same.write_bytes(model.read_bytes())
    assert run(model, same, "--tier", "certify", "--json") == 0
    for timed in json.loads(capsys.readouterr().out)["models"]:
        assert {visit["session"] for visit in timed["visits"]} == {0, 1}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_a_limit_is_a_number_of_seconds(
    value: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(model, "--limit", value)
    assert "give a number of seconds above 0" in capsys.readouterr().err


def test_a_limit_stops_what_takes_longer(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--tier", "certify", "--limit", "0.01", "--json") == 1
    (timed,) = json.loads(capsys.readouterr().out)["models"]
    assert "took more than 0.01 s and was stopped" in timed["problem"]


def test_a_file_that_is_not_there_or_twice_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model.with_name("absent.onnx")) == 1
    assert "absent.onnx is not a file" in capsys.readouterr().err
    assert run(model, model) == 1
    assert "named twice" in capsys.readouterr().err
