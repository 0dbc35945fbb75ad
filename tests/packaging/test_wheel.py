"""The wheel works by itself, installed elsewhere and used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("ofa_deploy", "profilers", "latency_tables")
SHIPPED = {".py", ".typed", ".json", ".safetensors", ".npz", ".md"}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the variables that could lead Python to the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
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
    """An environment with the wheel, and the third-party packages of this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", wheel, cwd=home)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", purelib, cwd=home).strip())
    # A folder named in a .pth file comes last on the path, and .pth files inside it,
    # such as that of an editable install of the checkout, are not read.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "third_party.pth").write_text("\n".join(sorted(here)), encoding="utf-8")
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
