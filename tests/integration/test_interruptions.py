"""Ctrl-C and full disks, wherever they strike: a whole bundle is left, or nothing."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ofa_deploy import device_bench, exporting, pipeline, profiling
from ofa_deploy.bundle import Bundle, new_bundle_folder
from ofa_deploy.drift import DriftCheck
from ofa_deploy.errors import DeployError
from ofa_deploy.export.openvino import write_ir
from ofa_deploy.pipeline import Specializer
from ofa_deploy.profiling import NETWORK_COUNT
from ofa_deploy.table_files import table_name
from profilers import LatencyTable
from profilers.files import ABANDONED_S, write_atomically
from tests.support import tiny
from tests.support.tiny_session import fresh, open_session, table_here, write_inputs

REPOSITORY = Path(__file__).resolve().parents[2]
GENEROUS_MS = 10_000.0
# How long the command may take to come to its timing, on a machine that is busy.
PATIENCE_S = 300.0
FULL_DISK_MESSAGE = "No space left on device.*free space"

# Every step of making a bundle that touches the disk: whose function, and which
# call of it.
WRITING: dict[str, tuple[Any, str, int]] = {
    "trying whether out can be made": (tempfile, "mkdtemp", 1),
    "making a folder for the candidates": (tempfile, "mkdtemp", 2),
    "writing a candidate": (Path, "write_bytes", 1),
    "making a folder to export to": (tempfile, "mkdtemp", 3),
    "writing the model": (Path, "write_bytes", 2),
    "writing the reference": (Path, "write_bytes", 3),
    "making the folder beside out": (secrets, "token_hex", 1),
    "copying the first file": (shutil, "copyfile", 1),
    "copying the second file": (shutil, "copyfile", 2),
    "writing the report": (Path, "write_bytes", 4),
    "writing the samples": (Path, "write_text", 1),
    "making the manifest": (secrets, "token_hex", 2),
    "writing the manifest": (os, "fsync", 1),
    "naming the manifest": (Path, "replace", 1),
    "putting a file on the disk": (os, "fsync", 3),
    "naming the bundle": (os, "rename", 1),
}
COMPUTING: dict[str, tuple[Any, str, int]] = {
    "recalibrating": (exporting, "recalibrate", 1),
    "comparing outputs": (exporting, "compare_outputs", 1),
    "confirming": (DriftCheck, "time_with", 1),
    "certifying": (device_bench, "measure_in_fresh_process", 1),
    "drawing the report": (pipeline, "bundle_report", 1),
}
EVERYWHERE = {**WRITING, **COMPUTING}


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def failing_at(point: tuple[Any, str, int], error: BaseException) -> Iterator[None]:
    """Raise in place of one call; the others are as ever."""
    owner, name, number = point
    original = getattr(owner, name)
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield
    assert calls >= number, f"{name} was called {calls} times; is it still a step?"


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """What is found, and how fast it is, is not the subject here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DriftCheck, "time_with", lambda _, files: dict.fromkeys(files, 1.0)
        )
        patch.setattr(
            device_bench, "measure_in_fresh_process", lambda *_, **__: fresh(1.0)
        )
        yield


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Specializer:
    return open_session(tmp_path_factory.mktemp("session"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder that `out` is to be in."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def content(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# -- a bundle --------------------------------------------------------------------------


@pytest.mark.parametrize("point", EVERYWHERE)
def test_an_interruption_leaves_nothing(
    point: str, session: Specializer, home: Path, scratch: Path
) -> None:
    with (
        failing_at(EVERYWHERE[point], KeyboardInterrupt()),
        pytest.raises(KeyboardInterrupt),
    ):
        session.specialize(GENEROUS_MS, out=home / "bundle")
    assert content(home) == content(scratch) == []


@pytest.mark.parametrize("point", WRITING)
def test_a_full_disk_is_told_with_its_cure_and_leaves_nothing(
    point: str, session: Specializer, home: Path, scratch: Path
) -> None:
    with (
        failing_at(WRITING[point], full_disk()),
        pytest.raises(DeployError, match=FULL_DISK_MESSAGE) as told,
    ):
        session.specialize(GENEROUS_MS, out=home / "bundle")
    assert isinstance(told.value.__cause__, OSError)
    assert content(home) == content(scratch) == []


def test_once_there_is_space_the_same_call_gives_the_bundle(
    session: Specializer, home: Path, scratch: Path
) -> None:
    out = home / "bundle"
    full = failing_at(WRITING["writing the samples"], full_disk())
    with full, pytest.raises(DeployError):
        session.specialize(GENEROUS_MS, out=out)
    with session.specialize(GENEROUS_MS, out=out) as bundle:
        assert bundle.check().agrees
    assert list(home.iterdir()) == [out]
    assert content(scratch) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), full_disk()], ids=repr)
def test_an_empty_folder_that_was_there_is_left_empty(
    error: BaseException, session: Specializer, home: Path, scratch: Path
) -> None:
    out = home / "bundle"
    out.mkdir()
    failing = failing_at(WRITING["writing the manifest"], error)
    with failing, pytest.raises((KeyboardInterrupt, DeployError)):
        session.specialize(GENEROUS_MS, out=out)
    assert content(home) == [out]


