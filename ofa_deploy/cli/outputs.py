"""Files that commands are told to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ofa_deploy.errors import DeployError


def require_folder(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written before minutes are spent on it.

    Raises:
        DeployError: It is a folder, there is none for it, or none that can be written.
    """
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise DeployError(
            f"{option} {file}: there is no folder {file.absolute().parent}; make it, "
            "or name another file"
        )
    try:
        is_folder = file.is_dir()
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    except OSError as error:
        raise DeployError(
            f"{option} {file} cannot be written: {error}; name another file"
        ) from error
    os.close(handle)
    os.unlink(name)
    if is_folder:
        raise DeployError(f"{option} {file} is a folder; name a file in it")
