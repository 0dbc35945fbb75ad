"""ONNX Runtime on the CPU, one inference at a time."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
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

__all__ = ["OnnxRuntimeCpu", "OnnxRuntimeSession"]

_PROVIDER = "CPUExecutionProvider"
_NODE_SUFFIX = "_kernel_time"

# From ONNX Runtime's names to numpy's.
_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
}


class OnnxRuntimeCpu:
    """Loads `.onnx` files and ONNX bytes.

    Args:
        optimize: False runs the graph node by node as it is written: the reference
            that fused and optimised forms are compared with.
    """

    name = "onnxruntime-cpu"

    def __init__(self, *, optimize: bool = True) -> None:
        self._optimize = optimize

    def load(self, model: Path | bytes, *, threads: int) -> OnnxRuntimeSession:
        """See `Backend.load`."""
        return self._load(model, threads=threads, profile_prefix=None)

    def profile_layers(
        self, model: Path | bytes, *, threads: int, runs: int
    ) -> tuple[LayerLatency, ...]:
        """See `LayerProfiler.profile_layers`."""
        check_runs(runs)
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
            prefix = str(Path(folder) / "profile")
            with self._load(model, threads=threads, profile_prefix=prefix) as session:
                events = session.profile_events(WARMUP_RUNS + runs)
        return _layers(events)

    def _load(
        self, model: Path | bytes, *, threads: int, profile_prefix: str | None
    ) -> OnnxRuntimeSession:
        check_threads(threads)
        label = describe_model(model)
        runtime = _import_onnxruntime()
        options = runtime.SessionOptions()
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Else a model's threads, once it has run, wait busily beside the next model's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = (
            runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
            if self._optimize
            else runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        )
        # Errors come as exceptions; warnings on stderr would be ours in a CLI's eyes.
        options.log_severity_level = 4
        try:
            session = runtime.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=[_PROVIDER],
            )
        except Exception as error:  # the runtime's classes differ by version
            raise ModelRejected(
                f"ONNX Runtime cannot load {label}: {error}; give a valid ONNX model"
            ) from error
        return OnnxRuntimeSession(session)

    def runtime(self, *, threads: int) -> RuntimeSpec:
        """See `Backend.runtime`."""
        return RuntimeSpec(
            backend=self.name,
            version=str(_import_onnxruntime().__version__),
            provider=_PROVIDER,
            threads=threads,
            precision="f32",
        )

    def accelerator(self) -> None:
        """See `Backend.accelerator`; it is the CPU."""


class OnnxRuntimeSession(Closing):
    """An inference session with its bound inputs."""

    def __init__(self, session: Any) -> None:
        self._session: Any = session
        self.input_shapes: dict[str, tuple[int, ...]] = {
            node.name: tuple(
                size if isinstance(size, int) else DYNAMIC for size in node.shape
            )
            for node in session.get_inputs()
        }
        self.input_dtypes: dict[str, np.dtype[Any]] = {
            node.name: _dtype(node) for node in session.get_inputs()
        }
        self._output_names = [node.name for node in session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        arrays = self._checked(inputs)
        try:
            outputs = self._session.run(
                self._output_names, dict(zip(self.input_shapes, arrays, strict=True))
            )
        except Exception as error:  # the runtime's classes differ by version
            raise RunFailed(f"ONNX Runtime failed to run the model: {error}") from error
        return dict(zip(self._output_names, map(np.array, outputs), strict=True))

    def prepare(self, inputs: Arrays) -> Callable[[], None]:
        """See `Session.prepare`."""
        arrays = self._checked(inputs)
        session = self._session
        try:
            binding = session.io_binding()
            for name, array in zip(self.input_shapes, arrays, strict=True):
                binding.bind_cpu_input(name, array)
            for name in self._output_names:
                binding.bind_output(name, "cpu")
        except Exception as error:  # the runtime's classes differ by version
            raise RunFailed(f"ONNX Runtime refused the inputs: {error}") from error

        def step() -> None:
            session.run_with_iobinding(binding)

        return step

    def profile_events(self, runs: int) -> list[dict[str, Any]]:
        """Events of the runtime's own profile; the session must be loaded for one."""
        step = self.prepare(random_inputs(self, np.random.default_rng(0)))
        try:
            for _ in range(runs):
                step()
        except Exception as error:  # the runtime's classes differ by version
            raise RunFailed(f"ONNX Runtime failed to run the model: {error}") from error
        path = Path(self._session.end_profiling())
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return events

    def close(self) -> None:
        """See `Session.close`."""
        self._session = None

    def _checked(self, inputs: Arrays) -> list[NDArray[Any]]:
        if self._session is None:
            raise RunFailed("the session is closed; load the model again")
        return check_inputs(inputs, shapes=self.input_shapes, dtypes=self.input_dtypes)


def _layers(events: list[dict[str, Any]]) -> tuple[LayerLatency, ...]:
    """Medians by node, the warm-up runs left out."""
    times_ms: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith(_NODE_SUFFIX):
            key = (name.removesuffix(_NODE_SUFFIX), event["args"]["op_name"])
            times_ms.setdefault(key, []).append(event["dur"] / 1e3)
    return tuple(
        LayerLatency(
            name=name,
            kind=kind,
            # A node of a branch may not have run after the warm-up.
            median_ms=statistics.median(times[WARMUP_RUNS:] or times),
        )
        for (name, kind), times in times_ms.items()
    )


def _dtype(node: Any) -> np.dtype[Any]:
    try:
        return np.dtype(_DTYPES[node.type])
    except KeyError:
        raise ModelRejected(
            f"input {node.name!r} is a {node.type}; inputs may be one of "
            f"{sorted(_DTYPES)}; export the model with such an input"
        ) from None


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("ONNX Runtime", extra="onnxruntime") from error
    # Does something on Windows only, where the released builds send events.
    onnxruntime.disable_telemetry_events()
    return onnxruntime
