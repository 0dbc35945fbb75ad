"""One section of RESULTS.md: what a benchmark found, and where and how it was run.

A script prints its section and puts it in the file in place of its last one; the other
sections are left as they are.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from profilers.device import read_conditions, this_device
from profilers.files import write_atomically

RESULTS_FILE = Path(__file__).with_name("RESULTS.md")
# Of the sections in the file, whatever the order of the runs.
ORDER = (
    "supernet_accuracy",
    "calibration",
    "accuracy_predictor",
    "parity",
    "latency_range",
    "specialize_time",
    "demo_time",
    "export_speed",
    "evolution_speed",
    "contract",
    "frontier_quality",
    "ofa_search",
    "branches",
    "pas",
    "surgery",
    "narrow_training",
    "small_maps",
    "muon",
    "legr",
    "autoprune",
    "tas",
    "small_geometry",
    "latency_predictor",
    "repeatability",
    "anchor_model",
)
PACKAGES = ("ofa-deploy", "numpy", "onnxruntime", "openvino")
PASSED, MISSED = "- **passed**: ", "- **missed**: "
_HEADER = """\
# Results

What the scripts of this folder printed, unchanged; each section says how to repeat it.
A line that begins with *passed* or *missed* is a bar that was set beforehand.
"""


class Section:
    """A section in the making: lines and tables, then `publish`.

    Args:
        name: One of `ORDER`; the script's name.
        title: Its heading.
        results: The file that it belongs in.
        packages: Whose versions matter besides `PACKAGES`.
    """

    def __init__(
        self, name: str, title: str, *, results: Path, packages: Sequence[str] = ()
    ) -> None:
        if name not in ORDER:
            raise ValueError(f"section {name!r} is not one of {ORDER}")
        self._name = name
        self._results = results
        self._lines = [f"## {title}", "", *_provenance((*PACKAGES, *packages)), ""]

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._lines += [text, ""]

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; all columns but the first are figures."""
        alignment = ["---"] + ["---:"] * (len(headers) - 1)
        for cells in (headers, alignment, *rows):
            self._lines.append("| " + " | ".join(cells) + " |")
        self._lines.append("")

    def bar(self, text: str, *, passed: bool) -> None:
        """Add what was asked for and whether it was reached."""
        if self._lines[-1] == "" and self._lines[-2].startswith((PASSED, MISSED)):
            self._lines.pop()
        self._lines += [(PASSED if passed else MISSED) + text, ""]

    def publish(self) -> None:
        """Print the section and write it to the file."""
        content = "\n".join(self._lines).rstrip() + "\n"
        print(content)
        path = self._results
        old = path.read_text(encoding="utf-8") if path.exists() else _HEADER
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, place(old, self._name, content).encode())


def place(text: str, name: str, content: str) -> str:
    """The text with the section `name` replaced, or inserted where `ORDER` says."""
    wrapped = f"<!-- {name} -->\n{content}<!-- /{name} -->\n"
    present = re.search(
        f"<!-- {name} -->\n.*?<!-- /{name} -->\n", text, flags=re.DOTALL
    )
    if present is not None:
        return text[: present.start()] + wrapped + text[present.end() :]
    for later in ORDER[ORDER.index(name) + 1 :]:
        before, marker, after = text.partition(f"<!-- {later} -->\n")
        if marker:
            return f"{before}{wrapped}\n{marker}{after}"
    return f"{text.rstrip()}\n\n{wrapped}"


def _provenance(packages: Sequence[str]) -> list[str]:
    device, conditions = this_device(), read_conditions()
    shared = "; shared host, so latencies are indicative"
    versions = [f"python {platform.python_version()}", *map(_version, packages)]
    return [
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d}, commit {_commit()}",
        f"- machine: {device.cpu_model} ({device.arch}), {device.core_count} logical "
        f"cores, {device.memory_mb / 1024:.0f} GiB"
        f"{shared if conditions.shared_host else ''}",
        f"- load average at the start: {conditions.load_average}",
        f"- versions: {', '.join(versions)}",
        f"- command: `{_command()}`",
    ]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _command() -> str:
    """The command line, without the places that folders have on one machine."""
    words = [_without_place(word) for word in sys.argv[1:]]
    script = Path(sys.argv[0]).name
    return shlex.join(["python", f"benchmarks/{script}", *words])


def _without_place(word: str) -> str:
    option, sign, value = word.rpartition("=")
    if Path(value).is_absolute() or ".." in Path(value).parts:
        return f"{option}{sign}DIR"
    return word


def _commit() -> str:
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/RESULTS.md")
    return f"{commit or 'unknown'}{' with changes' if changed else ''}"


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
