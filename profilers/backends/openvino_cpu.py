"""OpenVINO on the CPU, set for the latency of one inference at a time."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profilers.backends.base import (
    DYNAMIC,
    WARMUP_RUNS,
    Arrays,
    LayerLatency,
    check_inputs,
    check_runs,
    check_threads,
    describe_model,
    random_inputs,
)
from profilers.closing import Closing
from profilers.device import RuntimeSpec
from profilers.errors import MissingDependency, ModelRejected, RunFailed

__all__ = ["OpenVinoCpu", "OpenVinoSession"]

_TELEMETRY = "openvino_telemetry"


class OpenVinoCpu:
    """Loads `.onnx` files, ONNX bytes, and OpenVINO IR `.xml` files."""

    name = "openvino-cpu"

    def __init__(self) -> None:
        self._core: Any = None

    def load(self, model: Path | bytes, *, threads: int) -> OpenVinoSession:
        """See `Backend.load`."""
        return self._load(model, threads=threads)

    def profile_layers(
        self, model: Path | bytes, *, threads: int, runs: int
    ) -> tuple[LayerLatency, ...]:
        """See `LayerProfiler.profile_layers`."""
        check_runs(runs)
        with self._load(model, threads=threads, PERF_COUNT="YES") as session:
            return session.profile_layers(runs)

    def _load(
        self, model: Path | bytes, *, threads: int, **extra: str
    ) -> OpenVinoSession:
        check_threads(threads)
        label = describe_model(model)
        openvino = import_openvino()
        if self._core is None:
            self._core = openvino.Core()
        settings = {
            **extra,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            # On CPUs with AVX512-BF16 or AMX the default is bf16: faster, and off by
            # 1e-2 from the model that was checked.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            source = model if isinstance(model, bytes) else str(model)
            network = self._core.read_model(source)
            compiled = self._core.compile_model(network, "CPU", settings)
            if int(compiled.get_property("INFERENCE_NUM_THREADS")) < threads:
                # By itself it leaves out the second thread of each core.
                settings["ENABLE_HYPER_THREADING"] = "YES"
                del compiled  # or a process would be told to need both
                compiled = self._core.compile_model(network, "CPU", settings)
            return OpenVinoSession(openvino, compiled)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise ModelRejected(
                f"OpenVINO cannot load {label}: {str(error).strip()}; "
                "give a valid ONNX model or OpenVINO IR .xml file"
            ) from error

    def runtime(self, *, threads: int) -> RuntimeSpec:
        """See `Backend.runtime`."""
        return RuntimeSpec(
            backend=self.name,
            # "2026.1.0-20000-abcdef": the build's hash says nothing to people.
            version=str(import_openvino().get_version()).split("-")[0],
            provider="CPU",
            threads=threads,
            precision="f32",
        )

    def accelerator(self) -> None:
        """See `Backend.accelerator`; it is the CPU."""


class OpenVinoSession(Closing):
    """A compiled model with one synchronous request."""

    def __init__(self, openvino: Any, compiled: Any) -> None:
        self._openvino = openvino
        self._request: Any = compiled.create_infer_request()
        names = _port_names(compiled.inputs, "input")
        self.input_shapes: dict[str, tuple[int, ...]] = {
            name: tuple(
                DYNAMIC if size.is_dynamic else size.get_length()
                for size in port.partial_shape
            )
            for name, port in zip(names, compiled.inputs, strict=True)
        }
        self.input_dtypes: dict[str, np.dtype[Any]] = {
            name: np.dtype(port.element_type.to_dtype())
            for name, port in zip(names, compiled.inputs, strict=True)
        }
        self._output_names = _port_names(compiled.outputs, "output")
        self._held: Any = None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        self.prepare(inputs)
        try:
            self._request.infer(None, share_outputs=True)
            return {
                # The tensor's memory is the request's, and the next run's.
                name: np.array(self._request.get_output_tensor(index).data)
                for index, name in enumerate(self._output_names)
            }
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise RunFailed(f"OpenVINO failed to run the model: {error}") from error

    def prepare(self, inputs: Arrays) -> Callable[[], None]:
        """See `Session.prepare`."""
        if self._request is None:
            raise RunFailed("the session is closed; load the model again")
        arrays = check_inputs(
            inputs, shapes=self.input_shapes, dtypes=self.input_dtypes
        )
        infer = self._request.infer
        try:
            tensors = [self._openvino.Tensor(a, shared_memory=True) for a in arrays]
            for index, tensor in enumerate(tensors):
                self._request.set_input_tensor(index, tensor)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise RunFailed(f"OpenVINO refused the inputs: {error}") from error

        # The request has the tensors' memory, and keeps nothing of them alive.
        self._held = (arrays, tensors)

        def step() -> None:
            # Views of the outputs: copying them is not part of the inference.
            infer(None, share_outputs=True)

        return step

    def profile_layers(self, runs: int) -> tuple[LayerLatency, ...]:
        """Medians by layer; the model must have been compiled to count."""
        step = self.prepare(random_inputs(self, np.random.default_rng(0)))
        times_ms: dict[tuple[str, str], list[float]] = {}
        try:
            for _ in range(WARMUP_RUNS):
                step()
            for _ in range(runs):
                step()
                for layer in self._request.profiling_info:
                    if layer.status == layer.Status.EXECUTED:
                        key = (layer.node_name, layer.node_type)
                        elapsed_ms = layer.real_time.total_seconds() * 1e3
                        times_ms.setdefault(key, []).append(elapsed_ms)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise RunFailed(f"OpenVINO failed to run the model: {error}") from error
        return tuple(
            LayerLatency(name=name, kind=kind, median_ms=statistics.median(times))
            for (name, kind), times in times_ms.items()
        )

    def close(self) -> None:
        """See `Session.close`."""
        self._request = None
        self._held = None


def _port_names(ports: Any, kind: str) -> list[str]:
    # A port of an IR file may have no name, and one of ONNX may have several; the
    # shortest of several, then the first, does not depend on the set's order.
    return [
        min(port.get_names(), key=lambda name: (len(name), name), default="")
        or f"{kind}{index}"
        for index, port in enumerate(ports)
    ]


def import_openvino() -> Any:
    try:
        with _without_telemetry():
            import openvino
    except ImportError as error:
        raise MissingDependency("OpenVINO", extra="openvino") from error
    return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    # `import openvino` sends an event over the network unless the user opted out by
    # a file in the home directory. It falls back to a stub when its telemetry package
    # is missing, so the package is hidden for the time of the import only.
    present = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if present is None:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = present
