"""Times of a model file's layers, in a process that a runtime may crash or hang."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from profilers.backends import get_backend
from profilers.backends.base import LayerLatency, LayerProfiler
from profilers.errors import DeviceError, FormatError, RunFailed
from profilers.json_reader import JsonNode, parse_json
from profilers.measure import check_cores
from profilers.process import run_for_line

__all__ = [
    "LAYER_RUNS",
    "encode_layers",
    "profile_layers",
    "profile_layers_in_fresh_process",
]

# Of one profile; enough for a median.
LAYER_RUNS = 20

# Starting an interpreter, importing, compiling, and twenty runs.
LIMIT_S = 120.0


def profile_layers(
    model: Path, *, backend_name: str, threads: int, runs: int = LAYER_RUNS
) -> tuple[LayerLatency, ...]:
    """Run a model in this process with the runtime's own profiling on.

    Args:
        model: The file.
        backend_name: As `get_backend` takes it.
        threads: Of one inference, at least 1.
        runs: Profiled runs, at least 1.

    Raises:
        DeviceError: The runtime does not tell what its layers take.
        DeviceUnfit: `threads` is more than the cores that this process can use.
        BackendError: It cannot load or run the model.
    """
    backend = get_backend(backend_name)
    if not isinstance(backend, LayerProfiler):
        raise DeviceError(
            f"{backend_name} does not tell what its layers take; time the whole model"
        )
    check_cores(threads)
    layers = backend.profile_layers(model, threads=threads, runs=runs)
    if not layers:
        raise RunFailed(
            f"{backend_name} told of no layer of {model.name}; time the whole model"
        )
    return layers


def profile_layers_in_fresh_process(
    model: Path,
    *,
    backend_name: str,
    threads: int,
    runs: int = LAYER_RUNS,
    limit_s: float = LIMIT_S,
) -> tuple[LayerLatency, ...]:
    """Like `profile_layers`, and a crash or a hang is an error like any other.

    Args:
        model: The file.
        backend_name: As `get_backend` takes it.
        threads: Of one inference, at least 1.
        runs: Profiled runs, at least 1.
        limit_s: After which the process is stopped.

    Raises:
        RunFailed: The process failed, crashed, or took too long.
    """
    line = run_for_line(
        [
            *("layers", str(model), "--backend", backend_name),
            *("--threads", str(threads), "--runs", str(runs), "--json"),
        ],
        label=f"the process profiling {model.name}",
        timeout_s=limit_s,
        cure="the runtime hangs on this model; time it without its layers",
    )
    try:
        return tuple(_decode(node) for node in parse_json(line).items())
    except FormatError as error:
        raise RunFailed(
            f"the process profiling {model.name} gave no report ({error})"
        ) from error


def encode_layers(layers: Sequence[LayerLatency]) -> str:
    """One line of JSON, as the process gives it."""
    return json.dumps([dataclasses.asdict(layer) for layer in layers], allow_nan=False)


def _decode(node: JsonNode) -> LayerLatency:
    fields = node.fields(*(field.name for field in dataclasses.fields(LayerLatency)))
    return node.build(
        lambda: LayerLatency(
            name=fields["name"].text(),
            kind=fields["kind"].text(),
            median_ms=fields["median_ms"].number(minimum=0),
        )
    )
