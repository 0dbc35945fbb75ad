"""A journal gives back what was written, whatever happens to the file."""

from __future__ import annotations

import errno
import json
import os
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import profilers.journal as journal_module
from profilers.errors import FormatError, IncompatibleTables, MeasurementError
from profilers.journal import (
    Failure,
    Journal,
    SessionBegan,
    VisitRecord,
    remove_journal,
)
from profilers.json_reader import Json
from profilers.measurement import Visit
from tests.unit.test_profilers_table import CONDITIONS

SUBJECT: dict[str, Json] = {"runtime": "fake 1", "order": "a" * 64}


def visit(number: int) -> VisitRecord:
    return VisitRecord(
        name=f"net{number % 3}",
        visit=Visit(
            time_ns=number,
            anchor_before_ns=250_000,
            anchor_after_ns=251_000 + number,
            inner_loops=1,
            samples_ns=(1_000 + number, 2_000),
        ),
    )


RECORDS: list[VisitRecord | Failure] = [
    visit(0),
    visit(1),
    Failure(name="net2", reason="crashed"),
    visit(3),
]


def written(path: Path) -> bytes:
    with Journal(path, subject=SUBJECT) as journal:
        for record in RECORDS:
            journal.add(record)
    return path.read_bytes()


def contents(journal: Journal) -> set[object]:
    found: set[object] = set(journal.failures.items())
    for name in ("net0", "net1", "net2"):
        found |= {(name, entry) for entry in journal.visits_of(name)}
    return found


def expected(records: list[VisitRecord | Failure]) -> set[object]:
    return {
        (r.name, r.visit if isinstance(r, VisitRecord) else r.reason) for r in records
    }