def test_an_interruption_after_the_last_step_leaves_a_whole_bundle(
    session: Specializer, home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", renamed)
        with pytest.raises(KeyboardInterrupt):
            session.specialize(GENEROUS_MS, out=home / "bundle")
    assert list(home.iterdir()) == [home / "bundle"]
    assert content(scratch) == []
    with Bundle.open(home / "bundle") as bundle:
        assert bundle.check().agrees


@pytest.mark.parametrize("error", [KeyboardInterrupt(), full_disk(), ValueError()])
def test_what_a_new_bundle_folder_holds_vanishes_with_an_error(
    error: BaseException, home: Path
) -> None:
    def write_half(out: Path) -> None:
        with new_bundle_folder(out) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "model.onnx").write_bytes(b"half")
            assert not out.exists()
            raise error

    with pytest.raises(type(error)):
        write_half(home / "bundle")
    assert content(home) == []


def test_what_a_kill_left_of_a_bundle_goes_a_day_later(tmp_path: Path) -> None:
    for name in (".bundle.partial-old", ".bundle.partial-new", ".other.partial-old"):
        (tmp_path / name).mkdir()
        if name.endswith("old"):
            long_ago_s = time.time() - 2 * ABANDONED_S
            os.utime(tmp_path / name, (long_ago_s, long_ago_s))
    with new_bundle_folder(tmp_path / "bundle") as folder:
        (folder / "model").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".bundle.partial-new", ".other.partial-old", "bundle"),
    ]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere files have no such modes")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_who_may_read_what_is_written_is_up_to_the_umask(mask: int, home: Path) -> None:
    with umask(mask), new_bundle_folder(home / "bundle") as folder:
        write_atomically(folder / "manifest.json", b"{}")
    modes = [one.stat().st_mode & 0o777 for one in content(home)]
    assert modes == [0o777 & ~mask, 0o666 & ~mask]


def test_an_empty_current_folder_becomes_the_bundle(
    session: Specializer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = home / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with session.specialize(GENEROUS_MS, out=".") as bundle:
        monkeypatch.chdir(home)  # the old folder is gone
        assert bundle.path == here.resolve()
        bundle.check()


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """What is beyond is refused by the system, as by a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_while_the_runtime_writes_is_told_with_its_cure(
    tmp_path: Path, home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_on_a_full_disk(model: bytes, xml_path: Path) -> None:
        with files_of_at_most(4096):
            write_ir(model, xml_path)

    session = open_session(tmp_path, backend="openvino-cpu")
    monkeypatch.setattr(exporting, "write_ir", write_on_a_full_disk)
    with pytest.raises(DeployError, match="free space"):
        session.specialize(GENEROUS_MS, out=home / "bundle")
    assert content(home) == content(scratch) == []


# -- a table ---------------------------------------------------------------------------


def test_a_disk_that_is_full_after_profiling_leaves_the_journal_and_no_table(
    session: Specializer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profiled(*_: object, journal_path: Path, **__: object) -> LatencyTable:
        journal_path.parent.mkdir()
        journal_path.write_text("all visits")
        return table_here("onnxruntime-cpu")

    cache = tmp_path / "cache"
    name = table_name(tiny.SPACE, session.device, session.runtime)
    monkeypatch.setattr(profiling, "profile_space", profiled)
    with (
        failing_at((os, "fsync", 1), full_disk()),
        pytest.raises(DeployError, match=FULL_DISK_MESSAGE),
    ):
        Specializer("onnxruntime-cpu", supernet=session.supernet, cache=cache)
    (left,) = content(cache)
    assert left == (cache / name).with_suffix(f".{NETWORK_COUNT}.journal")
    assert left.read_text() == "all visits"


# -- a file ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), full_disk()], ids=repr)
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Path, "open"), (os, "fsync"), (Path, "replace")],
)
def test_a_file_that_cannot_be_replaced_stays_as_it_was(
    owner: Any, name: str, error: BaseException, home: Path
) -> None:
    file = home / "table.json"
    file.write_bytes(b"old")
    failing = failing_at((owner, name, 1), error)
    with failing, pytest.raises((KeyboardInterrupt, OSError)):
        write_atomically(file, b"new")
    assert content(home) == [file]
    assert file.read_bytes() == b"old"


# -- the command -----------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_command_that_times_leaves_nothing_and_shows_no_traceback(
    number: signal.Signals, tmp_path: Path, home: Path
) -> None:
    supernet, table = write_inputs(tmp_path, backend="onnxruntime-cpu")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "ofa_deploy", "specialize"]
    command += ["--device", "onnxruntime-cpu", "--latency-ms", str(GENEROUS_MS)]
    command += ["--supernet", str(supernet), "--table", str(table), "--accept-drift"]
    process = subprocess.Popen(
        [*command, "--out", str(home / "bundle")],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to the whole group
        # A shell lets what it runs in the background ignore Ctrl-C, and so would this.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # Written last before the certifying, which takes seconds; candidates' files are
        # a folder further down.
        wait_for(lambda: any(scratch.glob("ofa-deploy-*/model.onnx")), process)
        os.killpg(process.pid, number)
        output, told = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number
    assert "interrupted: nothing half-written was left" in told
    assert "Traceback" not in output + told
    assert content(home) == []
    # ONNX Runtime leaves a file of its own in the folder of temporary files.
    assert list(scratch.glob("ofa-deploy*")) == []
