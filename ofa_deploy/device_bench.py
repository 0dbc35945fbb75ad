"""Exported files on the device: timed against each other, and by themselves."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.assembly import (
    VerifiedNetwork,
    measured_accuracy,
    predicted_accuracy,
)
from ofa_deploy.constraints import Constraints
from ofa_deploy.contract import Confirmed
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import RunFailed, StaleTable
from ofa_deploy.export.runtime_format import timed_network, write_timed
from ofa_deploy.exporting import (
    ExportedNetwork,
    export_network,
    loaded_files,
    write_model,
)
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import materialise
from ofa_deploy.plan import lower
from ofa_deploy.predict.latency import LatencyPredictor
from ofa_deploy.profiling import anchor_network
from ofa_deploy.reporting import Reporter
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.target import Target
from ofa_deploy.verify import enough_runs, judge
from profilers.device import DeviceSpec, read_conditions
from profilers.execute import execute
from profilers.fresh import FreshMeasurement, measure_in_fresh_process
from profilers.journal import Journal
from profilers.measurement import MeasureSettings, Visit
from profilers.order import WorkOrder
from profilers.summary import fit_visits
from profilers.table import LatencyTable
from profilers.timing import CERTIFY_PROCESSES

# Some seconds in all, spread so that no one phase of the machine is all there is.
CONFIRM_SETTINGS = replace(
    MeasureSettings.confirm(),
    target_relative_error=0.04,
    max_seconds=3.0,
    pass_seconds=0.1,
)
# The tier's one percent is asked of all processes together: of each one, less. Five
# times 20 visits are twice the runs that a 99th percentile needs; more would take
# longer with a slow model, and say nothing of what differs between processes.
CERTIFY_SETTINGS = replace(
    MeasureSettings.certify(),
    visits=20,
    target_relative_error=MeasureSettings.certify().target_relative_error
    * math.sqrt(CERTIFY_PROCESSES),
    max_seconds=15.0,
)
# Further from its table, the anchor model says that the table is of another machine.
MAX_DRIFT_RATIO = 0.05
# Over its budget: three times what processes usually differ by.
FAR_OFF = 1.03
_ANCHOR = "the anchor model"


@dataclass(slots=True, kw_only=True)
class DeviceBench:
    """A `Bench` on this machine; its files stay until the stack is closed.

    Args:
        supernet: Whose networks.
        target: What files are for.
        device: Where they are timed.
        table: Whose quiet level latencies speak of.
        predictor: Of that table.
        images: Calibrate the networks, `(n, H, W, 3)` uint8.
        evaluation: To measure accuracies on; None to predict them.
        constraints: What networks are held against.
        stack: Holds their folders.
        reporter: Told of progress.
        max_drift_ratio: Of the anchor model against the table; None to accept any.
        anchor_ratio: Its latency over that of the table, once it was measured; None
            where the table lacks the model.
    """

    supernet: StoredSupernet
    target: Target
    device: DeviceSpec
    table: LatencyTable
    predictor: LatencyPredictor
    images: NDArray[np.uint8]
    evaluation: ImageSet | None
    constraints: Constraints
    stack: ExitStack
    reporter: Reporter
    max_drift_ratio: float | None = MAX_DRIFT_RATIO
    anchor_ratio: float | None = None

    def confirm(self, configs: Sequence[SubnetConfig]) -> Mapping[str, Confirmed]:
        """See `Bench.confirm`.

        The anchor model is with them; networks that the runtime fails on are left out.

        Raises:
            StaleTable: The anchor model is not as fast as in the table.
            RunFailed: The runtime fails on all of them.
        """
        self.reporter.begin("writing the candidates")
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name:
            files = self._write_candidates(configs, Path(name))
            sizes = {
                name: sum(file.stat().st_size for file in loaded_files(path))
                for name, path in files.items()
            }
            self.reporter.begin("timing the candidates")
            visits = self._visit_together(files)
        quiet_ms = self._quiet_ms(visits)
        anchor_ms = quiet_ms.pop(_ANCHOR, None)
        if self.anchor_ratio is None:  # once a call: later it can only be noise
            self._check_drift(anchor_ms, visits.get(_ANCHOR, ()))
        return {
            name: Confirmed(quiet_ms=latency_ms, size_bytes=sizes[name])
            for name, latency_ms in quiet_ms.items()
        }

    def check_drift(self) -> None:
        """Time the anchor model alone, unless it was timed already.

        Raises:
            StaleTable: It is not as fast as in the table.
        """
        known = anchor_network(self.supernet.space) in self.table.networks
        if self.anchor_ratio is not None or self.max_drift_ratio is None or not known:
            return
        self.reporter.begin("timing the anchor model")
        visits = self._visit_together({})
        self._check_drift(self._quiet_ms(visits)[_ANCHOR], visits[_ANCHOR])

    def certify(self, config: SubnetConfig) -> VerifiedNetwork:
        """See `Bench.certify`.

        Raises:
            RunFailed: A process failed, crashed, or took too long.
            UnstableMeasurement: The percentile asked for is not known.
        """
        exported = self._export(config)
        constraints = self.constraints
        self.reporter.begin("certifying the exported file")
        measurement = measure_in_fresh_process(
            exported.folder / exported.model_file,
            backend_name=self.target.backend,
            threads=self.target.threads,
            settings=enough_runs(
                CERTIFY_SETTINGS, constraints, processes=CERTIFY_PROCESSES
            ),
            processes=CERTIFY_PROCESSES,
            beta=self.table.beta,
            anchor_reference_ns=self.table.anchor_reference_ns,
            pace=constraints.pace,
            progress=self.reporter.advance,
            give_up=self._is_far_off,
        )
        network = VerifiedNetwork(
            exported=exported,
            measurement=measurement,
            predicted=self.predictor.estimate(config),
            accuracy=predicted_accuracy(self.supernet, exported),
            constraints=constraints,
            verdicts=(),
            device=self.device,
            runtime=self.table.runtime,
            anchor_ratio=self.anchor_ratio,
        )
        network = self._judged(network)
        others_met = all(
            verdict.met
            for verdict in network.verdicts
            if verdict.constraint != "accuracy"
        )
        if self.evaluation is None or not others_met:
            return network
        self.reporter.begin("measuring the accuracy")
        measured = measured_accuracy(
            self.supernet,
            exported,
            self.evaluation,
            self.table.runtime,
            progress=self.reporter.advance,
        )
        return self._judged(replace(network, accuracy=measured))

    def _is_far_off(self, found: FreshMeasurement) -> bool:
        """Whether a quiet latency is so far above its budget that no process helps."""
        asked = self.constraints
        if asked.budget_ms is None or asked.percentile != 50 or asked.pace is not None:
            return False
        return found.quiet_ms > FAR_OFF * asked.budget_ms

    def _judged(self, network: VerifiedNetwork) -> VerifiedNetwork:
        verdicts = judge(
            self.constraints,
            measurement=network.measurement,
            files=network.exported,
            accuracy=network.accuracy,
        )
        return replace(network, verdicts=verdicts)

    def _export(self, config: SubnetConfig) -> ExportedNetwork:
        folder = self.stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ofa-deploy-")
        )
        return export_network(
            self.supernet,
            lower(self.supernet.space, config),
            calibration=self.images,
            target=self.target,
            folder=Path(folder),
            begin=self.reporter.begin,
        )

    def _write_candidates(
        self, configs: Sequence[SubnetConfig], folder: Path
    ) -> dict[str, Path]:
        """Networks' files as they would be shipped, but for batch-norm statistics.

        Folded into the weights, these change what is computed, and not how fast; to
        estimate them takes as long as everything else together.
        """
        files = {}
        for number, config in enumerate(configs):
            plan = lower(self.supernet.space, config)
            inside = folder / str(number)
            inside.mkdir()
            weights = fuse(materialise(self.supernet.weights, plan), plan)
            model_file = write_model(plan, weights, target=self.target, folder=inside)
            files[config.id] = inside / model_file
        return files

    def _visit_together(
        self, files: Mapping[str, Path]
    ) -> dict[str, tuple[Visit, ...]]:
        """Visits of networks' files and the anchor model, in a process of its own."""
        order = WorkOrder(
            names=(*files, _ANCHOR),
            backend=self.target.backend,
            threads=self.target.threads,
            settings=CONFIRM_SETTINGS,
            anchor_name=_ANCHOR,
        )
        with (
            tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder,
            Journal(Path(folder) / "journal", subject={}) as journal,
        ):
            result = execute(
                order,
                lambda name, folder: files.get(name) or self._anchor_file(folder),
                journal=journal,
                progress=self.reporter.advance,
            )
        found = {name: result.measurements[name].visits for name in result.measurements}
        if files and not found.keys() - {_ANCHOR}:
            raise RunFailed(
                f"{self.target.backend} failed on all of {len(files)} networks: "
                f"{next(iter(result.failures.values()))}"
            )
        return found

    def _quiet_ms(self, visits: Mapping[str, Sequence[Visit]]) -> dict[str, float]:
        """Latencies at the quiet level that the table speaks of."""
        fit = fit_visits(
            list(visits.values()),
            beta=self.table.beta,
            anchor_reference_ns=self.table.anchor_reference_ns,
        )
        return {
            name: math.exp(effect) / 1e6
            for name, effect in zip(visits, fit.effect_log, strict=True)
        }

    def _anchor_file(self, folder: Path) -> Path:
        space, backend_name = self.supernet.space, self.target.backend
        model = timed_network(
            lower(space, space.middle()),
            backend_name=backend_name,
            rng=np.random.default_rng(0),
        )
        return write_timed(folder, _ANCHOR, model, backend_name=backend_name)

    def _check_drift(self, anchor_ms: float | None, visits: Sequence[Visit]) -> None:
        known = self.table.networks.get(anchor_network(self.supernet.space))
        if anchor_ms is None or known is None:
            return
        self.anchor_ratio = ratio = anchor_ms / known.quiet_ms
        if not read_conditions().shared_host:
            # Nobody else slows this machine down: a slower anchor is a slower machine.
            kernel_ns = np.quantile([visit.anchor_before_ns for visit in visits], 0.1)
            ratio *= (float(kernel_ns) / self.table.anchor_reference_ns) ** (
                self.table.beta
            )
        limit = self.max_drift_ratio
        if limit is not None and abs(ratio - 1) > limit:
            raise StaleTable(
                f"the latency table is out of date: its anchor model takes "
                f"{ratio - 1:+.1%} now against {self.table.created_at[:16]} (allowed "
                f"±{limit:.0%}), so its predictions do not hold. Measure anew with "
                "`ofa-deploy profile` (or `specialize --reprofile`), or accept this "
                "with --accept-drift: the file is timed before it is handed out, "
                "whatever was predicted",
                ratio=ratio,
            )
