"""The journal of a work order: what was measured so far, one record a line.

A line is written, flushed to the disk, and only then counted: whatever happens, at most
the record that was being written is lost, and the next opening cuts its remains off.
Every line starts with a checksum, so that a damaged one is dropped, and measured again,
rather than believed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from profilers.closing import Closing
from profilers.codec import (
    decode_conditions,
    decode_visit,
    encode_flat,
    encode_visit,
)
from profilers.device import Conditions
from profilers.errors import FormatError, IncompatibleTables, MeasurementError
from profilers.files import sync_folder
from profilers.json_reader import Json, JsonNode, parse_json
from profilers.locks import HELD, lock
from profilers.measurement import Visit

__all__ = [
    "Failure",
    "Journal",
    "OrderDone",
    "Retry",
    "SessionBegan",
    "VisitRecord",
    "remove_journal",
]

_logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
# Of a value in a message.
SHOWN_CHARACTERS = 80
_CHECKSUM_DIGITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VisitRecord:
    """A visit of a model.

    Attributes:
        name: Of the model.
        visit: Its time counts from the start of the process that made it.
    """

    name: str
    visit: Visit


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A model that is not measured any more.

    Attributes:
        name: Of the model.
        reason: What happened, for people.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBegan:
    """A process begins to measure; the visits that follow are its own.

    Attributes:
        conditions: Of the device.
        began_s: Seconds since 1970, by the device's clock; None where the version
            that wrote it did not say.
    """

    conditions: Conditions
    began_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderDone:
    """A work order got all the visits that it is to have, extra ones included.

    Attributes:
        order: Digest of its models' names.
    """

    order: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """A failed model is to be tried again.

    Attributes:
        name: Of the model.
    """

    name: str


Record = VisitRecord | Failure | Retry | SessionBegan | OrderDone


class Journal(Closing):
    """An open journal; one process at a time has it.

    Args:
        path: The file; made if it is not there.
        subject: Says what is measured with what; a journal of anything else is
            refused.

    Raises:
        MeasurementError: Another process has the journal open, or the disk refuses.
        IncompatibleTables: The journal is of another subject.
        FormatError: The file is no journal.
    """

    def __init__(self, path: Path, *, subject: dict[str, Json]) -> None:
        self._path = path
        self._file = _open_alone(path)
        self._forget()
        self.damaged_count = 0
        try:
            self._read(subject)
        except BaseException:
            self._file.close()
            raise

    def _forget(self) -> None:
        self._visits: dict[str, list[Visit]] = {}
        self._failures: dict[str, str] = {}
        self._sessions: list[Conditions] = []
        self._next_session = 0
        self._done: set[str] = set()
        self._changed_s = os.fstat(self._file.fileno()).st_mtime
        self._began_s: list[float] = []

    def visits_of(self, name: str) -> tuple[Visit, ...]:
        """Visits of a model so far."""
        return tuple(self._visits.get(name, ()))

    def count_of(self, name: str) -> int:
        """How many visits a model has so far."""
        return len(self._visits.get(name, ()))

    @property
    def sessions(self) -> tuple[Conditions, ...]:
        """The device's conditions at the beginning of every session so far."""
        return tuple(self._sessions)

    @property
    def began_s(self) -> float:
        """When the oldest session began, in seconds since 1970.

        Where a session does not say so, it was no later than the last change of the
        file before this opening.
        """
        return min(self._began_s, default=self._changed_s)

    @property
    def began_at(self) -> str:
        """The same as ISO 8601, as tables tell it."""
        return datetime.fromtimestamp(self.began_s, timezone.utc).isoformat()

    @property
    def done(self) -> frozenset[str]:
        """Digests of the work orders that are done."""
        return frozenset(self._done)

    @property
    def next_session(self) -> int:
        """Number of the next session: larger than any before."""
        return self._next_session

    @property
    def failures(self) -> dict[str, str]:
        """Reasons by model, of those given up."""
        return dict(self._failures)

    def add(self, record: Record) -> None:
        """Write a record; once this returns, it is on the disk.

        Raises:
            MeasurementError: The disk is full or refuses; the journal is as before.
        """
        content: dict[str, Json]
        if isinstance(record, VisitRecord):
            content = {"visit": {"name": record.name, **encode_visit(record.visit)}}
        elif isinstance(record, Retry):
            content = {"retry": {"name": record.name}}
        elif isinstance(record, OrderDone):
            content = {"done": {"order": record.order}}
        elif isinstance(record, SessionBegan):
            content = {
                "session": {
                    "began_s": record.began_s,
                    **encode_flat(record.conditions),
                }
            }
        else:
            content = {"failure": {"name": record.name, "reason": record.reason}}
        self._append(content)
        self._take(record)

    def retry_failures(self) -> None:
        """Have the models that were given up tried again."""
        for name in sorted(self._failures):
            self.add(Retry(name=name))

    def begin_anew(self) -> None:
        """Forget all that was measured, on the disk, too."""
        self._file.seek(0)
        self._file.truncate(len(self._file.readline()))
        self._forget()

    def close(self) -> None:
        """Let other processes have the journal. Closing again does nothing."""
        self._file.close()

    def _append(self, content: dict[str, Json]) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            _write_whole(self._file, _encode_line(content))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise MeasurementError(
                f"{self._path} cannot be written: {error}; make room and run the same "
                "command again, it goes on from here"
            ) from error

    def _read(self, subject: dict[str, Json]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole, _, torn = content.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        first: dict[str, Json] = {"format_version": FORMAT_VERSION, "subject": subject}
        header = _decode_line(lines[0]) if lines else None
        # A kill may have left a part of our own first line, a power cut the room for
        # it; anything else is not ours.
        own = _encode_line(first)
        begun = len(torn) <= len(own) and own.startswith(torn.rstrip(b"\0"))
        if header is None and (lines or not begun):
            raise FormatError(
                f"{self._path.name} is not a journal, or its first line is damaged; "
                "name another file, or delete it to measure anew",
                path="",
            )
        if header is not None:
            _check_header(header, subject, str(self._path))
        # What a kill or a full disk left of the last line.
        self._file.truncate(len(content) - len(torn))
        if header is None:
            self._append(first)
            sync_folder(self._path.parent)
        for line in lines[1:]:
            self._read_record(line)
        if self.damaged_count:
            _logger.warning(
                "%d damaged lines of %s are measured again",
                self.damaged_count,
                self._path,
            )

    def _read_record(self, line: bytes) -> None:
        node = _decode_line(line)
        if node is None:
            self.damaged_count += 1
            return
        try:
            self._take(_decode_record(node))
        except FormatError as error:
            raise error.in_file(self._path.name) from error

    def _take(self, record: Record) -> None:
        if isinstance(record, VisitRecord):
            self._visits.setdefault(record.name, []).append(record.visit)
            # The line in which its session began may have been damaged.
            self._next_session = max(self._next_session, record.visit.session + 1)
        elif isinstance(record, Retry):
            self._failures.pop(record.name, None)
            self._done.clear()  # there is something to measure again
        elif isinstance(record, OrderDone):
            self._done.add(record.order)
        elif isinstance(record, SessionBegan):
            self._sessions.append(record.conditions)
            began_s = record.began_s
            self._began_s.append(self._changed_s if began_s is None else began_s)
            self._next_session += 1
        else:
            self._failures[record.name] = record.reason


def remove_journal(path: Path) -> None:
    """Delete a journal that is not needed any more, unless another process writes it.

    Raises:
        OSError: It cannot be deleted.
    """
    try:
        with open(path, "r+b") as file:
            lock(file)
            if sys.platform != "win32":
                path.unlink()
        if sys.platform == "win32":  # which deletes no file that is open
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in HELD:
            raise


def _open_alone(path: Path) -> BinaryIO:
    """Open for reading and appending, and lock; the lock goes with the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a failed write leaves nothing behind for the next one.
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - kept open
    except OSError as error:
        raise MeasurementError(
            f"the journal {path} cannot be opened: {error}; check the folder"
        ) from error
    try:
        lock(file)
    except OSError as error:
        file.close()
        if error.errno not in HELD:
            raise MeasurementError(
                f"the journal {path} cannot be locked: {error}; its file system has no "
                "locks. Set XDG_CACHE_HOME, or TMPDIR, to a folder that has"
            ) from error
        raise MeasurementError(
            f"another process is using the journal {path}; wait for it, or stop it and "
            "run the same command again"
        ) from error
    return file


def _write_whole(file: BinaryIO, line: bytes) -> None:
    # An unbuffered file may take a part; on a full disk, the next try says why.
    rest = memoryview(line)
    while rest:
        rest = rest[file.write(rest) :]


def _encode_line(content: dict[str, Json]) -> bytes:
    text = json.dumps(content, sort_keys=True, allow_nan=False).encode()
    return b"%0*x %s\n" % (_CHECKSUM_DIGITS, zlib.crc32(text), text)


def _decode_line(line: bytes) -> JsonNode | None:
    """The line's content; None if it is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%0*x" % (_CHECKSUM_DIGITS, zlib.crc32(text)):
        return None
    return parse_json(text.decode())


def _check_header(node: JsonNode, subject: dict[str, Json], name: str) -> None:
    fields = node.fields("format_version", "subject")
    version = fields["format_version"].integer(minimum=1)
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{name} has format version {version}, this version reads "
            f"{FORMAT_VERSION}; delete it to measure anew",
            path="format_version",
        )
    found = {key: entry.value for key, entry in fields["subject"].entries().items()}
    differing = sorted(
        key for key in found.keys() | subject if found.get(key) != subject.get(key)
    )
    if differing:
        told = "; ".join(
            f"{key}: {_shown(found.get(key))} there, {_shown(subject.get(key))} here"
            for key in differing
        )
        raise IncompatibleTables(
            f"the journal {name} is of another {', '.join(differing)} ({told}); its "
            "visits cannot be mixed with new ones. Name another journal, or delete it"
        )


def _shown(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _decode_record(node: JsonNode) -> Record:
    entries = node.entries()
    if set(entries) == {"retry"}:
        return Retry(name=entries["retry"].fields("name")["name"].text())
    if set(entries) == {"done"}:
        return OrderDone(order=entries["done"].fields("order")["order"].text())
    if set(entries) == {"session"}:
        return _decode_session(entries["session"])
    if set(entries) == {"failure"}:
        fields = entries["failure"].fields("name", "reason")
        return Failure(name=fields["name"].text(), reason=fields["reason"].text())
    fields = node.fields("visit")["visit"].entries()
    name = fields.pop("name", JsonNode(None, "visit.name")).text()
    rest: dict[str, Json] = {key: entry.value for key, entry in fields.items()}
    return VisitRecord(name=name, visit=decode_visit(JsonNode(rest, "visit")))


def _decode_session(node: JsonNode) -> SessionBegan:
    fields = node.entries()
    began = fields.pop("began_s", JsonNode(None, "session.began_s"))
    rest: dict[str, Json] = {key: entry.value for key, entry in fields.items()}
    return SessionBegan(
        conditions=decode_conditions(JsonNode(rest, "session")),
        began_s=began.optional(JsonNode.number),
    )
