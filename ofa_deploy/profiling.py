"""What to measure of a space, and measuring it on this machine."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ofa_deploy.errors import (
    MeasurementError,
)
from ofa_deploy.export.runtime_format import (
    timed_block,
    timed_network,
    write_timed,
)
from ofa_deploy.layers import BlockPlan
from ofa_deploy.plan import NetworkPlan, all_blocks, lower
from ofa_deploy.predict.block_costs import (
    BlockCosts,
    features,
    look_up_blocks,
    sample_runnable,
)
from ofa_deploy.predict.optimal_design import choose_informative
from ofa_deploy.reporting import Reporter
from ofa_deploy.space import SearchSpace, SubnetConfig, first_of_each
from ofa_deploy.space_file import space_sha256
from ofa_deploy.table_files import table_name
from profilers.backends.base import Backend
from profilers.codec import encode_flat
from profilers.device import this_device
from profilers.execute import OrderResult, collect, execute
from profilers.files import ABANDONED_S, remove_leftovers
from profilers.journal import Journal, remove_journal
from profilers.json_reader import Json
from profilers.measurement import Measurement, MeasureSettings
from profilers.order import GROUP_SIZE, WorkOrder
from profilers.summary import fit_visits
from profilers.table import LatencyTable

NETWORK_COUNT = 48
# Visits of blocks and small networks are soon over: passes of a second spread them.
PROFILE_SETTINGS = replace(MeasureSettings.screen(), max_seconds=10.0, pass_seconds=1.0)
# What was measured yesterday evening still counts when profiling goes on this morning;
# later, the machine may have become another one.
KEPT_H = 24.0
# Blocks open at a time; they are small.
BLOCK_GROUP_SIZE = 256
# Of which calibration networks are chosen.
CANDIDATES_PER_NETWORK = 20
Progress = Callable[[int, int], None]
# A block and a network may share a key.
_BLOCK, _NETWORK = "block:", "network:"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationNetworks:
    """Different networks to calibrate a predictor by.

    Args:
        drawn: At random from the space; only these show how far a prediction for a
            network of the space is likely to be off, as the others are unlike most.
        chosen: For what they tell of the prices.
    """

    drawn: tuple[SubnetConfig, ...]
    chosen: tuple[SubnetConfig, ...]

    @property
    def every(self) -> tuple[SubnetConfig, ...]:
        """All of them."""
        return (*self.chosen, *self.drawn)


def calibration_networks(
    space: SearchSpace, costs: BlockCosts, *, count: int, rng: np.random.Generator
) -> CalibrationNetworks:
    """Networks that calibrate a predictor: landmarks, random ones, the informative.

    The landmarks are the smallest, the largest and the middle one, which is the anchor
    model. A third are drawn at random. They crowd around the middle, so a sixth is a
    large sample ordered by its expected latency and thinned evenly; the rest are those
    whose prediction would be the least certain otherwise, as far as blocks are worth
    the same at every resolution.

    Args:
        space: Where they are from.
        costs: Measured blocks; networks with one that failed are left out.
        count: How many, at least 2; fewer where there are fewer.
        rng: Of the sample.
    """
    configs = (space.smallest(), space.largest(), space.middle())
    landmarks = np.stack([space.encode(config) for config in configs])
    landmarks = landmarks[first_of_each(landmarks)]
    runnable = np.isfinite(features(space, costs, landmarks)).all(axis=1)
    landmarks = landmarks[runnable]
    candidates = sample_runnable(space, costs, CANDIDATES_PER_NETWORK * count, rng)
    pool = np.concatenate([landmarks, candidates])
    pool = pool[first_of_each(pool)]
    if not len(pool):
        return CalibrationNetworks(drawn=(), chosen=())
    matrix = features(space, costs, pool)
    expected_ms = matrix[:, 1 : 2 + len(space.stages)].sum(axis=1)
    count = min(count, len(pool))
    # The pool's first rows; those after them are in the order in which they were drawn.
    begun = np.arange(min(len(landmarks), count))
    drawn_count = min(count // 3, count - len(begun))
    random = len(landmarks) + np.arange(drawn_count)
    places = np.linspace(0, len(pool) - 1, max(2, count // 6)).astype(int)
    spread = np.argsort(expected_ms, kind="stable")[places]
    spread = np.setdiff1d(spread, np.concatenate([begun, random]))
    taken = np.concatenate([begun, random, spread])[:count]
    informative = choose_informative(
        matrix / expected_ms[:, None], count=count - len(taken), taken=taken
    )
    chosen = np.setdiff1d(np.concatenate([taken, informative]), random)
    return CalibrationNetworks(
        drawn=tuple(space.decode(row) for row in pool[random]),
        chosen=tuple(space.decode(row) for row in pool[chosen]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedModels:
    """Blocks and networks of a space as models to be timed.

    Latency depends on shapes, not on values; random weights spare a table from the
    training that happened to be at hand. Each model's weights are drawn from its name,
    so that any of them can be made at any time.

    Args:
        backend_name: Whose format the models have.
        seed: Of the weights.
        blocks: By key.
        networks: By config id.
    """

    backend_name: str
    seed: int
    blocks: Mapping[str, BlockPlan]
    networks: Mapping[str, NetworkPlan]

    @property
    def block_names(self) -> tuple[str, ...]:
        """As `write_model` takes them."""
        return tuple(f"{_BLOCK}{key}" for key in self.blocks)

    @property
    def network_names(self) -> tuple[str, ...]:
        """As `write_model` takes them."""
        return tuple(f"{_NETWORK}{key}" for key in self.networks)

    def write_model(self, name: str, folder: Path) -> Path:
        """Write one of the models into a folder."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if name.startswith(_BLOCK):
            block = self.blocks[name.removeprefix(_BLOCK)]
            model = timed_block(block, backend_name=self.backend_name, rng=rng)
        else:
            network = self.networks[name.removeprefix(_NETWORK)]
            model = timed_network(network, backend_name=self.backend_name, rng=rng)
        return write_timed(folder, name, model, backend_name=self.backend_name)


