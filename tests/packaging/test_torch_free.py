"""Specialising needs no torch: importing its modules does not import torch.

Each check runs in a fresh interpreter, as other tests import torch into this one.
"""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH_HALF = ("ofa_deploy.nn", "ofa_deploy.shrink", "ofa_deploy.train")

# Prints the first module whose import brings torch in, or nothing.
PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        print(name)
        break
"""


def module_names(package: str) -> Iterator[str]:
    """Name the package and all its modules, without importing any."""
    yield package
    folder = REPOSITORY.joinpath(*package.split("."))
    for module in pkgutil.iter_modules([str(folder)], prefix=f"{package}."):
        if module.ispkg:
            yield from module_names(module.name)
        else:
            yield module.name


def in_torch_half(name: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in TORCH_HALF)


def first_to_import_torch(names: Iterable[str], *, path: Path = REPOSITORY) -> str:
    """Import `names` from `path` in a fresh interpreter; empty if torch stays out."""
    found = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_no_module_of_the_torch_free_half_imports_torch() -> None:
    names = [name for name in module_names("ofa_deploy") if not in_torch_half(name)]
    assert "ofa_deploy.pipeline" in names
    assert first_to_import_torch(names) == ""


def test_no_module_of_the_profilers_imports_torch() -> None:
    names = list(module_names("profilers"))
    assert "profilers.measure" in names
    assert first_to_import_torch(names) == ""


def test_the_excluded_packages_exist() -> None:
    assert set(TORCH_HALF) <= set(module_names("ofa_deploy"))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("import torch\n", id="directly"),
        pytest.param("import torch.nn as nn\n", id="a submodule"),
        pytest.param("import middle\n", id="through another module"),
        pytest.param(
            "try:\n    import torch\nexcept ImportError:\n    torch = None\n",
            id="if it is there",
        ),
    ],
)
def test_the_check_finds_a_module_that_imports_torch(
    source: str, tmp_path: Path
) -> None:
    # A stand-in for torch: quick, and this test does not depend on the real one.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "nn.py").touch()
    (tmp_path / "middle.py").write_text("import torch\n", encoding="utf-8")
    (tmp_path / "innocent.py").write_text(
        "def late():\n    import torch\n", encoding="utf-8"
    )
    (tmp_path / "guilty.py").write_text(source, encoding="utf-8")

    assert first_to_import_torch(["innocent"], path=tmp_path) == ""
    assert first_to_import_torch(["innocent", "guilty"], path=tmp_path) == "guilty"
