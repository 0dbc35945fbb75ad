"""A bundle of the tiny space, with a latency that nobody measured."""

from __future__ import annotations

from pathlib import Path

from ofa_deploy.bundle import Bundle, new_bundle_folder, record_files, write_manifest
from ofa_deploy.constraints import Constraints, Verdict
from ofa_deploy.exporting import compare_exported, export_network
from ofa_deploy.manifest import (
    Manifest,
    MeasuredLatency,
)
from ofa_deploy.plan import lower
from ofa_deploy.predict.latency import LatencyEstimate
from ofa_deploy.space import SubnetConfig
from ofa_deploy.target import Target
from ofa_deploy.verify import AccuracyClaim
from profilers.backends import get_backend
from profilers.device import Conditions, this_device
from tests.support import tiny

CONDITIONS = Conditions(
    governor=None,
    frequency_mhz=None,
    temperature_c=None,
    load_average=0.5,
    affinity_core_count=4,
    cgroup_quota_cores=None,
    shared_host=True,
)


def write_bundle(
    out: Path, *, backend: str = "onnxruntime-cpu", config: SubnetConfig | None = None
) -> Bundle:
    """Export a network of the tiny supernet, the largest by default."""
    supernet = tiny.stored()
    assert supernet.calibration is not None
    plan = lower(tiny.SPACE, config or tiny.SPACE.largest())
    with new_bundle_folder(out) as folder:
        exported = export_network(
            supernet,
            plan,
            calibration=supernet.calibration,
            target=Target(backend=backend, threads=1),
            folder=folder,
        )
        parity = compare_exported(
            exported, supernet.calibration, normalisation=supernet.normalisation
        )
        (folder / "latency_samples.json").write_text("[]\n")
        manifest = Manifest(
            created_at="2026-01-31T12:00:00+00:00",
            config_id=plan.name,
            space_name=plan.space_name,
            supernet_sha256="0" * 64,
            constraints=Constraints(latency_ms=2.0),
            verdicts=(
                Verdict(
                    constraint="latency",
                    limit=2.0,
                    found=1.5,
                    bound=1.525,
                    evidence="measured",
                ),
            ),
            candidates=(),
            resolution=plan.resolution,
            normalisation=supernet.normalisation,
            class_names=supernet.class_names,
            model_file=exported.model_file,
            files=record_files(folder),
            device=this_device(),
            runtime=get_backend(backend).runtime(threads=1),
            anchor_ratio=None,
            measured=MeasuredLatency(
                quiet_ms=1.5,
                standard_error_ratio=0.01,
                median_ms=1.6,
                p90_ms=1.9,
                p95_ms=None,
                p99_ms=None,
                sample_count=100,
                process_count=2,
                process_spread_ratio=0.02,
                first_inference_ms=9.0,
                load_ms=40.0,
                memory_mb=12.0,
                beta=0.9,
                anchor_reference_ns=160_000.0,
                anchor_model_ms=None,
                indicative=True,
                instability=("the host is shared",),
                conditions=CONDITIONS,
            ),
            predicted=LatencyEstimate(ms=1.4, low_ms=1.3, high_ms=1.5),
            accuracy=AccuracyClaim(
                kind="predicted", value=0.9, low=0.88, high=0.92, image_count=1000
            ),
            parity=parity,
            cost=plan.cost,
            versions={"ofa-deploy": "0.1.0"},
        )
        write_manifest(folder, manifest)
    return Bundle.open(out)