def measure_table(
    space: SearchSpace,
    *,
    backend: Backend,
    threads: int,
    folder: Path,
    network_count: int = NETWORK_COUNT,
    reporter: Reporter,
    saved: Callable[[Path], None] = lambda path: None,
) -> LatencyTable:
    """Profile a space, and keep the table in a folder under its own name.

    After a kill the same call goes on where it stopped, for a day.

    Args:
        space: What to measure.
        backend: Where.
        threads: Of one inference.
        folder: Of the table, and of the journal until then.
        network_count: Whole networks to measure besides the blocks.
        reporter: Told of progress.
        saved: Called with the table's file, before the journal is removed.

    Raises:
        MeasurementError: The blocks that failed leave no network, or the disk is full.
    """
    device = this_device(accelerator=backend.accelerator())
    path = folder / table_name(space, device, backend.runtime(threads=threads))
    journal_path = journal_of(path, network_count)
    block_count = len(all_blocks(space))
    reporter.begin(f"profiling {block_count} blocks and {network_count} networks")
    try:
        table = profile_space(
            space,
            backend=backend,
            threads=threads,
            settings=PROFILE_SETTINGS,
            journal_path=journal_path,
            network_count=network_count,
            progress=reporter.advance,
        )
        remove_leftovers(path, older_than_s=ABANDONED_S)
        table.save(path)
        saved(path)
        remove_journal(journal_path)
    except OSError as error:
        raise MeasurementError(
            f"the latency table cannot be written to {path}, or its models to "
            f"{tempfile.gettempdir()}: {error}. What was measured is kept in "
            f"{journal_path.name}; free space and run this again"
        ) from error
    return table


def journal_of(table_path: Path, network_count: int) -> Path:
    """The journal of a table in the making.

    Another number of networks is another order: neither blocks the other.
    """
    return table_path.with_suffix(f".{network_count}.journal")


