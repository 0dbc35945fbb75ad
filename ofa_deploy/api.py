"""The call that most people need: `specialize`, for a device, a fleet, or one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.bundle import Bundle, require_output
from ofa_deploy.constraints import Constraints
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import DataError, DeviceError, SpaceError
from ofa_deploy.feasibility import CostRange
from ofa_deploy.fleet import Fleet, specialize_fleet
from ofa_deploy.pipeline import (
    DEFAULT_SUPERNET,
    OnDrift,
    Specializer,
    opened,
    read_inputs,
    require_seed,
)
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.target import parse_target

if TYPE_CHECKING:
    from torch import nn

    from ofa_deploy.shrink.finetuning import TrainingCallback
    from ofa_deploy.shrink.recipe import ShrinkRecipe

_ONE_OF = (
    "give either a device, such as 'openvino-cpu', or devices with their budgets, such "
    "as {'openvino-cpu': 0.5}"
)
FeasibilityCallback = Callable[[tuple[CostRange, ...]], None]


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
    on_feasibility: FeasibilityCallback | None = None,
) -> Bundle: ...


@overload
def specialize(
    device: str,
    *,
    model: nn.Module,
    method: str = "pas",
    data: str | Path | ImageSet,
    out: str | Path,
    latency_ms: float | None = None,
    percentile: int = 50,
    size_bytes: int | None = None,
    compressed_bytes: int | None = None,
    peak_memory_mb: float | None = None,
    min_accuracy: float | None = None,
    rate_hz: float | None = None,
    sustained_s: float = 0.0,
    threads: int | None = None,
    eval_data: str | Path | ImageSet | None = None,
    normalisation: Normalisation | None = None,
    recipe: ShrinkRecipe | None = None,
    work: str | Path | None = None,
    reporter: Reporter | None = None,
    on_training_progress: TrainingCallback | None = None,
    executor: Executor | None = None,
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
    model: nn.Module | None = None,
    method: str = "pas",
    data: str | Path | ImageSet | None = None,
    out: str | Path,
    latency_ms: float | None = None,
    percentile: int = 50,
    size_bytes: int | None = None,
    compressed_bytes: int | None = None,
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
    normalisation: Normalisation | None = None,
    recipe: ShrinkRecipe | None = None,
    work: str | Path | None = None,
    reporter: Reporter | None = None,
    on_feasibility: FeasibilityCallback | None = None,
    on_training_progress: TrainingCallback | None = None,
    executor: Executor | None = None,
) -> Bundle | Fleet:
    """A verified bundle whose model was shown to keep all limits on this machine.

    One call of a `Specializer`; keep one for several budgets. Given `devices`, a fleet
    of bundles instead: see `ofa_deploy.fleet.specialize_fleet`. Given a `model`, that
    network is shrunk to the latency: see `ofa_deploy.shrink.to_budget.shrink`, which
    needs torch.

    Args:
        device: Such as `openvino-cpu` or `openvino-cpu?threads=2`.
        devices: Budgets in ms by device, instead of a device and its limits.
        max_models: With `devices`: different networks at most.
        model: A trained torch module to shrink, instead of a supernet.
        method: With `model`: how, `pas`, `legr`, `autoprune` or `tas`, which take
            channels, or `autoprune-weights`, which takes single weights and makes
            nothing faster.
        data: With `model`: labelled images to train on.
        out: Folder of the bundle; must not exist, or be empty.
        latency_ms: See `Constraints`, as the next seven.
        percentile: Of the runs that the latency speaks of.
        size_bytes: Of the files that the runtime loads.
        compressed_bytes: With `model`: of these, compressed.
        peak_memory_mb: Of a process that loads and runs the model.
        min_accuracy: To be kept by the fastest network.
        rate_hz: The application's runs per second.
        sustained_s: Load before the first timed run.
        threads: Of one inference, instead of naming them in `device`.
        supernet: Name in the zoo, folder of one that was trained, or one that is open.
        calibration: Images for the batch-norm statistics instead of the supernet's
            own: a folder, .zip or .npz, or `(n, H, W, 3)` uint8.
        eval_data: Labelled images to measure the accuracy on; None to predict it. With
            `model`, None measures it on the tenth of `data` that is held out, for legr
            on half of that.
        table: A latency table's file to use instead of looking for one.
        on_drift: See `Specializer`.
        seed: Of searches.
        normalisation: With `model`: of its inputs; None measures the images.
        recipe: With `model`: epochs, rates, floor and step; None for the default.
        work: With `model`: folder of checkpoints, from which a killed call goes on.
        reporter: Told of progress.
        on_feasibility: Called with what the space can reach, before it is searched.
        on_training_progress: With `model`: called with what is trained, and how far
            it is.
        executor: With `model` and legr: judges its candidates; None for processes, one
            a core. Any `concurrent.futures.Executor` will do.

    Raises:
        InfeasibleBudget: No network keeps the limits; carries what comes nearest.
        DeployError: Anything else that is wrong; see `ofa_deploy.errors`.
    """
    own = {
        "data": data,
        "normalisation": normalisation,
        "recipe": recipe,
        "work": work,
        "on_training_progress": on_training_progress,
        "executor": executor,
        "method": None if method == "pas" else method,
        "compressed_bytes": compressed_bytes,
    }
    _refuse_given(
        own if model is None else {}, "are for a network of your own (model=)"
    )
    _refuse_given(
        {}
        if model is None
        else {
            "devices": devices,
            "max_models": max_models,
            "supernet": None if supernet == DEFAULT_SUPERNET else supernet,
            "calibration": calibration,
            "table": table,
            "on_drift": None if on_drift == "refuse" else on_drift,
            "seed": seed or None,
            "on_feasibility": on_feasibility,
        },
        "are for supernets, and a network of your own is none",
    )
    _refuse_given(
        {"executor": executor if method != "legr" else None},
        f"are for method='legr', and this is {method!r}",
    )
    limits = (latency_ms, size_bytes, peak_memory_mb, min_accuracy, rate_hz, threads)
    if devices is not None:
        if device is not None:
            raise DeviceError(_ONE_OF)
        if (
            any(limit is not None for limit in limits)
            or (percentile, sustained_s, table) != (50, 0.0, None)
            or on_feasibility is not None
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
        compressed_bytes=compressed_bytes,
        peak_memory_mb=peak_memory_mb,
        min_accuracy=min_accuracy,
        rate_hz=rate_hz,
        sustained_s=sustained_s,
    )
    if model is not None:
        if data is None:
            raise DataError(
                "a network is trained while it is shrunk; give labelled images as "
                "data= (a folder, .zip or .npz)"
            )
        from ofa_deploy.shrink.finetuning import ignore_progress
        from ofa_deploy.shrink.to_budget import shrink

        return shrink(
            model,
            device=device,
            constraints=constraints,
            method=method,
            data=data,
            out=out,
            threads=threads,
            eval_data=eval_data,
            normalisation=normalisation,
            recipe=recipe,
            work=work,
            reporter=reporter,
            on_progress=on_training_progress or ignore_progress,
            executor=executor,
        )
    require_output(Path(out))
    require_seed(seed)
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
    if on_feasibility is not None:
        on_feasibility(session.feasibility(constraints))
    return session.specialize(
        constraints, out=out, calibration=images, eval_data=evaluation, seed=seed
    )


def _refuse_given(arguments: Mapping[str, object], why: str) -> None:
    """Refuse arguments that would be ignored.

    Raises:
        SpaceError: Names those that are not None.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise SpaceError(f"{', '.join(given)}: these {why}; leave them out")