def test_what_was_added_is_there_after_opening_again(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    with Journal(tmp_path / "journal", subject=SUBJECT) as journal:
        assert contents(journal) == expected(RECORDS)
        assert journal.damaged_count == 0


def test_a_journal_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal"
    content = written(path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = max(0, sum(end <= cut for end in ends) - 1)  # the header is no record
        with Journal(path, subject=SUBJECT) as journal:
            assert contents(journal) == expected(RECORDS[:whole])
            journal.add(visit(6))
        with Journal(path, subject=SUBJECT) as journal:
            assert contents(journal) == expected([*RECORDS[:whole], visit(6)])
            assert journal.damaged_count == 0


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_damaged_byte_costs_at_most_the_records_it_touches(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    content = bytearray(written(path))
    header = content.index(b"\n") + 1
    place = data.draw(st.integers(header, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with Journal(path, subject=SUBJECT) as journal:
        found = contents(journal)
    assert found < expected(RECORDS)
    # A newline lost joins two lines, or cuts the last one off.
    assert len(found) >= len(RECORDS) - 2


def test_sessions_are_numbered_on_whatever_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, subject=SUBJECT) as journal:
        assert journal.next_session == 0
        for number in range(3):
            assert journal.next_session == number
            journal.add(SessionBegan(conditions=CONDITIONS, began_s=1e9))
            journal.add(
                replace(visit(1), visit=replace(visit(1).visit, session=number))
            )
    lines = path.read_bytes().split(b"\n")
    for damaged in range(1, 6):
        content = [*lines[:damaged], b"x", *lines[damaged + 1 :]]
        path.write_bytes(b"\n".join(content))
        with Journal(path, subject=SUBJECT) as journal:
            assert journal.damaged_count == 1
            taken = {entry.session for entry in journal.visits_of("net1")}
            assert journal.next_session not in taken
            assert set(journal.sessions) == {CONDITIONS}


def test_a_journal_began_with_its_oldest_session(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for began_s in (2e9, 1e9, 1.5e9):  # a clock may be put back
        with Journal(path, subject=SUBJECT) as journal:
            journal.add(SessionBegan(conditions=CONDITIONS, began_s=began_s))
            told_s = journal.began_s
    with Journal(path, subject=SUBJECT) as journal:
        assert journal.began_s == told_s == 1e9


def test_sessions_without_a_time_are_as_old_as_the_last_change_of_their_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal"
    written(path)
    text = json.dumps({"session": asdict(CONDITIONS)}, sort_keys=True).encode()
    path.write_bytes(path.read_bytes() + b"%08x %s\n" % (zlib.crc32(text), text))
    os.utime(path, (1e9, 1e9))
    with Journal(path, subject=SUBJECT) as journal:
        assert journal.began_s == 1e9
        assert journal.sessions == (CONDITIONS,)
        assert contents(journal) == expected(RECORDS)
        journal.add(SessionBegan(conditions=CONDITIONS, began_s=2e9))
        assert journal.began_s == 1e9


def test_a_journal_begun_anew_is_as_if_nothing_had_been_added(tmp_path: Path) -> None:
    with Journal(tmp_path / "new", subject=SUBJECT):
        pass
    path = tmp_path / "journal"
    written(path)
    os.utime(path, (1e9, 1e9))
    with Journal(path, subject=SUBJECT) as journal:
        journal.begin_anew()
        assert contents(journal) == set()
        assert journal.next_session == 0
        assert journal.began_s > 1e9
        assert path.read_bytes() == (tmp_path / "new").read_bytes()
        journal.add(visit(6))
    with Journal(path, subject=SUBJECT) as journal:
        assert contents(journal) == expected([visit(6)])


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with (
        Journal(path, subject=SUBJECT),
        pytest.raises(MeasurementError, match="another process is using the journal"),
    ):
        Journal(path, subject=SUBJECT)
    Journal(path, subject=SUBJECT).close()


def test_a_journal_is_removed_unless_another_process_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    remove_journal(path)  # there is none
    with Journal(path, subject=SUBJECT):
        remove_journal(path)
        assert path.exists()
    remove_journal(path)
    assert not path.exists()


def test_a_file_system_without_locks_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(journal_module, "lock", no_locks)
    with pytest.raises(MeasurementError, match="its file system has no locks"):
        Journal(tmp_path / "journal", subject=SUBJECT)


def test_a_journal_of_something_else_is_refused_by_what_differs(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal"
    before = written(path)
    words = r'is of another runtime \(runtime: "fake 1" there, "fake 2" here\)'
    with pytest.raises(IncompatibleTables, match=words):
        Journal(path, subject={**SUBJECT, "runtime": "fake 2"})
    assert path.read_bytes() == before


def test_what_a_power_cut_left_empty_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, subject=SUBJECT):
        pass
    header = path.read_bytes()
    for kept in (0, 5, len(header) - 1):
        path.write_bytes(header[:kept].ljust(len(header), b"\0"))
        with Journal(path, subject=SUBJECT):
            assert path.read_bytes() == header
    with Journal(path, subject=SUBJECT) as journal:
        journal.add(RECORDS[0])
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))  # the next record, not yet on the disk
    with Journal(path, subject=SUBJECT) as journal:
        assert journal.damaged_count == 0
        assert path.read_bytes() == whole


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"my holiday photographs\n")
    with pytest.raises(FormatError, match="is not a journal"):
        Journal(path, subject=SUBJECT)
    assert path.read_bytes() == b"my holiday photographs\n"


@pytest.mark.parametrize("content", [b"notes", b"{", b"deadbeef {}", bytes(4096)])
def test_a_file_without_an_end_of_line_is_no_journal_and_kept(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="notes is not a journal"):
        Journal(path, subject=SUBJECT)
    assert path.read_bytes() == content


def test_a_full_disk_is_an_error_and_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    before = written(path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(path, subject=SUBJECT) as journal:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            MeasurementError, match="No space left on device; make room"
        ):
            journal.add(visit(6))
        assert path.read_bytes() == before
        monkeypatch.undo()
        journal.add(visit(6))
    with Journal(path, subject=SUBJECT) as journal:
        assert contents(journal) == expected([*RECORDS, visit(6)])