def profile_space(
    space: SearchSpace,
    *,
    backend: Backend,
    threads: int,
    settings: MeasureSettings,
    journal_path: Path,
    network_count: int = NETWORK_COUNT,
    networks: Sequence[SubnetConfig] | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure a space on this machine: its blocks, then networks chosen by them.

    A block that crashes its runtime is among the failures, and networks with it are
    left out of everything.

    Args:
        space: What to measure.
        backend: Where.
        threads: Of one inference.
        settings: How carefully.
        journal_path: Holds what was measured so far; the same call after a kill goes
            on from there, and the table is as old as the oldest part of it. What was
            begun more than a day ago is measured anew, with a warning. The caller
            removes it once the table is kept.
        network_count: Whole networks to measure besides the blocks.
        networks: Take these instead of choosing some.
        progress: Called with visits made and visits known to be made.

    Raises:
        MeasurementError: The blocks that failed leave no network, or the journal is in
            use.
    """
    if networks is not None:
        network_count = len(networks)
    device = this_device(accelerator=backend.accelerator())
    runtime = backend.runtime(threads=threads)
    anchor = anchor_network(space)
    subject: dict[str, Json] = {
        "device": device.fingerprint,
        "runtime": encode_flat(runtime),
        "settings": encode_flat(settings),
        "space": space_sha256(space),
        "networks": network_count,
    }
    models = TimedModels(
        backend_name=backend.name,
        seed=settings.seed,
        blocks=dict(sorted(all_blocks(space).items())),
        networks={anchor: lower(space, space.middle())},
    )
    block_order = WorkOrder(
        names=(*models.block_names, *models.network_names),
        backend=backend.name,
        threads=threads,
        settings=settings,
        group_size=BLOCK_GROUP_SIZE,
        anchor_name=models.network_names[0],
    )
    coming = (network_count - 1) * settings.visits
    with Journal(journal_path, subject=subject) as journal:
        forget_if_old(journal, journal_path)
        journal.retry_failures()  # their cause may be gone since the last call
        blocks = execute(
            block_order,
            models.write_model,
            journal=journal,
            progress=_shifted(progress, later=coming),
        )
        visited = sum(journal.count_of(name) for name in models.block_names)
        if networks is not None:
            wanted = CalibrationNetworks(drawn=(), chosen=tuple(networks))
        else:
            wanted = calibration_networks(
                space,
                look_up_blocks(space, _planned_latencies(models, journal, settings)),
                count=network_count,
                rng=np.random.default_rng(settings.seed),
            )
        _require_runnable(wanted.every, blocks)
        plans = {config.id: lower(space, config) for config in wanted.every}
        models = replace(models, networks={**models.networks, **plans})
        result = execute(
            replace(block_order, names=models.network_names, group_size=GROUP_SIZE),
            models.write_model,
            journal=journal,
            progress=_shifted(progress, before=visited),
        )
        # Small blocks and networks share the anchor's slowdown to another degree; all
        # are to speak of one level of it, and of the anchor model.
        blocks = collect(
            block_order,
            journal=journal,
            anchor_reference_ns=result.anchor_reference_ns,
            anchor_model_ms=_anchor_ms(result, models.network_names[0]),
        )
    measured = _measured(result, _NETWORK)
    return LatencyTable(
        origin="measured",
        space_name=space.name,
        space_sha256=space_sha256(space),
        device=device,
        runtime=runtime,
        settings=settings,
        conditions_before=blocks.conditions_before,
        conditions_after=result.conditions_after,
        drift=result.drift,
        beta=result.beta,
        anchor_reference_ns=result.anchor_reference_ns,
        created_at=journal.began_at,
        blocks=_measured(blocks, _BLOCK),
        networks=measured,
        random_networks=tuple(c.id for c in wanted.drawn if c.id in measured),
        failures={
            name.removeprefix(_NETWORK).removeprefix(_BLOCK): reason
            for name, reason in {**blocks.failures, **result.failures}.items()
        },
    )


def forget_if_old(journal: Journal, path: Path) -> None:
    """Have measured anew what was begun more than a day ago, and say so."""
    age_h = (time.time() - journal.began_s) / 3600
    # Ahead of now, a clock was wrong, and how old it is, is not known.
    if abs(age_h) <= KEPT_H:
        return
    where = "ago" if age_h > 0 else "ahead of now, by its clock"
    warnings.warn(
        f"{path.name} was begun {abs(age_h):.0f} hours {where}; the machine may have "
        f"changed since, so what is {KEPT_H:g} hours old is not gone on with, and all "
        "of it is measured anew",
        stacklevel=2,
    )
    journal.begin_anew()


def anchor_network(space: SearchSpace) -> str:
    """Id of the anchor model of a space: neither small nor large, always the same."""
    return space.middle().id


def _shifted(
    progress: Progress | None, *, before: int = 0, later: int = 0
) -> Progress | None:
    """Progress of a part, told as that of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(before + done, before + total + later)


def _planned_latencies(
    models: TimedModels, journal: Journal, settings: MeasureSettings
) -> dict[str, float]:
    """Blocks' quiet latencies by the planned visits alone; infinite where they failed.

    Extra visits come and go with time; the choice of networks must be the same when a
    killed run goes on.
    """
    names = [name for name in models.block_names if name not in journal.failures]
    fit = fit_visits([journal.visits_of(name)[: settings.visits] for name in names])
    return dict.fromkeys(models.blocks, math.inf) | {
        name.removeprefix(_BLOCK): float(np.exp(effect)) / 1e6
        for name, effect in zip(names, fit.effect_log, strict=True)
    }


def _anchor_ms(result: OrderResult, name: str) -> float | None:
    measured = result.measurements.get(name)
    return None if measured is None else measured.quiet_ms


def _measured(result: OrderResult, prefix: str) -> dict[str, Measurement]:
    return {
        name.removeprefix(prefix): replace(measurement, name=name.removeprefix(prefix))
        for name, measurement in result.measurements.items()
        if name.startswith(prefix)
    }


def _require_runnable(configs: Sequence[SubnetConfig], blocks: OrderResult) -> None:
    """Refuse where blocks that failed leave nothing to calibrate by.

    Raises:
        MeasurementError: Fewer than two networks have none of them.
    """
    failed = sorted(name for name in blocks.failures if name.startswith(_BLOCK))
    if failed and len(configs) < 2:
        raise MeasurementError(
            f"{len(failed)} blocks could not be measured, and hardly a network has "
            f"none of them; {failed[0]}: {blocks.failures[failed[0]]}. Once the cause "
            "is gone, run the same command again: these are tried anew, and the others "
            "are kept"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelChange:
    """How fast a machine was when a table was made, against an earlier one.

    A shared machine can be slower for hours, longer than any profile takes.

    Args:
        since: When the earlier table was made.
        anchor_ratio: Quiet level of the anchor now over then; None where the host's
            speed is not the device's, which times itself.
        network_ratio: The same of the networks that both hold, their median; None if
            they hold none.
    """

    since: str
    anchor_ratio: float | None
    network_ratio: float | None


def level_change(table: LatencyTable, earlier: LatencyTable) -> LevelChange:
    """Compare two tables of one space, device and runtime."""
    common = sorted(table.networks.keys() & earlier.networks.keys())
    ratios = [
        table.networks[name].quiet_ms / earlier.networks[name].quiet_ms
        for name in common
    ]
    return LevelChange(
        since=earlier.created_at,
        anchor_ratio=(
            table.anchor_reference_ns / earlier.anchor_reference_ns
            if all(v.feels_host for m in table.networks.values() for v in m.visits)
            else None
        ),
        network_ratio=float(np.median(ratios)) if ratios else None,
    )
