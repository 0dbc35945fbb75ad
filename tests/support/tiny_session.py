"""A session with the tiny supernet on this machine, and timings that nobody took."""

from __future__ import annotations

from pathlib import Path

from ofa_deploy.pipeline import Specializer
from ofa_deploy.plan import lower
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import write_supernet
from profilers import FreshMeasurement, LatencyTable, Stability, Visit
from profilers.backends import get_backend
from profilers.device import this_device
from tests.support import tiny
from tests.support.tiny_bundle import CONDITIONS


def table_here(backend: str) -> LatencyTable:
    """A table that holds on this machine; its latencies grow with the work."""

    def network_ms(config: SubnetConfig) -> float:
        return sum(tiny.work_ms(block) for block in lower(tiny.SPACE, config).blocks)

    runner = get_backend(backend)
    return tiny.latency_table(
        tiny.SPACE,
        networks=tiny.random_configs(tiny.SPACE, 20),
        network_ms=network_ms,
        device=this_device(accelerator=runner.accelerator()),
        runtime=runner.runtime(threads=1),
        origin="measured",
    )


def write_inputs(folder: Path, *, backend: str) -> tuple[Path, Path]:
    """The tiny supernet's folder and a table's file, as the command line takes them."""
    write_supernet(folder / "supernet", tiny.stored())
    table_here(backend).save(folder / "table.json")
    return folder / "supernet", folder / "table.json"


def open_session(folder: Path, *, backend: str = "onnxruntime-cpu") -> Specializer:
    """A session whose files are in `folder`."""
    supernet, table = write_inputs(folder, backend=backend)
    return Specializer(backend, supernet=supernet, table=table)


def fresh(quiet_ms: float, *, error_ratio: float = 0.0) -> FreshMeasurement:
    """A fresh measurement that says `quiet_ms`."""
    visit = Visit(
        time_ns=0,
        anchor_before_ns=250_000,
        anchor_after_ns=250_000,
        inner_loops=1,
        samples_ns=(max(1, round(quiet_ms * 1e6)),),
    )
    return FreshMeasurement(
        visits=(visit,),
        process_count=1,
        quiet_ms=quiet_ms,
        standard_error_ratio=error_ratio,
        median_ms=quiet_ms,
        p90_ms=None,
        p95_ms=None,
        process_spread_ratio=0.0,
        first_inference_ms=1.0,
        load_ms=1.0,
        memory_mb=1.0,
        beta=1.0,
        anchor_reference_ns=250_000.0,
        anchor_model_ms=None,
        anchor_visits=(),
        anchor_found_ms=None,
        conditions=CONDITIONS,
        indicative=True,
        stability=Stability(verdict="stable"),
    )
