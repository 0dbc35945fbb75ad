"""Timing a bundle again, wherever it is now: with its runtime alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ofa_deploy.bundle import Bundle
from ofa_deploy.constraints import Constraints, Verdict
from ofa_deploy.device_bench import CERTIFY_SETTINGS
from ofa_deploy.drift import MAX_DRIFT_RATIO, write_anchor_model
from ofa_deploy.manifest import Manifest
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.target import Target
from ofa_deploy.verify import enough_runs, judge_latency, require_time_for
from ofa_deploy.zoo import find_in_zoo
from profilers.backends import get_backend
from profilers.device import differing_fields, read_conditions, this_device
from profilers.fresh import (
    AnchorModel,
    FreshMeasurement,
    measure_in_fresh_process,
)
from profilers.timing import CERTIFY_PROCESSES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rebench:
    """A bundle's model, timed here.

    Args:
        measurement: Now.
        certified_beside_ms: Latency of the anchor model that the manifest's timing was
            held against; None where it was not, or was taken elsewhere.
        elsewhere: In what this machine differs from the one of the manifest, in words;
            empty where it does not. Latencies then compare machines, not times.
        verdict: Against the latency that was held to; None if none was.
    """

    measurement: FreshMeasurement
    elsewhere: tuple[str, ...]
    verdict: Verdict | None
    certified_beside_ms: float | None

    @property
    def level_told(self) -> str:
        """What became of the level that was certified at, in words; empty if nothing.

        A latency that is held against another level is not the same quantity.
        """
        then_ms, now_ms = self.certified_beside_ms, self.measurement.anchor_found_ms
        if then_ms is None:
            return ""
        if now_ms is None:
            return (
                "certified beside an anchor model, and timed alone now: that is of a "
                "network of somebody's own, or of a supernet that is not in the zoo, "
                "or single runs are asked about, or others do not share this machine "
                "any more"
            )
        off = f"the anchor model takes {now_ms / then_ms - 1:+.1%} now"
        if self.measurement.anchor_model_ms is None:
            return (
                f"{off}, over {MAX_DRIFT_RATIO:.0%}: this machine is not what it was, "
                "and the model is timed as it is"
            )
        return f"{off}; the model is held against it"


def rebench(
    bundle: Bundle,
    *,
    latency_ms: float | None = None,
    percentile: int | None = None,
    reporter: Reporter | None = None,
) -> Rebench:
    """Time a bundle's model in fresh processes, at the pace it was certified at.

    On the machine of the manifest, if others' work slows it down, latencies speak of
    the same quiet level as there; if that was an anchor model's, and the supernet is in
    the zoo, by that model again, unless it takes over 5 % more or less by now.

    Args:
        bundle: Open.
        latency_ms: Budget to hold it to; None takes the manifest's.
        percentile: Of that budget; None takes the manifest's.
        reporter: Told of progress.

    Raises:
        MissingDependency: The runtime is not installed.
        RunFailed: The model does not run here, or has more threads than this machine
            has cores.
        SpaceError: A budget that makes no sense, or a percentile without one.
        UnstableMeasurement: The percentile is not known.
    """
    manifest, reporter = bundle.manifest, reporter or Silent()
    asked = _asked(manifest.constraints, latency_ms, percentile)
    require_time_for(asked)
    elsewhere = differences(bundle)
    known = manifest.measured if not elsewhere else None
    reporter.begin("timing the bundle's model")
    with TemporaryDirectory(prefix="ofa-deploy-") as folder:
        anchor_model = None
        shared = read_conditions().shared_host
        if known is not None and asked.is_plain and shared:
            anchor_model = _anchor_model(manifest, Path(folder))
        measurement = measure_in_fresh_process(
            bundle.model_path,
            backend_name=manifest.runtime.backend,
            threads=manifest.runtime.threads,
            settings=enough_runs(CERTIFY_SETTINGS, asked, processes=CERTIFY_PROCESSES),
            processes=CERTIFY_PROCESSES,
            beta=None if known is None else known.beta,
            anchor_reference_ns=None if known is None else known.anchor_reference_ns,
            anchor_model=anchor_model,
            pace=asked.pace,
            progress=reporter.advance,
        )
    verdict = None
    if asked.budget_ms is not None:
        verdict = judge_latency(
            measurement,
            budget_ms=asked.budget_ms,
            percentile=asked.percentile,
            paced=asked.pace is not None,
        )
    return Rebench(
        measurement=measurement,
        elsewhere=elsewhere,
        verdict=verdict,
        certified_beside_ms=None if known is None else known.anchor_model_ms,
    )


def _anchor_model(manifest: Manifest, folder: Path) -> AnchorModel | None:
    """What the model was certified beside, if that can be written here."""
    quiet_ms = manifest.measured.anchor_model_ms
    if quiet_ms is None:
        return None
    supernet = find_in_zoo(manifest.supernet_sha256)
    if supernet is None:
        return None
    runtime = manifest.runtime
    target = Target(backend=runtime.backend, threads=runtime.threads)
    path = write_anchor_model(supernet.space, target, folder)
    return AnchorModel(path=path, quiet_ms=quiet_ms, max_off_ratio=MAX_DRIFT_RATIO)


def differences(bundle: Bundle) -> tuple[str, ...]:
    """In what this machine and runtime differ from those of the manifest."""
    manifest = bundle.manifest
    backend = get_backend(manifest.runtime.backend)
    here = this_device(accelerator=backend.accelerator())
    runtime = backend.runtime(threads=manifest.runtime.threads)
    return tuple(
        f"{kind} {field} is {after!r} here and was {before!r} there"
        for kind, then, now in (
            ("device", manifest.device, here),
            ("runtime", manifest.runtime, runtime),
        )
        for field, before, after in differing_fields(then, now)
    )


def _asked(
    constraints: Constraints, latency_ms: float | None, percentile: int | None
) -> Constraints:
    return replace(
        constraints,
        latency_ms=constraints.latency_ms if latency_ms is None else latency_ms,
        percentile=constraints.percentile if percentile is None else percentile,
    )
