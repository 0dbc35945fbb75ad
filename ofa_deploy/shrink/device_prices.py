"""Measuring what a network's layers take on this machine, and keeping it as a table."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ofa_deploy.constraints import Constraints
from ofa_deploy.device_bench import CERTIFY_SETTINGS
from ofa_deploy.drift import MAX_DRIFT_RATIO
from ofa_deploy.errors import FormatError, MeasurementError
from ofa_deploy.export.lone_layer import LoneLayer
from ofa_deploy.export.runtime_format import timed_layer, write_timed
from ofa_deploy.probe import Prober, channel_step
from ofa_deploy.profiling import BLOCK_GROUP_SIZE, PROFILE_SETTINGS, forget_if_old
from ofa_deploy.reporting import Reporter
from ofa_deploy.shrink.channel_prices import LatencyPrice, timed_layers
from ofa_deploy.shrink.cost import full_counts
from ofa_deploy.shrink.groups import ChannelGraph
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.resume_store import recall, remember, remembered
from ofa_deploy.shrink.stages import find_stages, shallower
from ofa_deploy.table_files import where_label
from ofa_deploy.target import Target
from ofa_deploy.verify import enough_runs
from profilers.backends.base import Backend
from profilers.codec import encode_flat
from profilers.device import DeviceSpec, RuntimeSpec, read_conditions, this_device
from profilers.execute import execute
from profilers.fresh import (
    AnchorModel,
    FreshMeasurement,
    measure_in_fresh_process,
)
from profilers.journal import Journal, remove_journal
from profilers.measurement import MeasureSettings
from profilers.order import WorkOrder
from profilers.table import LatencyTable, describe_differences
from profilers.timing import CERTIFY_PROCESSES

# Whole networks that calibrate the sum of layers: all groups at one share, and random
# ones.
SHARES = (1.0, 0.8, 0.65, 0.5, 0.35)
RANDOM_NETWORKS = 7
# Of the widths that tell a runtime's step, and the step where they tell of none.
STEP_SETTINGS = MeasureSettings.screen()
DEFAULT_STEP = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DevicePrices:
    """A network's price on a device.

    Args:
        price: By channel counts.
        table: What it was fitted to; knows the quiet level.
        step: Channel counts are multiples of this.
        residual_ratio: Root mean square of measured over fitted networks, minus 1.
        anchor_model: Timed beside the network's forms; None to time them alone.
    """

    price: LatencyPrice
    table: LatencyTable
    step: int
    residual_ratio: float
    anchor_model: AnchorModel | None = None

    def of_graph(self, graph: ChannelGraph) -> DevicePrices:
        """The same of a part of the network."""
        return replace(self, price=self.price.of_graph(graph))

    def beside(
        self, own: OwnNetwork, *, target: Target, folder: Path, reporter: Reporter
    ) -> DevicePrices:
        """The same with an anchor model, where others' work slows this machine down.

        It is the network's first form in the table: the whole one, or the next narrower
        one of whole steps. All of a call is held against one level: the table's, or
        where the machine is another one by now, the one that is found here.

        Args:
            own: The network that the prices are of.
            target: Where it runs.
            folder: Gets the anchor model's file; stays as long as the prices.
            reporter: Told of progress.
        """
        if not read_conditions().shared_host:
            return self
        reporter.begin("timing the whole network")
        name, counts = next(iter(calibration_counts(own, step=self.step).items()))
        whole = TimedForm(own=own, counts=counts)
        path = folder / whole.write(target=target, folder=folder)
        level_ms = self.table.networks[name].quiet_ms
        found = self.measure(path, target=target, progress=reporter.advance)
        found_ms = found.quiet_ms
        if abs(found_ms / level_ms - 1) > MAX_DRIFT_RATIO:
            level_ms = found_ms
        return replace(self, anchor_model=AnchorModel(path=path, quiet_ms=level_ms))

    def measure(
        self,
        model_path: Path,
        *,
        target: Target,
        asked: Constraints | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> FreshMeasurement:
        """Time a file as it is certified; on a shared host at the table's level.

        Args:
            model_path: Of a form of the network.
            target: Where it runs.
            asked: Whose percentile and rate are to be told; None for the latency alone.
            progress: Told of processes done, and of all.
        """
        settings, processes = CERTIFY_SETTINGS, CERTIFY_PROCESSES
        if asked is not None:
            settings = enough_runs(settings, asked, processes=processes)
        return measure_in_fresh_process(
            model_path,
            backend_name=target.backend,
            threads=target.threads,
            settings=settings,
            processes=processes,
            beta=self.table.beta,
            anchor_reference_ns=self.table.anchor_reference_ns,
            anchor_model=self.anchor_model,
            pace=None if asked is None else asked.pace,
            progress=progress,
        )


def measure_prices(
    own: OwnNetwork,
    *,
    target: Target,
    backend: Backend,
    step: int,
    folder: Path,
    work: Path | None = None,
    reporter: Reporter,
) -> DevicePrices:
    """Time a network's layers and some of its narrowed forms; or read that they were.

    After a kill the same call goes on where it stopped, for a day.

    Args:
        own: The network.
        target: Where.
        backend: Of the target.
        step: Channels that the runtime's kernels work in.
        folder: Of the table, and of the journal until then.
        work: Folder of an earlier call, which may have kept its own prices; None for
            none.
        reporter: Told of progress.

    Raises:
        MeasurementError: A layer, or a network, could not be measured; or what is kept
            is damaged, or of another network.
        TraceError: The network's operations depend on values.
    """
    forms = timed_forms(own, step=step)
    digest = _digest(own, forms, step=step)
    device, runtime = _device_and_runtime(target, backend)
    name = _table_name(digest, device, runtime)
    path = folder / name
    if work is not None and (work / name).is_file():
        table = _kept_table(work / name, digest, device, runtime)
    elif path.is_file():
        table = _kept_table(path, digest, device, runtime)
    else:
        table = _measure(
            own,
            target,
            backend,
            forms=forms,
            step=step,
            digest=digest,
            path=path,
            reporter=reporter,
        )
    return fit_prices(own, table, forms=forms, step=step)


def keep_prices(prices: DevicePrices, work: Path) -> None:
    """Keep prices with the search that goes by them.

    It goes on only with these: the machine's own cache may be emptied meanwhile, as it
    is with a container.

    Args:
        prices: The device's.
        work: Of the call; there already.
    """
    table = prices.table
    table.save(work / _table_name(table.space_sha256, table.device, table.runtime))


def keep_step(step: int, target: Target, *, backend: Backend, work: Path) -> None:
    """Keep the step that a machine was measured to have, likewise."""
    remember(work / _step_name(target, backend), step)


def _kept_table(
    path: Path, digest: str, device: DeviceSpec, runtime: RuntimeSpec
) -> LatencyTable:
    """What was measured earlier, if it is that."""
    cure = "delete it, and make the same call again: prices are measured anew"
    try:
        table = LatencyTable.load(path, otherwise="no table is read from it")
    except FormatError as error:
        raise MeasurementError(f"{path.parent}: {error}; {cure}") from error
    differences = describe_differences(table, device, runtime, here="here")
    if table.origin != "measured" or table.space_sha256 != digest or differences:
        raise MeasurementError(
            f"{path} is not what was measured of this network here"
            f"{differences and f' ({differences})'}; {cure}"
        )
    return table


def runtime_step(
    target: Target,
    *,
    backend: Backend,
    folder: Path,
    work: Path | None = None,
    reporter: Reporter,
) -> int:
    """Channels that a runtime's kernels work in here; measured once a machine.

    Args:
        target: Where.
        backend: Of the target.
        folder: Keeps the answer.
        work: Folder of an earlier call, which may have kept its own; None for none.
        reporter: Told of progress.
    """

    def measured() -> int:
        prober = Prober(backend=backend, threads=target.threads, settings=STEP_SETTINGS)
        widths = prober.sweep_widths(reporter=reporter)
        return channel_step(widths) or DEFAULT_STEP

    name = _step_name(target, backend)
    if work is not None and (work / name).is_file():
        return int(recall(work / name))
    return int(remembered(folder / name, measured))


def fit_prices(
    own: OwnNetwork, table: LatencyTable, *, forms: Mapping[str, TimedForm], step: int
) -> DevicePrices:
    """The price that a table says."""
    measured_ms = np.array([table.networks[name].quiet_ms for name in forms])
    layers = LatencyPrice(
        own.graph,
        latency_ms={key: m.quiet_ms for key, m in table.blocks.items()},
        step=step,
    )
    sums_ms = np.array([form.priced_by(layers) for form in forms.values()])
    price = layers.calibrated(sums_ms, measured_ms)
    fitted = np.array([form.priced_by(price) for form in forms.values()])
    return DevicePrices(
        price=price,
        table=table,
        step=step,
        residual_ratio=float(np.sqrt(((measured_ms / fitted - 1) ** 2).mean())),
    )


def calibration_counts(own: OwnNetwork, *, step: int) -> dict[str, Tensor]:
    """Channel counts of the networks to time, by name; always the same."""
    full = full_counts(own.graph).double()
    rng = np.random.default_rng(0)
    shares = [np.full(len(full), share) for share in SHARES]
    shares += [rng.uniform(0.2, 1.0, len(full)) for _ in range(RANDOM_NETWORKS)]
    found = {}
    for share in shares:
        counts = torch.round(full * torch.from_numpy(share) / step) * step
        counts = torch.minimum(full, counts.clamp(min=step))
        found["c" + ".".join(f"{int(count)}" for count in counts)] = counts
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedForm:
    """A form of a network that is timed as a whole.

    Args:
        own: The network, or what is left of it without some blocks.
        counts: Channels that are left of each of its groups.
    """

    own: OwnNetwork
    counts: Tensor

    def priced_by(self, price: LatencyPrice) -> float:
        """What it costs, in ms."""
        graph = self.own.graph
        own = price if price.graph is graph else price.of_graph(graph)
        return float(own(self.counts))

    def write(self, *, target: Target, folder: Path) -> str:
        """Write it; returns the file to load."""
        # To time, any channels do.
        kept = [torch.arange(int(count)) for count in self.counts]
        return self.own.write(kept, target=target, folder=folder)


def timed_forms(own: OwnNetwork, *, step: int) -> dict[str, TimedForm]:
    """Forms of a network to time, by name, the whole one first; always the same.

    What goes with a block besides its convolutions is no layer that has a price: where
    blocks may go, forms without them are among those that prices are fitted to.
    """
    forms = {
        name: TimedForm(own=own, counts=counts)
        for name, counts in calibration_counts(own, step=step).items()
    }
    if own.graph.removable:
        stages = find_stages(own.module, own.graph, own.image)
        for depths in _fewest_blocks([stage.blocks for stage in stages]):
            left = own.left_of(shallower(own.module, stages, depths))
            name = "d" + ".".join(map(str, depths))
            forms[name] = TimedForm(own=left, counts=full_counts(left.graph))
    return forms


def _fewest_blocks(most: Sequence[int]) -> list[tuple[int, ...]]:
    """One block of each stage in turn, all of the others; and one block of each."""
    found = [
        tuple(1 if place == index else blocks for place, blocks in enumerate(most))
        for index in range(len(most))
    ]
    found.append((1,) * len(most))
    return list(dict.fromkeys(found))


def _measure(
    own: OwnNetwork,
    target: Target,
    backend: Backend,
    *,
    forms: Mapping[str, TimedForm],
    step: int,
    digest: str,
    path: Path,
    reporter: Reporter,
) -> LatencyTable:
    layers = timed_layers(own.graph, step=step)
    anchor = next(iter(forms))  # the whole network

    order = WorkOrder(
        names=(*layers, *forms),
        backend=target.backend,
        threads=target.threads,
        settings=PROFILE_SETTINGS,
        group_size=BLOCK_GROUP_SIZE,
        anchor_name=anchor,
    )
    device, runtime = _device_and_runtime(target, backend)
    journal_path = path.with_suffix(".journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as kept:
        write = _writer(layers, forms, target=target, kept=Path(kept))
        write(anchor, Path(kept))  # what cannot be written is told before the timing
        reporter.begin(f"timing {len(layers)} layers and {len(forms)} networks")
        with Journal(
            journal_path,
            subject={
                "device": device.fingerprint,
                "runtime": encode_flat(runtime),
                "settings": encode_flat(PROFILE_SETTINGS),
                "order": order.digest,
                "network": digest,
            },
        ) as journal:
            forget_if_old(journal, journal_path)
            journal.retry_failures()
            result = execute(order, write, journal=journal, progress=reporter.advance)
    if result.failures:
        key, reason = next(iter(result.failures.items()))
        name = layers[key].name if key in layers else key
        raise MeasurementError(
            f"{len(result.failures)} of {len(order.names)} layers and networks could "
            f"not be measured; {name}: {reason}. Without them no price is known; run "
            "the same call again once the cause is gone"
        )
    table = LatencyTable(
        origin="measured",
        space_name=own.family,
        space_sha256=digest,
        device=device,
        runtime=runtime,
        settings=PROFILE_SETTINGS,
        conditions_before=result.conditions_before,
        conditions_after=result.conditions_after,
        drift=result.drift,
        beta=result.beta,
        anchor_reference_ns=result.anchor_reference_ns,
        created_at=journal.began_at,
        blocks={name: result.measurements[name] for name in layers},
        networks={name: result.measurements[name] for name in forms},
        random_networks=(),
        failures={},
    )
    table.save(path)
    remove_journal(journal_path)
    return table


def _writer(
    layers: Mapping[str, LoneLayer],
    forms: Mapping[str, TimedForm],
    *,
    target: Target,
    kept: Path,
) -> Callable[[str, Path], Path]:
    """What writes a layer, or a form of the network, to be timed.

    Args:
        layers: By name.
        forms: By name.
        target: What the files are for.
        kept: Gets the forms, each of which is timed in several processes, and takes
            seconds to be written.
    """
    files: dict[str, Path] = {}

    def write(name: str, folder: Path) -> Path:
        if name in layers:
            model = timed_layer(
                layers[name],
                backend_name=target.backend,
                rng=np.random.default_rng(0),
            )
            return write_timed(folder, name, model, backend_name=target.backend)
        if name not in files:
            inside = kept / hashlib.sha256(name.encode()).hexdigest()[:16]
            inside.mkdir()
            files[name] = inside / forms[name].write(target=target, folder=inside)
        return files[name]

    return write


def _digest(own: OwnNetwork, forms: Iterable[str], *, step: int) -> str:
    """Of everything that decides what is timed."""
    names = [*timed_layers(own.graph, step=step), *forms]
    cuts = [(cut.module, cut.side, cut.group) for cut in own.graph.cuts]
    # Activations, pools and skips cost, too; and so do layers that nothing narrows.
    layers = [str(layer) for layer in own.graph.layers]
    shapes = {name: list(t.shape) for name, t in own.module.state_dict().items()}
    text = json.dumps(
        [names, cuts, layers, shapes, own.resolution, own.operations()], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _device_and_runtime(
    target: Target, backend: Backend
) -> tuple[DeviceSpec, RuntimeSpec]:
    return (
        this_device(accelerator=backend.accelerator()),
        backend.runtime(threads=target.threads),
    )


def _table_name(digest: str, device: DeviceSpec, runtime: RuntimeSpec) -> str:
    return f"own-{digest[:12]}_{where_label(device, runtime)}.json"


def _step_name(target: Target, backend: Backend) -> str:
    return f"channel-step_{where_label(*_device_and_runtime(target, backend))}.json"
