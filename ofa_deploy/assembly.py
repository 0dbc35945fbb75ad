"""Putting a verified network together as a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np

from ofa_deploy.bundle import (
    Bundle,
    new_bundle_folder,
    record_files,
    write_manifest,
)
from ofa_deploy.constraints import ConstraintName, Constraints, Verdict
from ofa_deploy.dataset import ImageSet, Progress
from ofa_deploy.errors import DataError, DeployError
from ofa_deploy.evaluation import top1_accuracy
from ofa_deploy.exporting import ExportedNetwork
from ofa_deploy.manifest import (
    Manifest,
    MeasuredLatency,
)
from ofa_deploy.predict.latency import TWO_SIDED_95, LatencyEstimate
from ofa_deploy.preprocess import Normalisation, PreparedImages
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.verify import (
    AccuracyClaim,
    Candidate,
    ParityReport,
    accuracy_interval,
)
from profilers.backends import get_backend
from profilers.backends.base import installed_version
from profilers.codec import encode_visit
from profilers.device import DeviceSpec, RuntimeSpec
from profilers.fresh import FreshMeasurement
from profilers.measurement import Visit

SAMPLES_FILE = "latency_samples.json"
# Of the anchor model that was timed beside it, if one was.
ANCHOR_SAMPLES_FILE = "anchor_samples.json"
VERSIONED_PACKAGES = ("ofa-deploy", "numpy", "onnx", "onnxruntime", "pillow")
NO_PREDICTOR = (
    "the supernet has no accuracy predictor; finish its training with "
    "`ofa-deploy train --resume`"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VerifiedNetwork:
    """An exported network, and what was found of it.

    Args:
        exported: Its files, in a folder that may vanish afterwards.
        measurement: Of the file, in fresh processes.
        predicted: What the search had expected.
        accuracy: Measured or predicted.
        constraints: What was asked for.
        verdicts: What was found of each.
        device: Where it was measured.
        runtime: With what.
        anchor_ratio: Latency of the anchor model over that of the table, at the time;
            None if there was none to time.
        candidates: Networks measured on the way, this one among them.
    """

    exported: ExportedNetwork
    measurement: FreshMeasurement
    predicted: LatencyEstimate
    accuracy: AccuracyClaim
    constraints: Constraints
    verdicts: tuple[Verdict, ...]
    device: DeviceSpec
    runtime: RuntimeSpec
    anchor_ratio: float | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def config(self) -> SubnetConfig:
        """Which sub-network it is.

        Raises:
            SpaceError: It is of no supernet.
        """
        return SubnetConfig.from_id(self.exported.facts.name)

    @property
    def met(self) -> bool:
        """Whether it keeps every constraint."""
        return all(verdict.met for verdict in self.verdicts)

    def verdict(self, constraint: ConstraintName) -> Verdict:
        """What was found of one constraint.

        Raises:
            KeyError: It was not asked for.
        """
        for verdict in self.verdicts:
            if verdict.constraint == constraint:
                return verdict
        raise KeyError(constraint)


class NetworkSource(Protocol):
    """Where a network comes from: a supernet, or a network that was shrunk."""

    @property
    def sha256(self) -> str:
        """Of its description, or its weights."""

    @property
    def normalisation(self) -> Normalisation:
        """Of its inputs."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """In output order."""


def assemble_bundle(
    out: Path,
    network: VerifiedNetwork,
    *,
    parity: ParityReport,
    source: NetworkSource,
    extra_files: Mapping[str, bytes],
) -> Bundle:
    """Write the bundle, whole or not at all, and open it.

    Args:
        out: Its folder; must not exist, or be empty.
        network: What goes in.
        parity: Of its file.
        source: Where the network comes from.
        extra_files: By name, such as a report.

    Raises:
        BundleError: `out` is not free.
    """
    out = out.resolve()  # "." will be another folder afterwards
    exported, facts = network.exported, network.exported.facts
    with new_bundle_folder(out) as folder:
        for file in exported.folder.iterdir():
            shutil.copyfile(file, folder / file.name)
        for name, content in extra_files.items():
            (folder / name).write_bytes(content)
        _write_visits(folder / SAMPLES_FILE, network.measurement.visits)
        if anchor_visits := network.measurement.anchor_visits:
            _write_visits(folder / ANCHOR_SAMPLES_FILE, anchor_visits)
        manifest = Manifest(
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            config_id=facts.name,
            space_name=facts.family,
            supernet_sha256=source.sha256,
            constraints=network.constraints,
            verdicts=network.verdicts,
            candidates=network.candidates,
            resolution=facts.resolution,
            normalisation=source.normalisation,
            class_names=source.class_names,
            model_file=exported.model_file,
            files=record_files(folder),
            device=network.device,
            runtime=network.runtime,
            anchor_ratio=network.anchor_ratio,
            measured=measured_latency(network.measurement),
            predicted=network.predicted,
            accuracy=network.accuracy,
            parity=parity,
            cost=facts.cost,
            versions={name: installed_version(name) for name in VERSIONED_PACKAGES},
        )
        write_manifest(folder, manifest)
    return Bundle.open(out)


def predicted_accuracy(
    supernet: StoredSupernet, exported: ExportedNetwork
) -> AccuracyClaim:
    """What the supernet's predictor says of a network.

    Raises:
        DeployError: The supernet has no predictor.
    """
    predictor, samples = supernet.accuracy, supernet.samples
    if predictor is None or samples is None:
        raise DeployError(NO_PREDICTOR)
    config = SubnetConfig.from_id(exported.facts.name)
    genome = supernet.space.encode(config)
    # A regression does not know that accuracies end at 1.
    value = float(np.clip(predictor.predict(genome[None])[0], 0.0, 1.0))
    margin = TWO_SIDED_95 * predictor.residual_std
    return AccuracyClaim(
        kind="predicted",
        value=value,
        low=max(0.0, value - margin),
        high=min(1.0, value + margin),
        image_count=samples.image_count,
    )


def require_classes(evaluation: ImageSet, source: NetworkSource) -> None:
    """Refuse images of other classes than the network's.

    Raises:
        DataError: The classes, or their order, differ.
    """
    given, wanted = evaluation.class_names, source.class_names
    for one, other in zip_longest(given, wanted):
        if one != other:
            raise DataError(
                f"the evaluation data has class {one!r} where the network has "
                f"{other!r} ({len(given)} and {len(wanted)} in all); they must be the "
                "same, in the same order: rename the folders, or reorder the .npz's "
                "class_names"
            )


def measured_accuracy(
    source: NetworkSource,
    exported: ExportedNetwork,
    evaluation: ImageSet,
    runtime: RuntimeSpec,
    *,
    progress: Progress | None = None,
) -> AccuracyClaim:
    """Top-1 accuracy of the exported file on labelled images.

    Raises:
        DataError: The images have other classes than the network.
    """
    require_classes(evaluation, source)
    inputs = PreparedImages(
        images=evaluation.images,
        resolution=exported.facts.resolution,
        normalisation=source.normalisation,
    )
    path, count = exported.folder / exported.model_file, len(evaluation)
    with get_backend(runtime.backend).load(path, threads=runtime.threads) as session:
        value = top1_accuracy(
            session, inputs, evaluation.labels, batch_size=1, progress=progress
        )
    low, high = accuracy_interval(value, count)
    return AccuracyClaim(
        kind="measured", value=value, low=low, high=high, image_count=count
    )


def _write_visits(path: Path, visits: Sequence[Visit]) -> None:
    """Raw data, as JSON."""
    path.write_text(json.dumps([encode_visit(visit) for visit in visits]) + "\n")


def measured_latency(measurement: FreshMeasurement) -> MeasuredLatency:
    """A fresh measurement as a manifest tells it."""
    return MeasuredLatency(
        quiet_ms=measurement.quiet_ms,
        standard_error_ratio=measurement.standard_error_ratio,
        median_ms=measurement.median_ms,
        p90_ms=measurement.p90_ms,
        p95_ms=measurement.p95_ms,
        p99_ms=measurement.percentile_ms(99),
        sample_count=len(measurement.samples_ns),
        process_count=measurement.process_count,
        process_spread_ratio=measurement.process_spread_ratio,
        first_inference_ms=measurement.first_inference_ms,
        load_ms=measurement.load_ms,
        memory_mb=measurement.memory_mb,
        beta=measurement.beta,
        anchor_reference_ns=measurement.anchor_reference_ns,
        anchor_model_ms=measurement.anchor_model_ms,
        indicative=measurement.indicative,
        instability=measurement.stability.reasons,
        conditions=measurement.conditions,
    )
