"""Layers of a model file: a table for people, JSON for programs, errors for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profilers.__main__ import main
from profilers.backends import get_backend
from profilers.errors import RunFailed
from profilers.layers import profile_layers_in_fresh_process
from tests.support.profilers_models import conv_model

BACKEND = "onnxruntime-cpu"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(conv_model())
    return path


def layers_of(model: Path) -> list[str]:
    layers = profile_layers_in_fresh_process(model, backend_name=BACKEND, threads=1)
    return [layer.name for layer in layers]


def test_a_fresh_process_sees_the_layers_that_this_one_sees(model: Path) -> None:
    here = get_backend(BACKEND).profile_layers(model, threads=1, runs=1)  # type: ignore[attr-defined]
    assert layers_of(model) == [layer.name for layer in here]


def test_the_table_and_the_json_name_every_layer(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["layers", str(model), "--backend", BACKEND, "--runs", "2"]
    assert main(words) == 0
    head, *rows, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["layer", "ms", "share", "kind"]
    assert main([*words, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)
    assert [row.split()[0] for row in rows] == [layer["name"] for layer in layers]


def test_a_model_that_the_runtime_rejects_is_told_in_its_words(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"garbage")
    with pytest.raises(RunFailed, match=r"profiling model\.onnx ended .* ONNX Runtime"):
        layers_of(path)


def test_a_process_that_hangs_is_stopped(model: Path) -> None:
    with pytest.raises(RunFailed, match=r"took more than 0\.01 s and was stopped"):
        profile_layers_in_fresh_process(
            model, backend_name=BACKEND, threads=1, limit_s=0.01
        )


def test_a_runtime_that_does_not_tell_is_named(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", str(model), "--backend", "litert-cpu"]) == 1
    assert "litert-cpu does not tell what its layers take" in capsys.readouterr().err


def test_more_threads_than_cores_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["layers", str(model), "--backend", BACKEND, "--threads", "4096"]
    assert main(words) == 1
    assert "ask for no more threads than that" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", str(tmp_path / "no.onnx"), "--backend", BACKEND]) == 1
    assert "there is no model file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--runs", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_number_below_one_is_refused(
    option: str, value: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["layers", str(model), "--backend", BACKEND, option, value])
    assert f"'{value}'; give a whole number from 1 on" in capsys.readouterr().err
