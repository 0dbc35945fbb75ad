"""Writing files so that a reader sees the old or the new content, never a part."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["remove_leftovers", "sync_folder", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file at once, or leave it as it was.

    Raises:
        OSError: No space, no permission; nothing is left behind.
    """
    # In the same directory: a rename is atomic within a file system only. Not by
    # `tempfile`, whose files are the owner's alone whatever the umask says.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            # Else a crash may leave the new name on an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what kills left of a file that was being written.

    Only for whoever has the folder for himself: others may be writing it.
    """
    prefix = f".{path.name}."
    for file in path.parent.iterdir():
        if file.name.startswith(prefix):
            file.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk; a file's own sync leaves its new name out."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    with suppress(OSError):  # some file systems have no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
