"""Progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ofa_deploy.dataset import ImageSet, load_images
from ofa_deploy.errors import few_of


class _Bars(Progress):
    """Bars with something below them."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """See `rich.progress.Progress`."""
        yield self.make_tasks_table(self.tasks)
        if self.below is not None:
            yield self.below


# Between two lines of a stage that lasts, where nothing can be drawn.
LINE_EVERY_S = 60.0


class StageBar:
    """One bar per stage, with what is left of it; a pipeline `Reporter`.

    Where nothing can be drawn, as in the log of a call in the background, each stage is
    a line, and of one that lasts there is another every minute.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._progress = _Bars(
            SpinnerColumn(),
            # A stage's name may hold a file's, and "[/x]" in it is no markup.
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._in_lines = not console.is_terminal or console.is_dumb_terminal
        self._told_at = 0.0
        # Of the current stage, which may go on from where an earlier call ended.
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> StageBar:
        if not self._in_lines:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._in_lines:
            self._progress.stop()

    def begin(self, stage: str) -> None:
        """Start a stage's bar in place of the last one's, and nothing below it."""
        self._progress.below = None
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(stage, total=None, count="")
        self._stage = stage
        self._first = None
        self._tell(stage)

    def advance(self, done: int, total: int) -> None:
        """Move the current stage's bar."""
        if self._task is not None:
            self._progress.update(
                self._task, completed=done, total=total, count=f"{done}/{total}"
            )
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        first_done, first_at = self._first
        if done > first_done and now - self._told_at >= LINE_EVERY_S:
            left_s = (now - first_at) / (done - first_done) * (total - done)
            left = timedelta(seconds=round(left_s))
            self._tell(f"{self._stage}: {done}/{total}, {left} left")

    def _tell(self, line: str) -> None:
        self._told_at = time.monotonic()
        if self._in_lines:
            self._progress.console.print(
                line, markup=False, emoji=False, soft_wrap=True
            )

    def show_below(self, content: RenderableType) -> None:
        """Show something below the bar, until the stage ends."""
        self._progress.below = content

    def advance_stage(self, stage: str, done: int, total: int) -> None:
        """Move a stage's bar, starting it where it is new."""
        if stage != self._stage:
            self.begin(stage)
        self.advance(done, total)


def load_with_progress(path: Path, *, skip_bad: bool, console: Console) -> ImageSet:
    """Read a data set behind a progress bar."""
    with StageBar(console) as bar:
        bar.begin(f"reading {path.name}")
        data, bad = load_images(path, skip_bad=skip_bad, progress=bar.advance)
    if bad:
        told = f"left out {len(bad)} unreadable images: {few_of(bad)}"
        console.print(told, markup=False, emoji=False)
    return data
