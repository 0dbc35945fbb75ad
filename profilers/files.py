"""Writing files so that a reader sees the old or the new content, never a part."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

__all__ = [
    "ABANDONED_S",
    "MAX_FILE_BYTES",
    "remove_leftovers",
    "sha256_of",
    "sync_folder",
    "write_atomically",
]

# After which nobody is at work on a file, or a folder, any more.
ABANDONED_S = 24 * 3600.0
# Larger than any model that a runtime here loads.
MAX_FILE_BYTES = 2**31
_BLOCK_BYTES = 2**20


def sha256_of(path: Path) -> str:
    """Digest of a file, in hexadecimal digits; the file is never whole in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


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


def remove_leftovers(path: Path, *, older_than_s: float = 0.0) -> None:
    """Remove what kills left of a file that was being written.

    Args:
        path: The file.
        older_than_s: Age of what goes. 0 is for whoever has the folder for himself:
            others may be writing it.
    """
    prefix, latest_s = f".{path.name}.", time.time() - older_than_s
    for file in path.parent.iterdir():
        with suppress(FileNotFoundError):  # whoever was writing it has ended
            if file.name.startswith(prefix) and (
                older_than_s == 0 or file.stat().st_mtime <= latest_s
            ):
                file.unlink()


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
