"""The command that measures a machine: profile."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ofa_deploy.cli.outputs import require_folder
from ofa_deploy.cli.progress import StageBar
from ofa_deploy.cli.tables import (
    show_level,
    show_quality,
    show_range,
    show_table,
    show_table_json,
)
from ofa_deploy.errors import (
    FormatError,
    IncompatibleTables,
    MeasurementError,
    SpaceError,
)
from ofa_deploy.feasibility import reachable_range
from ofa_deploy.held_out import measure_and_judge
from ofa_deploy.named_spaces import named_space
from ofa_deploy.pipeline import DEFAULT_SUPERNET
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.profiling import level_change, measure_table
from ofa_deploy.space import SearchSpace
from ofa_deploy.table_files import cache_folder, find_table, table_folders
from ofa_deploy.target import parse_target
from ofa_deploy.zoo import open_supernet
from profilers.backends import get_backend
from profilers.backends.base import Backend
from profilers.device import this_device
from profilers.table import LatencyTable


def profile(
    *,
    device: str,
    supernet: str | None,
    space: str | None,
    networks: int,
    evaluate: int,
    out: Path | None,
    console: Console,
    quiet: Console,
    as_json: bool,
) -> None:
    """Measure a space, judge the predictor if asked to, and tell of both."""
    target = parse_target(device)
    if space and supernet:
        raise SpaceError(
            f"--space {space} and --supernet {supernet} name two spaces; give one"
        )
    require_folder("--out", out)
    if evaluate == 1:
        raise MeasurementError("--evaluate 1: one network judges nothing; give 2, or 0")
    measured = (
        named_space(space)
        if space
        else open_supernet(supernet or DEFAULT_SUPERNET).space
    )
    backend, folder, quality = get_backend(target.backend), cache_folder(), None
    earlier = _earlier_table(measured, backend, target.threads)
    start_s = time.monotonic()
    with StageBar(quiet if as_json else console) as bar:
        if evaluate:
            table, quality = measure_and_judge(
                measured,
                backend=backend,
                threads=target.threads,
                folder=folder,
                network_count=networks,
                count=evaluate,
                reporter=bar,
            )
        else:
            table = measure_table(
                measured,
                backend=backend,
                threads=target.threads,
                folder=folder,
                network_count=networks,
                reporter=bar,
            )
    minutes = (time.monotonic() - start_s) / 60
    if out is not None:
        table.save(out)
    change = None if earlier is None else level_change(table, earlier)
    predictor = fit_latency_predictor(measured, table)
    reachable = reachable_range(predictor)
    if as_json:
        show_table_json(table, reachable, quality, change, minutes=minutes)
    else:
        show_table(console, table, predictor, minutes=minutes)
        show_level(console, change)
        if quality is not None:
            show_quality(console, quality)
        show_range(console, reachable)


def _earlier_table(
    space: SearchSpace, backend: Backend, threads: int
) -> LatencyTable | None:
    """The table that a new one will take the place of; None if none can be read."""
    try:
        found = find_table(
            space,
            this_device(accelerator=backend.accelerator()),
            backend.runtime(threads=threads),
            folders=table_folders(cache_folder()),
        )
    except (FormatError, IncompatibleTables):
        return None  # measuring anew is the cure
    return None if found is None else found[0]
