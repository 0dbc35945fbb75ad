"""The two calls that most people need: `specialize`, for a device or for a fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.bundle import Bundle, require_free
from ofa_deploy.constraints import Constraints
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import DeviceError, SpaceError
from ofa_deploy.feasibility import CostRange
from ofa_deploy.fleet import Fleet, specialize_fleet
from ofa_deploy.pipeline import (
    DEFAULT_SUPERNET,
    OnDrift,
    Specializer,
    opened,
    read_inputs,
)
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.target import parse_target

_ONE_OF = (
    "give either a device, such as 'openvino-cpu', or devices with their budgets, such "
    "as {'openvino-cpu': 0.5}"
)
Told = Callable[[tuple[CostRange, ...]], None]


def nobody(rows: tuple[CostRange, ...]) -> None:
    """Told of what can be reached, and does nothing."""


@overload
def specialize(
    device: str,
    *,
    out: str | Path,
    latency_ms: float | None = None,
    percentile: int = 50,
    size_bytes: int | None = None,
    peak_memory_mb: float | None = None,
    min_accuracy: float | None = None,
    rate_hz: float | None = None,
    sustained_s: float = 0.0,
    threads: int | None = None,
    supernet: str | Path | StoredSupernet = DEFAULT_SUPERNET,
    calibration: str | Path | NDArray[np.uint8] | None = None,
    eval_data: str | Path | ImageSet | None = None,
    table: str | Path | None = None,
    on_drift: OnDrift = "refuse",
    seed: int = 0,
    reporter: Reporter | None = None,
    told: Told = nobody,
) -> Bundle: ...


@overload
def specialize(
    *,
    devices: Mapping[str, float],
    max_models: int | None = None,
    out: str | Path,
    supernet: str | Path | StoredSupernet = DEFAULT_SUPERNET,
    calibration: str | Path | NDArray[np.uint8] | None = None,
    eval_data: str | Path | ImageSet | None = None,
    on_drift: OnDrift = "refuse",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Fleet: ...


def specialize(
    device: str | None = None,
    *,
    devices: Mapping[str, float] | None = None,
    max_models: int | None = None,
    out: str | Path,
    latency_ms: float | None = None,
    percentile: int = 50,
    size_bytes: int | None = None,
    peak_memory_mb: float | None = None,
    min_accuracy: float | None = None,
    rate_hz: float | None = None,
    sustained_s: float = 0.0,
    threads: int | None = None,
    supernet: str | Path | StoredSupernet = DEFAULT_SUPERNET,
    calibration: str | Path | NDArray[np.uint8] | None = None,
    eval_data: str | Path | ImageSet | None = None,
    table: str | Path | None = None,
    on_drift: OnDrift = "refuse",
    seed: int = 0,
    reporter: Reporter | None = None,
    told: Told = nobody,
) -> Bundle | Fleet:
    """A verified bundle whose model was shown to keep all limits on this machine.

    One call of a `Specializer`; keep one for several budgets. Given `devices`, a fleet
    of bundles instead: see `ofa_deploy.fleet.specialize_fleet`.

    Args:
        device: Such as `openvino-cpu` or `openvino-cpu?threads=2`.
        devices: Budgets in ms by device, instead of a device and its limits.
        max_models: With `devices`: different networks at most.
        out: Folder of the bundle; must not exist, or be empty.
        latency_ms: See `Constraints`, as the next six.
        percentile: Of the runs that the latency speaks of.
        size_bytes: Of the files that the runtime loads.
        peak_memory_mb: Of a process that loads and runs the model.
        min_accuracy: To be kept by the fastest network.
        rate_hz: The application's runs per second.
        sustained_s: Load before the first timed run.
        threads: Of one inference, instead of naming them in `device`.
        supernet: Name in the zoo, folder of one that was trained, or one that is open.
        calibration: Images for the batch-norm statistics instead of the supernet's
            own: a folder, .zip or .npz, or `(n, H, W, 3)` uint8.
        eval_data: Labelled images to measure the accuracy on; None to predict it.
        table: A latency table's file to use instead of looking for one.
        on_drift: See `Specializer`.
        seed: Of searches.
        reporter: Told of progress.
        told: Called with what the space can reach, before anything is searched.

    Raises:
        InfeasibleBudget: No network keeps the limits; carries what comes nearest.
        DeployError: Anything else that is wrong; see `ofa_deploy.errors`.
    """
    limits = (latency_ms, size_bytes, peak_memory_mb, min_accuracy, rate_hz, threads)
    if devices is not None:
        if device is not None:
            raise DeviceError(_ONE_OF)
        if (
            any(limit is not None for limit in limits)
            or (percentile, sustained_s, table) != (50, 0.0, None)
            or told is not nobody
        ):
            raise SpaceError(
                "devices carry their own budgets, and find their own tables; leave "
                "out latency_ms, table and every other limit"
            )
        return specialize_fleet(
            devices,
            out=out,
            max_models=max_models,
            supernet=supernet,
            calibration=calibration,
            eval_data=eval_data,
            on_drift=on_drift,
            seed=seed,
            reporter=reporter,
        )
    if device is None:
        raise DeviceError(_ONE_OF)
    if max_models is not None:
        raise SpaceError(
            f"max_models={max_models} is for several devices; leave it out"
        )
    constraints = Constraints(
        latency_ms=latency_ms,
        percentile=percentile,
        size_bytes=size_bytes,
        peak_memory_mb=peak_memory_mb,
        min_accuracy=min_accuracy,
        rate_hz=rate_hz,
        sustained_s=sustained_s,
    )
    require_free(Path(out))
    parse_target(device, threads=threads)
    reporter = reporter or Silent()
    source = opened(supernet)
    # What is wrong with them is told before the profiling, not after it.
    images, evaluation = read_inputs(
        source, calibration=calibration, eval_data=eval_data, reporter=reporter
    )
    session = Specializer(
        device,
        supernet=source,
        threads=threads,
        table=table,
        on_drift=on_drift,
        reporter=reporter,
    )
    told(session.feasibility(constraints))
    return session.specialize(
        constraints, out=out, calibration=images, eval_data=evaluation, seed=seed
    )
