"""The wheel works by itself, installed elsewhere and used from another folder.

Its environment holds what the wheel declares and nothing else: no torch, no test tools.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from tests.support import installed
from tests.support.installed import PROJECT, declared, make_environment
from tests.support.tiny_session import write_inputs

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("ofa_deploy", "profilers", "latency_tables")
SHIPPED = {".py", ".typed", ".json", ".safetensors", ".npz", ".md", ".css", ".js"}
EXTRAS = ("openvino", "onnxruntime")

# Runs commands, each a list of arguments, in one process. Prints, by top-level module
# that came from a file outside of the standard library, what distributions own it.
COMMANDS = """
import json, sys, sysconfig
from importlib.metadata import distributions
from ofa_deploy.cli import main

def owners(name):  # packages_distributions() of Python 3.10 knows half of them
    return [d.metadata["Name"] for d in distributions()
            if any(file.parts[0] in (name, name + ".py") for file in d.files or [])]

def in_standard_library(file):
    return file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["ofa-deploy", *arguments]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
print(json.dumps({
    name: owners(name)
    for name, module in sys.modules.items()
    if "." not in name
    and (file := getattr(module, "__file__", None))
    and not in_standard_library(file)
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that is to succeed; what it prints."""
    done = installed.run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index")
    offline = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(*pip, *offline, ".", cwd=REPOSITORY)
    (built,) = folder.glob("ofa_deploy-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it declares."""
    home = tmp_path_factory.mktemp("environment")
    third_party = declared(*EXTRAS) - {PROJECT}
    python = make_environment(home, third_party)
    # Resolves what the wheel requires, and fails where it is not there. Isolated, as a
    # user's settings may name folders of further wheels.
    pip = (sys.executable, "-m", "pip", "--python", python, "--isolated", "install")
    chosen = f"{wheel}[{','.join(EXTRAS)}]"
    run(*pip, "--quiet", "--no-compile", "--no-index", chosen, cwd=home)
    return home


def answer(environment: Path, snippet: str, *, cwd: Path) -> Any:
    """Run a snippet in the environment; what it prints is JSON."""
    return json.loads(run(environment / "bin" / "python", "-c", snippet, cwd=cwd))


def test_the_wheel_holds_every_file_of_the_packages_and_no_other_folder(
    wheel: Path,
) -> None:
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.suffix in SHIPPED
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= names
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_packages_come_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    snippet = f"""
import importlib, json
print(json.dumps([importlib.import_module(p).__file__ for p in {PACKAGES}]))
"""
    for file in answer(environment, snippet, cwd=tmp_path):
        assert Path(file).is_relative_to(environment)


def test_the_command_line_starts(environment: Path, tmp_path: Path) -> None:
    printed = run(environment / "bin" / "ofa-deploy", "--help", cwd=tmp_path)
    assert "specialize" in printed


def test_the_data_is_found_where_it_was_installed(
    environment: Path, tmp_path: Path
) -> None:
    snippet = """
import json
from importlib.resources import files
zoo = [p.name for entry in (files("ofa_deploy") / "zoo").iterdir() if entry.is_dir()
       for p in entry.iterdir()]
tables = [p.name for p in files("latency_tables").iterdir()]
print(json.dumps({"zoo": zoo, "tables": tables}))
"""
    found = answer(environment, snippet, cwd=tmp_path)
    assert {"supernet.json", "weights.safetensors"} <= set(found["zoo"])
    assert any(name.endswith(".json") for name in found["tables"])


def test_the_supernet_of_the_zoo_opens(environment: Path, tmp_path: Path) -> None:
    snippet = """
import json
from ofa_deploy.zoo import open_zoo
print(json.dumps(open_zoo("cifar10-small").space.name))
"""
    assert answer(environment, snippet, cwd=tmp_path) == "mbv3-small"


@pytest.fixture(scope="module")
def modules(
    environment: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Owners of the modules imported while a tiny bundle is made and checked."""
    home = tmp_path_factory.mktemp("home")
    supernet, table = write_inputs(home, backend="openvino-cpu")
    files = ["--supernet", str(supernet), "--table", str(table), "--out", "bundle"]
    files.append("--accept-drift")  # the table is made up
    commands = [
        ["specialize", "--device", "openvino-cpu", "--latency-ms", "10000", *files],
        ["check", "bundle"],
    ]
    python = environment / "bin" / "python"
    printed = run(python, "-c", COMMANDS, json.dumps(commands), cwd=home)
    assert (home / "bundle" / "manifest.json").is_file()
    owners: dict[str, list[str]] = json.loads(printed)
    return owners


@pytest.mark.slow
def test_a_supernet_is_specialised_with_nothing_but_what_the_wheel_declares(
    modules: dict[str, list[str]],
) -> None:
    assert {"ofa_deploy", "profilers", "numpy", "onnx", "openvino"} <= set(modules)
    assert "torch" not in modules


@pytest.mark.slow
def test_every_module_imported_meanwhile_belongs_to_a_declared_distribution(
    modules: dict[str, list[str]],
) -> None:
    allowed = declared(*EXTRAS)
    strangers = {
        name: owners
        for name, owners in modules.items()
        if not allowed & {canonicalize_name(owner) for owner in owners}
    }
    assert strangers == {}
