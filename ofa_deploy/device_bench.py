"""Exported files on the device: timed against each other, and by themselves."""

from __future__ import annotations

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
from ofa_deploy.dataset import ImageSet
from ofa_deploy.drift import DriftCheck
from ofa_deploy.evidence import Confirmed
from ofa_deploy.export.model_files import loaded_files
from ofa_deploy.exporting import (
    ExportedNetwork,
    export_network,
    write_model,
)
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import materialise
from ofa_deploy.plan import lower
from ofa_deploy.predict.latency import LatencyPredictor
from ofa_deploy.reporting import Reporter
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.target import Target
from ofa_deploy.verify import AccuracyClaim, enough_runs, judge
from profilers.device import DeviceSpec
from profilers.fresh import (
    AnchorModel,
    FreshMeasurement,
    measure_in_fresh_process,
)
from profilers.kept import KeptTexts
from profilers.measurement import NO_TARGET, MeasureSettings
from profilers.table import LatencyTable
from profilers.timing import CERTIFY_PROCESSES

# Five times 20 visits of 7 runs are as many runs as a 99th percentile needs. More would
# take longer, with a slow model or in a noisy moment, and say nothing of what differs
# between processes.
CERTIFY_SETTINGS = replace(
    MeasureSettings.certify(),
    visits=20,
    runs_per_visit=7,
    warmup_windows=5,
    target_relative_error=NO_TARGET,
    max_seconds=15.0,
)
# Over its budget: three times what processes usually differ by.
FAR_OFF = 1.03


@dataclass(slots=True, kw_only=True)
class DeviceBench:
    """A `Bench` on this machine; its files stay until the stack is closed.

    Args:
        supernet: Whose networks.
        target: What files are for.
        device: Where they are timed.
        table: Whose quiet level latencies speak of.
        drift: Of that table; candidates are timed with it.
        predictor: Of the table.
        images: Calibrate the networks, `(n, H, W, 3)` uint8.
        evaluation: To measure accuracies on; None to predict them.
        constraints: What networks are held against.
        stack: Holds their folders.
        kept: What certifying processes found in a call that was killed; None to keep
            nothing.
        reporter: Told of progress.
    """

    supernet: StoredSupernet
    target: Target
    device: DeviceSpec
    table: LatencyTable
    drift: DriftCheck
    predictor: LatencyPredictor
    images: NDArray[np.uint8]
    evaluation: ImageSet | None
    constraints: Constraints
    stack: ExitStack
    reporter: Reporter
    kept: KeptTexts | None = None

    def confirm(self, configs: Sequence[SubnetConfig]) -> Mapping[str, Confirmed]:
        """See `Bench.confirm`.

        The anchor model is with them; networks that the runtime fails on are left out.

        Raises:
            StaleTable: The anchor model is not as fast as in the table, or fails.
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
            quiet_ms = self.drift.time_with(files)
        return {
            name: Confirmed(quiet_ms=latency_ms, size_bytes=sizes[name])
            for name, latency_ms in quiet_ms.items()
        }

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
            anchor_reference_ns=self.drift.reference_ns,
            anchor_model=self._anchor_model(),
            pace=constraints.pace,
            progress=self.reporter.advance,
            give_up=self._is_far_off,
            kept=self.kept,
        )
        others = judge(
            constraints, measurement=measurement, files=exported, accuracy=None
        )
        # What misses another limit is not handed out, however accurate it is.
        accuracy = self._accuracy(exported, measured=all(v.met for v in others))
        return VerifiedNetwork(
            exported=exported,
            measurement=measurement,
            predicted=self.predictor.estimate(config),
            accuracy=accuracy,
            constraints=constraints,
            verdicts=judge(
                constraints, measurement=measurement, files=exported, accuracy=accuracy
            ),
            device=self.device,
            runtime=self.table.runtime,
            anchor_ratio=self.drift.anchor_ratio,
        )

    def _accuracy(self, exported: ExportedNetwork, *, measured: bool) -> AccuracyClaim:
        """Measured, if there are images to measure it on and it is worth the time."""
        if self.evaluation is None or not measured:
            return predicted_accuracy(self.supernet, exported)
        self.reporter.begin("measuring the accuracy")
        return measured_accuracy(
            self.supernet,
            exported,
            self.evaluation,
            self.table.runtime,
            progress=self.reporter.advance,
        )

    def _anchor_model(self) -> AnchorModel | None:
        """What the file is timed beside; nothing where single runs are asked about."""
        if not self.constraints.is_plain:
            return None
        return self.drift.anchor_model(self._folder)

    def _is_far_off(self, found: FreshMeasurement) -> bool:
        """Whether a quiet latency is so far above its budget that no process helps."""
        budget_ms = self.constraints.budget_ms
        if budget_ms is None or not self.constraints.is_plain:
            return False
        return found.quiet_ms > FAR_OFF * budget_ms

    def _export(self, config: SubnetConfig) -> ExportedNetwork:
        return export_network(
            self.supernet,
            lower(self.supernet.space, config),
            calibration=self.images,
            target=self.target,
            folder=self._folder(),
            begin=self.reporter.begin,
        )

    def _folder(self) -> Path:
        """A new one, that stays until the stack is closed."""
        return Path(
            self.stack.enter_context(tempfile.TemporaryDirectory(prefix="ofa-deploy-"))
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
