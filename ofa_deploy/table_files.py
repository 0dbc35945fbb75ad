"""Latency tables as files: names, where they are looked for, which may be used."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path

import latency_tables
from ofa_deploy.errors import DeviceUnfit, FormatError, IncompatibleTables
from ofa_deploy.space import SearchSpace
from ofa_deploy.space_file import space_sha256
from profilers.device import DeviceSpec, RuntimeSpec
from profilers.table import LatencyTable, require_compatible


def table_name(space: SearchSpace, device: DeviceSpec, runtime: RuntimeSpec) -> str:
    """File name of the table of a space on a device with a runtime."""
    subject = f"{space.name}-{space_sha256(space)[:8]}"
    return f"{subject}_{where_label(device, runtime)}.json"


def where_label(device: DeviceSpec, runtime: RuntimeSpec) -> str:
    """Device and runtime, as names of files have them."""
    version = runtime.version.split("-")[0]
    return (
        f"{device.fingerprint}_{runtime.backend}-{version}_"
        f"{runtime.precision}_t{runtime.threads}"
    )


def cache_folder() -> Path:
    """Where tables measured on this machine are kept.

    Raises:
        DeviceUnfit: The user has no home folder, and no other is named.
    """
    try:
        return user_cache_path("ofa-deploy") / "latency_tables"
    except RuntimeError as error:
        raise DeviceUnfit(
            f"there is no folder to keep latency tables in ({error}); set HOME, or "
            "XDG_CACHE_HOME, to a folder that can be written"
        ) from error


def table_folders(cache: Path) -> tuple[Path, Path]:
    """Where tables are looked for: measured here, then those that came along."""
    return cache, Path(latency_tables.__path__[0])


def find_table(
    space: SearchSpace,
    device: DeviceSpec,
    runtime: RuntimeSpec,
    *,
    folders: tuple[Path, ...],
) -> tuple[LatencyTable, Path] | None:
    """The first table of the right name, or None where there is none.

    Raises:
        FormatError: It is damaged.
        IncompatibleTables: It was not measured here with just this runtime.
    """
    name = table_name(space, device, runtime)
    for folder in folders:
        path = folder / name
        if _is_there(path):
            return open_table(path, space, device, runtime), path
    return None


def _is_there(path: Path) -> bool:
    """Whether a file can be seen; what another user keeps for himself cannot."""
    try:
        return path.is_file()
    except PermissionError:
        return False


def open_table(
    path: Path, space: SearchSpace, device: DeviceSpec, runtime: RuntimeSpec
) -> LatencyTable:
    """Read a table and check that it may be used here.

    Raises:
        FormatError: Damaged, or not a table.
        IncompatibleTables: Of another space, device or runtime, or not measured.
    """
    try:
        table = LatencyTable.load(path)
    except FormatError as error:
        # Among several folders' files of the same name, people must find this one.
        raise error.in_file(f"{path.parent}") from error
    if table.origin != "measured":
        raise IncompatibleTables(
            f"{path.name} is {table.origin}, not measured; latencies are only taken "
            "from measurements. Run `ofa-deploy profile` on the device"
        )
    if table.space_sha256 != space_sha256(space):
        raise IncompatibleTables(
            f"{path.name} is of space {table.space_name} "
            f"({table.space_sha256[:8]}), not of {space.name} "
            f"({space_sha256(space)[:8]}). Run `ofa-deploy profile` for this space"
        )
    require_compatible(table, device, runtime)
    return table
