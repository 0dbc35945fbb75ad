"""The process that runs the models of a work order, and may crash doing so.

It reads one assignment from stdin and writes one line to stdout for everything it
begins and everything it has done. Whoever reads knows, when the lines stop, which model
it was that took the process down. After a visit it waits for a line on stdin: the visit
is kept by then, and the keeping disturbs no measurement.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from profilers.backends import get_backend
from profilers.codec import (
    decode_settings,
    decode_visit,
    encode_flat,
    encode_visit,
)
from profilers.errors import DeployError
from profilers.json_reader import Json, JsonNode, parse_json
from profilers.measure import ModelUnderTest, visit_models
from profilers.measurement import MeasureSettings, Visit
from profilers.process import own_stdout

__all__ = ["Assignment", "Began", "Refused", "Report", "Visited", "work"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one worker does.

    Attributes:
        backend: Name, as `get_backend` takes it.
        threads: Of one inference.
        settings: Of a visit.
        passes: Visits of each model.
        seed: Of inputs and order.
        models: Model files by name.
    """

    backend: str
    threads: int
    settings: MeasureSettings
    passes: int
    seed: int
    models: dict[str, Path]

    def to_json(self) -> str:
        """Encode in one line."""
        return json.dumps(
            {
                "backend": self.backend,
                "threads": self.threads,
                "settings": encode_flat(self.settings),
                "passes": self.passes,
                "seed": self.seed,
                "models": {name: str(path) for name, path in self.models.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        """Decode.

        Raises:
            FormatError: The text is no assignment.
        """
        fields = parse_json(text).fields(
            "backend", "threads", "settings", "passes", "seed", "models"
        )
        return cls(
            backend=fields["backend"].text(),
            threads=fields["threads"].integer(minimum=1),
            settings=decode_settings(fields["settings"]),
            passes=fields["passes"].integer(minimum=1),
            seed=fields["seed"].integer(minimum=0),
            models={
                name: Path(entry.text())
                for name, entry in fields["models"].entries().items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """The worker is about to do something with a model."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Visited:
    """The worker has visited a model."""

    name: str
    visit: Visit


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The worker ends with an error of ours.

    Attributes:
        name: Of the model that it was at; None before the first.
        kind: The error's class.
        message: What it says.
    """

    name: str | None
    kind: str
    message: str


Report = Began | Visited | Refused


def encode_report(report: Report) -> str:
    """One line of JSON, without its end."""
    content: dict[str, Json]
    if isinstance(report, Began):
        content = {"began": report.name}
    elif isinstance(report, Visited):
        content = {"visited": report.name, "visit": encode_visit(report.visit)}
    else:
        content = {
            "refused": report.name,
            "kind": report.kind,
            "message": report.message,
        }
    return json.dumps(content, allow_nan=False)


def decode_report(text: str) -> Report:
    """Decode a line.

    Raises:
        FormatError: It is no report.
    """
    node = parse_json(text)
    keys = set(node.entries())
    if "began" in keys:
        return Began(name=node.fields("began")["began"].text())
    if "visited" in keys:
        fields = node.fields("visited", "visit")
        return Visited(
            name=fields["visited"].text(), visit=decode_visit(fields["visit"])
        )
    fields = node.fields("refused", "kind", "message")
    return Refused(
        name=fields["refused"].optional(JsonNode.text),
        kind=fields["kind"].text(),
        message=fields["message"].text(),
    )


class _Teller:
    """Writes reports, and waits after a visit; an observer of the measuring."""

    def __init__(
        self, write: Callable[[str], None], wait: Callable[[], object]
    ) -> None:
        self._write = write
        self._wait = wait
        self.current: str | None = None

    def begin(self, name: str) -> None:
        """See `Observer.begin`."""
        self.current = name
        self.tell(Began(name=name))

    def visited(self, name: str, visit: Visit) -> None:
        """See `Observer.visited`."""
        self.tell(Visited(name=name, visit=visit))
        self._wait()

    def tell(self, report: Report) -> None:
        """Write any report."""
        self._write(encode_report(report))


def work() -> int:
    """Do the assignment on stdin; return the exit code."""
    orders = _Orders()
    teller = _Teller(own_stdout(), orders.next)
    try:
        assignment = Assignment.from_json(orders.next())
        backend = get_backend(assignment.backend)
        visit_models(
            [
                ModelUnderTest(name=name, model=path)
                for name, path in assignment.models.items()
            ],
            backend=backend,
            threads=assignment.threads,
            settings=assignment.settings,
            passes=assignment.passes,
            observer=teller,
            rng=np.random.default_rng(assignment.seed),
        )
    except DeployError as error:
        refused = Refused(
            name=teller.current, kind=type(error).__name__, message=str(error)
        )
        teller.tell(refused)
        return 1
    return 0


class _Orders:
    """Lines on stdin; the process ends with the one that sends them, whatever it does.

    A thread waits for them: a runtime that hangs would never look whether anybody is
    still there. It reads without Python's buffer, which could not be closed meanwhile.
    On Windows what a thread reads from holds up whoever asks what kind of file it is,
    such as a runtime's libraries; there lines are read when they are due.
    """

    def __init__(self) -> None:
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._by_thread = os.name == "posix"
        if self._by_thread:
            threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> str:
        """Wait for a line."""
        if self._by_thread:
            return self._lines.get()
        if not (line := sys.stdin.readline()):
            raise SystemExit(1)
        return line

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(0, 65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._lines.put(line.decode())
        os._exit(1)
