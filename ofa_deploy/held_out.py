"""A latency predictor against networks that it has not seen, measured for the purpose.

Every network is measured twice, in runs of their own, so that the noise floor stands
beside the predictor's error.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import MeasurementError
from ofa_deploy.plan import lower
from ofa_deploy.predict.block_costs import sample_runnable, table_blocks
from ofa_deploy.predict.evaluation import PredictionQuality, judge
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.profiling import TimedModels, anchor_network, journal_of, measure_table
from ofa_deploy.reporting import Reporter
from ofa_deploy.space import Genomes, SearchSpace, SubnetConfig, first_of_each
from ofa_deploy.table_files import open_table, table_name
from profilers.backends import get_backend
from profilers.backends.base import Backend
from profilers.codec import encode_flat
from profilers.device import this_device
from profilers.execute import collect, execute
from profilers.files import sha256_of, write_atomically
from profilers.journal import Journal, remove_journal
from profilers.json_reader import Json
from profilers.measurement import MeasureSettings
from profilers.order import WorkOrder
from profilers.table import LatencyTable, require_compatible

RUNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutQuality:
    """How good a table's predictor is.

    Args:
        predicted: Against the geometric mean of both measurements.
        noise: One measurement against the other; a perfect predictor would show half
            of its RMSPE.
        coverage: Share of measurements inside the 95 % interval, 0..1.
        below_upper: Share below the 95 % upper bound.
        left_out: Networks that could not be measured.
    """

    predicted: PredictionQuality
    noise: PredictionQuality
    coverage: float
    below_upper: float
    left_out: int


def measure_and_judge(
    space: SearchSpace,
    *,
    backend: Backend,
    threads: int,
    folder: Path,
    network_count: int,
    count: int,
    reporter: Reporter,
) -> tuple[LatencyTable, HeldOutQuality]:
    """Measure a table as `measure_table` does, then judge its predictor.

    After a kill the same call goes on where it stopped, in the judging too: a table
    that is finished is not measured again.

    Args:
        space: What to measure.
        backend: Where.
        threads: Of one inference.
        folder: Of the table, and of the journals until then.
        network_count: Whole networks in the table.
        count: Networks to judge by, as for `evaluate_predictor`.
        reporter: Told of progress.

    Raises:
        MeasurementError: Blocks that failed leave no network, all but one of those to
            judge by could not be measured, or the disk is full.
    """
    device = this_device(accelerator=backend.accelerator())
    runtime = backend.runtime(threads=threads)
    path = folder / table_name(space, device, runtime)
    judging = path.with_suffix(f".{network_count}-{count}.judging")
    # Names the table that was made, and not one that anybody has put there since.
    made = judging / "table"
    try:
        judging.mkdir(parents=True, exist_ok=True)
        if path.is_file() and made.is_file() and made.read_text() == sha256_of(path):
            table = open_table(path, space, device, runtime)
        else:
            table = measure_table(
                space,
                backend=backend,
                threads=threads,
                folder=folder,
                network_count=network_count,
                reporter=reporter,
                saved=lambda file: write_atomically(made, sha256_of(file).encode()),
            )
        remove_journal(journal_of(path, network_count))
        quality = evaluate_predictor(
            space,
            table,
            count=count,
            settings=table.settings,
            # Another table's journals, of a run that was never finished, do not count.
            folder=judging / made.read_text()[:16],
            reporter=reporter,
        )
        shutil.rmtree(judging)
    except OSError as error:
        raise MeasurementError(
            f"{judging} cannot be written: {error}; free space and run this again, it "
            "goes on from here"
        ) from error
    return table, quality


def evaluate_predictor(
    space: SearchSpace,
    table: LatencyTable,
    *,
    count: int,
    settings: MeasureSettings,
    folder: Path,
    reporter: Reporter,
) -> HeldOutQuality:
    """Measure random networks that are not in a table, and judge its predictor.

    Args:
        space: The table's.
        table: Of this machine.
        count: Networks to measure, at least 2; fewer where there are fewer.
        settings: How carefully; its seed also draws the networks.
        folder: Of the journals. The same call after a kill goes on where it stopped,
            and one after the end measures nothing again.
        reporter: Told of progress.

    Raises:
        MeasurementError: Fewer than two networks are left to be judged.
        IncompatibleTables: The table is of another device or runtime.
    """
    backend = get_backend(table.runtime.backend)
    require_compatible(
        table,
        this_device(accelerator=backend.accelerator()),
        backend.runtime(threads=table.runtime.threads),
    )
    genomes = unseen_networks(space, table, count=count, seed=settings.seed)
    if len(genomes) < 2:
        raise MeasurementError(
            f"{len(genomes)} networks of space {space.name} are not in the table; at "
            "least 2 are needed to judge a predictor. Profile fewer, or a larger space"
        )
    names = [space.decode(row).id for row in genomes]
    runs = [
        _measure(
            space,
            table,
            names=names,
            settings=settings,
            folder=folder,
            run=run,
            reporter=reporter,
        )
        for run in range(1, RUNS + 1)
    ]
    both = np.array([all(name in run for run in runs) for name in names], dtype=bool)
    if both.sum() < 2:
        raise MeasurementError(
            f"{both.sum()} of {len(names)} held-out networks could be measured; at "
            "least 2 are needed to judge a predictor. See what ofa-deploy doctor says, "
            "or ask for more"
        )
    kept = [name for name, known in zip(names, both, strict=True) if known]
    first, second = (np.array([run[name] for name in kept]) for run in runs)
    measured = np.sqrt(first * second)
    predictor = fit_latency_predictor(space, table)
    predicted = predictor.predict_ms(genomes[both])
    ratio, bounds = measured / predicted, predictor.residuals
    return HeldOutQuality(
        predicted=judge(predicted, measured),
        noise=judge(first, second),
        coverage=_share((bounds.low <= ratio) & (ratio <= bounds.high)),
        below_upper=_share(ratio <= bounds.upper),
        left_out=int((~both).sum()),
    )


def unseen_networks(
    space: SearchSpace, table: LatencyTable, *, count: int, seed: int
) -> Genomes:
    """Different random networks `(count or fewer, genes)` that are not in a table.

    Those with a block that failed are left out.
    """
    # Not the stream of the table's own networks, which would only hold what was not
    # taken of it.
    rng = np.random.default_rng([seed, 1])
    drawn = sample_runnable(
        space, table_blocks(space, table), 2 * (count + len(table.networks)), rng
    )
    different = drawn[first_of_each(drawn)]
    taken = {*table.networks, anchor_network(space)}
    known = np.array([space.decode(row).id in taken for row in different])
    unseen: Genomes = different[~known][:count]
    return unseen


def _measure(
    space: SearchSpace,
    table: LatencyTable,
    *,
    names: list[str],
    settings: MeasureSettings,
    folder: Path,
    run: int,
    reporter: Reporter,
) -> dict[str, float]:
    """Quiet latencies in ms at the table's anchor level."""
    backend, threads = table.runtime.backend, table.runtime.threads
    # The table's anchor model, which tells how this run's level lies to the table's.
    anchor = anchor_network(space)
    known = table.networks.get(anchor)
    models = TimedModels(
        backend_name=backend,
        seed=settings.seed + run,
        blocks={},
        networks={
            name: lower(space, SubnetConfig.from_id(name)) for name in (*names, anchor)
        },
    )
    order = WorkOrder(
        names=models.network_names,
        backend=backend,
        threads=threads,
        settings=settings,
        anchor_name=models.network_names[-1],
    )
    subject: dict[str, Json] = {
        "device": table.device.fingerprint,
        "networks": [*names],
        "run": run,
        "runtime": encode_flat(table.runtime),
        "settings": encode_flat(settings),
        "table": table.created_at,
    }
    reporter.begin(f"measuring {len(names)} held-out networks, run {run} of {RUNS}")
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / f"held-out-{run}.journal", subject=subject) as journal:
        journal.retry_failures()  # their cause may be gone since the last call
        execute(order, models.write_model, journal=journal, progress=reporter.advance)
        # Another run, another quiet level: brought to the table's.
        result = collect(
            order,
            journal=journal,
            anchor_reference_ns=table.anchor_reference_ns,
            anchor_model_ms=None if known is None else known.quiet_ms,
        )
    return {
        name: result.measurements[key].quiet_ms
        for name, key in zip(names, models.network_names[:-1], strict=True)
        if key in result.measurements
    }


def _share(true: NDArray[np.bool_]) -> float:
    return float(true.mean())
