"""Where a runtime is not installed, a command says how to install it, and no more.

The commands run in an environment of the base dependencies alone: OpenVINO, torch and
the others are not hidden there but missing.
"""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path

import pytest

from tests.support.installed import PROJECT, declared, make_environment, run
from tests.support.tiny_session import write_inputs

# By device: what is missing, and the extra that brings it.
MISSING = {
    "litert-cpu": ("LiteRT", "litert"),
    "openvino-cpu": ("OpenVINO", "openvino"),
    "openvino-cpu?threads=1": ("OpenVINO", "openvino"),
    "tensorrt-gpu": ("TensorRT", "tensorrt"),
    "tensorrt-rtx-gpu": ("TensorRT for RTX", "tensorrt-rtx"),
}


def told(package: str, extra: str) -> str:
    return f"error: {package} is not installed. Run: pip install 'ofa-deploy[{extra}]'"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the base dependencies."""
    return make_environment(tmp_path_factory.mktemp("base"), declared())


@pytest.mark.parametrize("device", MISSING)
def test_specialising_for_a_missing_runtime_ends_with_the_pip_line(
    device: str, base: Path, tmp_path: Path
) -> None:
    command = ["specialize", "--device", device, "--latency-ms", "1", "--out", "bundle"]
    done = run(base, "-m", "ofa_deploy", *command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == told(*MISSING[device])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["profile", "probe"])
def test_other_commands_tell_of_a_missing_runtime_alike(
    command: str, base: Path, tmp_path: Path
) -> None:
    done = run(base, "-m", "ofa_deploy", command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == told("OpenVINO", "openvino")


def test_onnx_runtime_is_told_of_alike(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    rest = declared() - {"onnxruntime"}
    python = make_environment(tmp_path_factory.mktemp("rest"), rest)
    command = ["specialize", "--device", "onnxruntime-cpu", "--latency-ms", "1"]
    done = run(python, "-m", "ofa_deploy", *command, "--out", "bundle", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == told("ONNX Runtime", "onnxruntime")


def test_training_without_torch_ends_with_the_pip_line(
    base: Path, tmp_path: Path
) -> None:
    command = ["train", "--data", "images.zip", "--out", "run"]
    done = run(base, "-m", "ofa_deploy", *command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == told("PyTorch", "train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_base_dependencies_are_enough_for_onnx_runtime(
    base: Path, tmp_path: Path
) -> None:
    supernet, table = write_inputs(tmp_path, backend="onnxruntime-cpu")
    command = ["specialize", "--device", "onnxruntime-cpu", "--latency-ms", "10000"]
    command += ["--accept-drift"]  # the table is made up
    files = ["--supernet", str(supernet), "--table", str(table), "--out", "bundle"]
    done = run(base, "-m", "ofa_deploy", *command, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(base, "-m", "ofa_deploy", "check", "bundle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_extra_that_a_pip_line_names_is_declared() -> None:
    named = {extra for _, extra in MISSING.values()} | {"onnxruntime", "train"}
    assert named <= set(metadata(PROJECT).get_all("Provides-Extra") or [])


def test_the_environment_lacks_what_is_not_declared(base: Path, tmp_path: Path) -> None:
    # Else the tests above would show nothing.
    snippet = "from importlib.util import find_spec; print(find_spec({!r}))"
    for name in ("openvino", "torch", "hypothesis"):
        assert run(base, "-c", snippet.format(name), cwd=tmp_path).stdout == "None\n"
