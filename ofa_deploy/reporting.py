"""How long calls tell of their progress, without printing."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """What is told of a long call's progress; `rich` bars in the command line."""

    def begin(self, stage: str) -> None:
        """A stage has begun."""

    def advance(self, done: int, total: int) -> None:
        """The stage stands at `done` of `total`."""


class Silent:
    """A reporter that says nothing."""

    def begin(self, stage: str) -> None:
        """Do nothing."""

    def advance(self, done: int, total: int) -> None:
        """Do nothing."""
