"""What to measure of a space, and measuring it on this machine."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from ofa_deploy.errors import IncompatibleTables
from ofa_deploy.export.onnx import emit_block, emit_network, random_weights
from ofa_deploy.plan import all_blocks, lower
from ofa_deploy.space import SearchSpace, SubnetConfig
from ofa_deploy.space_file import space_sha256
from profilers.backends.base import Backend
from profilers.device import DeviceSpec, RuntimeSpec, this_device
from profilers.measure import MeasureSettings, ModelUnderTest, measure_models
from profilers.table import LatencyTable, require_compatible

NETWORK_COUNT = 48
Progress = Callable[[int, int], None]


def calibration_networks(
    space: SearchSpace, *, count: int, rng: np.random.Generator
) -> list[SubnetConfig]:
    """Networks that calibrate a predictor: the extremes, and a spread between them.

    Uniform sampling crowds around the middle; here a large sample is ordered by
    multiply-accumulates and thinned evenly.
    """
    drawn = [
        space.decode(row) for row in np.unique(space.sample(20 * count, rng), axis=0)
    ]
    ordered = sorted(drawn, key=lambda config: lower(space, config).mac_count)
    picked = np.unique(np.linspace(0, len(ordered) - 1, max(count - 2, 1)).astype(int))
    chosen = [space.smallest(), *(ordered[i] for i in picked), space.largest()]
    return list(dict.fromkeys(chosen))


def models_to_measure(
    space: SearchSpace, *, network_count: int, rng: np.random.Generator
) -> tuple[list[ModelUnderTest], list[ModelUnderTest]]:
    """Every block of the space, and some whole networks, as ONNX with random weights.

    Latency depends on shapes, not on values; random weights spare a table from the
    training that happened to be at hand.
    """
    blocks = [
        ModelUnderTest(name=key, model=emit_block(block, rng=rng))
        for key, block in sorted(all_blocks(space).items())
    ]
    networks = []
    for config in calibration_networks(space, count=network_count, rng=rng):
        plan = lower(space, config)
        weights = random_weights(plan.layers, rng=rng)
        model = emit_network(plan, weights, form="fused")
        networks.append(ModelUnderTest(name=config.id, model=model))
    return blocks, networks


def profile_space(
    space: SearchSpace,
    *,
    backend: Backend,
    threads: int,
    settings: MeasureSettings,
    network_count: int = NETWORK_COUNT,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure a space on this machine."""
    rng = np.random.default_rng(settings.seed)
    blocks, networks = models_to_measure(space, network_count=network_count, rng=rng)
    run = measure_models(
        blocks + networks,
        backend=backend,
        threads=threads,
        settings=settings,
        progress=progress,
        rng=rng,
    )
    measured = {m.name: m for m in run.measurements}
    return LatencyTable(
        origin="measured",
        space_name=space.name,
        space_sha256=space_sha256(space),
        device=this_device(),
        runtime=backend.runtime(threads=threads),
        settings=settings,
        conditions=run.conditions,
        beta=run.beta,
        anchor_reference_ns=run.anchor_reference_ns,
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(),
        blocks={model.name: measured[model.name] for model in blocks},
        networks={model.name: measured[model.name] for model in networks},
    )


def table_name(space: SearchSpace, device: DeviceSpec, runtime: RuntimeSpec) -> str:
    """File name of the table of a space on a device with a runtime."""
    version = runtime.version.split("-")[0]
    return (
        f"{space.name}-{space_sha256(space)[:8]}_{device.fingerprint}_"
        f"{runtime.backend}-{version}_{runtime.precision}_t{runtime.threads}.json"
    )


def cache_folder() -> Path:
    """Where tables measured on this machine are kept."""
    return user_cache_path("ofa-deploy") / "latency_tables"


def find_table(
    space: SearchSpace,
    device: DeviceSpec,
    runtime: RuntimeSpec,
    *,
    folders: tuple[Path, ...],
) -> tuple[LatencyTable, Path] | None:
    """The first table that fits, or None where there is none.

    Raises:
        FormatError: A table of the right name is damaged.
    """
    name = table_name(space, device, runtime)
    for folder in folders:
        path = folder / name
        if path.is_file():
            return open_table(path, space, device, runtime), path
    return None


def open_table(
    path: Path, space: SearchSpace, device: DeviceSpec, runtime: RuntimeSpec
) -> LatencyTable:
    """Read a table and check that it may be used here.

    Raises:
        FormatError: Damaged, or not a table.
        IncompatibleTables: Of another space, device or runtime, or not measured.
    """
    table = LatencyTable.load(path)
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
