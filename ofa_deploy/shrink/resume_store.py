"""What a call keeps for itself, to go on from after a kill: small answers, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ofa_deploy.errors import TrainingError
from profilers.files import write_atomically

FORMAT_VERSION = 1


def remember(path: Path, content: Any) -> None:
    """Keep what JSON can hold; the old content is there until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"format_version": FORMAT_VERSION, "content": content}
    write_atomically(path, json.dumps(kept, allow_nan=False).encode())


def recall(path: Path) -> Any:
    """What was kept.

    Raises:
        TrainingError: The file cannot be read, is damaged, or of another version.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read: {error}. Check its permissions, and the disk"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(
            f"{path} is damaged ({error}); remove it: what it kept is found anew"
        ) from error
    if not isinstance(kept, dict) or kept.get("format_version") != FORMAT_VERSION:
        raise TrainingError(
            f"{path} was kept by another version; remove it: what it kept is found anew"
        )
    return kept["content"]


def remembered(path: Path | None, find: Callable[[], Any]) -> Any:
    """What a call that was killed had found, and otherwise what is found now.

    Args:
        path: Of the file that keeps it; None to keep nothing.
        find: Gives what JSON can hold.

    Raises:
        TrainingError: See `recall`.
    """
    if path is not None and path.is_file():
        return recall(path)
    found = find()
    if path is not None:
        remember(path, found)
    return found
