"""Environments that hold some of the distributions installed here, and no others.

The distributions are linked, not copied: what is not linked is really missing.
"""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "ofa-deploy"


def declared(*extras: str) -> frozenset[str]:
    """The project, what it requires with these extras, and what that requires."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(PROJECT, frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        found.add(canonicalize_name(name))
        for text in _installed(name).requires or []:
            requirement = Requirement(text)
            if _applies(requirement, wanted):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return frozenset(found)


def _installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise AssertionError(f"{name} is required, and not installed here") from error


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({"extra": extra}) for extra in {"", *extras}
    )


def make_environment(home: Path, distributions: Iterable[str]) -> Path:
    """Make a virtual environment of these distributions; returns its Python."""
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", purelib, cwd=home).stdout.strip())
    for name in distributions:
        _link(_installed(name), site)
    return python


def _link(found: Distribution, site: Path) -> None:
    # Without those beside the packages, such as scripts in ../../../bin.
    tops = {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}
    for top in tops:
        if not (site / top).exists():  # a namespace has several owners
            (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables that could lead Python to other packages."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        command,
        cwd=cwd,
        # Else it would compile what is linked, where it is linked to.
        env={**clean, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
