"""Interpreters that this package starts for itself, and how they ended."""

from __future__ import annotations

import os
import signal
import site
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from profilers.errors import RunFailed

__all__ = [
    "describe_exit",
    "end_with",
    "last_words",
    "own_stdout",
    "package_environment",
    "profilers_command",
    "run_for_line",
]

STDERR_TAIL_CHARACTERS = 2000
# How often a process looks whether its parent is still there.
PARENT_CHECK_S = 1.0

# What another interpreter runs, whose packages may be of another version.
_FORGET_CURRENT_FOLDER = "import sys; sys.path[:] = [path for path in sys.path if path]"
# One that measures on would disturb whatever is begun in its place.
_END_WITH_PARENT = """
import os, threading
def wait():
    while os.read(0, 1): pass
    os._exit(1)
threading.Thread(target=wait, daemon=True).start()
"""
_RUN = """
import runpy
runpy.run_module("profilers", run_name="__main__", alter_sys=True)
"""


def run_for_line(
    arguments: Sequence[str],
    *,
    label: str,
    timeout_s: float,
    cure: str,
    interpreter: str | None = None,
) -> str:
    """Run `python -m profilers` with arguments; return the last line it printed.

    Args:
        arguments: Of the command line, the subcommand first.
        label: What the process does, for messages.
        timeout_s: After which it is stopped.
        cure: What to do if that is not enough, for the message.
        interpreter: Python to run; None takes this one.

    Returns:
        The line; empty if there is none.

    Raises:
        RunFailed: The process did not start, failed, crashed, or took too long.
    """
    # On Windows what a thread reads from holds up whoever asks what kind of file it is.
    with_parent = os.name == "posix"
    command = [*profilers_command(interpreter, with_parent=with_parent), *arguments]
    try:
        # The child reads from it until this process ends, however it does.
        read, write = os.pipe()
    except OSError as error:
        raise RunFailed(f"{label} could not be started: {error}") from error
    try:
        finished = subprocess.run(
            command,
            capture_output=True,
            check=False,
            encoding="utf-8",
            env=package_environment(),
            errors="replace",
            stdin=read if with_parent else subprocess.DEVNULL,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(
            f"{label} took more than {timeout_s:g} s and was stopped; {cure}"
        ) from error
    except OSError as error:
        raise RunFailed(
            f"{label} could not be started: {error}; check {command[0]}"
        ) from error
    finally:
        os.close(read)
        os.close(write)
    if finished.returncode != 0:
        raise RunFailed(
            f"{label} ended {describe_exit(finished.returncode)}; its last words: "
            f"{last_words(finished.stderr)}"
        )
    lines = finished.stdout.splitlines()
    return lines[-1] if lines else ""


def last_words(errors: str) -> str:
    """The end of what a process wrote to its error output."""
    return errors[-STDERR_TAIL_CHARACTERS:].strip() or "none"


def describe_exit(code: int) -> str:
    """An exit code in words, to be read after "ended"."""
    if code >= 0:
        return f"with exit code {code}"
    # Signals of the system that have no name in Python stay numbers.
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"by signal {-code}"
    told = " (as systems do that have no memory left)" if name == "SIGKILL" else ""
    return f"by signal {name}{told}"


def own_stdout() -> Callable[[str], None]:
    """A way to write lines that nothing else in this process can write between.

    Runtimes print to the standard output as they please, and what C code printed comes
    out at the end; from here on that goes where their errors go.
    """
    sys.stdout.flush()
    handle = os.dup(1)
    os.dup2(2, 1)

    def write(line: str) -> None:
        # Whole lines in one call: a reader that sees a part of one sees no end of it.
        rest = memoryview(f"{line}\n".encode())
        while rest:
            rest = rest[os.write(handle, rest) :]

    return write


def profilers_command(
    interpreter: str | None = None, *, with_parent: bool = False
) -> tuple[str, ...]:
    """What starts `python -m profilers` so that arguments can follow.

    Without what lies in the current folder, from where `-m` would import first: a
    user's statistics.py, for one, in place of the standard library's.

    Args:
        interpreter: Python to run; None takes this one.
        with_parent: Whether it ends once nobody holds the other end of its input,
            which it must not read itself.
    """
    steps = [_FORGET_CURRENT_FOLDER, _RUN]
    if with_parent:
        steps.insert(1, _END_WITH_PARENT)
    return (interpreter or sys.executable, "-c", "\n".join(steps))


def end_with(parent_id: int) -> None:
    """Have this process end soon after the one that began it, whatever it is doing.

    Windows tells no process that its parent is gone; there it goes on.

    Args:
        parent_id: Of the process that began this one.
    """

    def watch() -> None:
        while os.getppid() == parent_id:
            time.sleep(PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def package_environment() -> dict[str, str]:
    """The environment, with this package importable wherever it was imported from."""
    environment = dict(os.environ)
    home = str(Path(__file__).resolve().parent.parent)
    # The installed packages' directory is searched anyway; named in PYTHONPATH it
    # would come before the standard library.
    installed = (
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        site.getusersitepackages(),
    )
    if home not in (str(Path(folder).resolve()) for folder in installed):
        given = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{home}{os.pathsep}{given}" if given else home
    return environment
