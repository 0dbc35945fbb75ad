"""Answers that took long, on the disk until the call that they are for is over.

Certifying at a slow rate, or after an hour of load, takes hours. A call that is killed
and made again goes on from the last process that ended; one that got its answer leaves
nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from profilers.files import write_atomically
from profilers.json_reader import Json

__all__ = ["KeptTexts"]

# What nobody came back for by then is removed by the next call, whatever it is of.
FORGOTTEN_S = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTexts:
    """Texts of one call by name, each on the disk whole or not at all.

    Attributes:
        folder: Theirs alone.
    """

    folder: Path

    @classmethod
    def of(cls, root: Path, subject: dict[str, Json]) -> KeptTexts:
        """Those of a call.

        Args:
            root: Of all calls' folders.
            subject: What the call is, and on what; of any other, nothing is read.
        """
        for folder in root.glob("*"):
            if not _is_fresh(folder, FORGOTTEN_S):
                shutil.rmtree(folder, ignore_errors=True)
        digest = hashlib.sha256(json.dumps(subject, sort_keys=True).encode())
        return cls(folder=root / digest.hexdigest()[:16])

    def read(self, name: str, *, fresh_s: float) -> str | None:
        """A text; None where there is none, or all are older than `fresh_s` seconds.

        The last one counts: until then the call went on without a break.
        """
        if not _is_fresh(self.folder, fresh_s):
            self.forget()
            return None
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def keep(self, name: str, text: str) -> None:
        """Put a text on the disk.

        Where there is no room for it a call that is killed begins anew, which is no
        reason to end this one.
        """
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, text.encode())

    def forget(self) -> None:
        """Remove all: the call is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_fresh(folder: Path, fresh_s: float) -> bool:
    """Whether something was put there lately; not, where the clock says in future."""
    try:
        return abs(time.time() - folder.stat().st_mtime) <= fresh_s
    except OSError:
        return False
