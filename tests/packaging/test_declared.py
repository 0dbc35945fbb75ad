"""What the code imports is required by the project itself, not by what it requires."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.installed import PROJECT

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("latency_tables", "ofa_deploy", "profilers")


def imported(file: Path) -> Iterator[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def third_party() -> list[str]:
    files = [file for name in PACKAGES for file in (REPOSITORY / name).rglob("*.py")]
    names = {name for file in files for name in imported(file)}
    return sorted(names - set(PACKAGES) - sys.stdlib_module_names)


def test_the_imports_are_found() -> None:
    assert {"numpy", "onnx", "openvino", "torch", "typer"} <= set(third_party())


@pytest.mark.parametrize("module", third_party())
def test_an_imported_module_is_of_a_distribution_that_the_project_requires(
    module: str,
) -> None:
    # `packages_distributions` of Python 3.10 knows only half of them.
    owners = {
        canonicalize_name(found.metadata["Name"])
        for found in distributions()
        if any(file.parts[0] in (module, f"{module}.py") for file in found.files or [])
    }
    if not owners:
        pytest.skip(f"{module} is not installed")
    required = {canonicalize_name(Requirement(t).name) for t in requires(PROJECT) or []}
    assert owners & required
