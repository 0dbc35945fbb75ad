"""What a long call shows of its progress, with a terminal and without."""

from __future__ import annotations

import re
import time
from io import StringIO

import pytest
from rich.console import Console

from ofa_deploy.cli import progress
from ofa_deploy.cli.progress import StageBar


def told(*, terminal: bool = False, quiet: bool = False) -> str:
    """Of a call of two stages, one of four steps."""
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, quiet=quiet, width=80)
    with StageBar(console) as bar:
        bar.begin("reading [/x]")
        for done in range(5):
            bar.advance_stage("timing", done, 4)
    return file.getvalue()


def test_in_a_log_each_stage_is_a_line() -> None:
    assert told() == "reading [/x]\ntiming\n"


def test_in_a_log_a_stage_that_lasts_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    lines = [line for line in told().splitlines() if "left" in line]
    # Of what has not begun nothing is known.
    assert [re.sub(r"\d:\d\d:\d\d", "?", line) for line in lines] == [
        f"timing: {done}/4, ? left" for done in range(1, 5)
    ]


def test_what_is_left_is_told_by_what_this_call_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine of ten steps were an earlier call's, which was killed."""
    now_s = iter([0.0, 0.0, 60.0, 60.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    file = StringIO()
    bar = StageBar(Console(file=file))
    bar.begin("training")
    bar.advance(900, 1000)
    bar.advance(910, 1000)
    assert file.getvalue() == "training\ntraining: 910/1000, 0:09:00 left\n"


def test_a_line_is_as_long_as_it_has_to_be() -> None:
    file = StringIO()
    with StageBar(Console(file=file, width=80)) as bar:
        bar.begin("x" * 100)
    assert file.getvalue() == "x" * 100 + "\n"


def test_a_terminal_that_cannot_draw_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert told(terminal=True) == told()


def test_nothing_is_told_where_nothing_is_to_be() -> None:
    assert told(quiet=True) == ""


def test_a_terminal_has_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    assert "left" not in told(terminal=True)
