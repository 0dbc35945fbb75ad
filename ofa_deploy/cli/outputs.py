"""Files that commands are told to write."""

from __future__ import annotations

from pathlib import Path

from ofa_deploy.errors import DeployError


def require_folder(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written before minutes are spent on it.

    Raises:
        DeployError: It is a folder, or there is none for it.
    """
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise DeployError(
            f"{option} {file}: there is no folder {file.absolute().parent}; make it, "
            "or name another file"
        )
    if file.is_dir():
        raise DeployError(f"{option} {file} is a folder; name a file in it")
