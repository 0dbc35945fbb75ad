"""TensorRT, and TensorRT for RTX, on an NVIDIA GPU, timed by CUDA events."""

from __future__ import annotations

import importlib
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profilers.backends.base import (
    WARMUP_RUNS,
    Arrays,
    LayerLatency,
    check_inputs,
    check_runs,
    check_threads,
    describe_model,
    random_inputs,
)
from profilers.backends.cuda_device import (
    CaptureRefused,
    Gpu,
    Transfer,
    WorkQueue,
    open_gpu,
)
from profilers.backends.tensorrt_build import Engine, build_engine, process_log
from profilers.backends.tensorrt_listing import is_weight_only
from profilers.closing import Closing
from profilers.device import RuntimeSpec
from profilers.errors import BackendError, MissingDependency, ModelRejected, RunFailed

__all__ = ["TensorRtGpu", "TensorRtRtxGpu", "TensorRtSession"]

# Where a layer has no entry in the build log's listing.
_UNLISTED = "unlisted"


class TensorRtGpu:
    """Loads `.onnx` files and ONNX bytes; builds an engine of each on loading.

    `threads` is recorded and has no effect: one thread of the host launches the work.
    """

    name = "tensorrt-gpu"
    module = "tensorrt"
    package = "TensorRT"
    extra = "tensorrt"

    def load(self, model: Path | bytes, *, threads: int) -> TensorRtSession:
        """See `Backend.load`.

        Warns (`UserWarning`) of a model whose int8 weights are only stored as such.
        """
        return self._load(model, threads=threads, graphs=True)

    def profile_layers(
        self, model: Path | bytes, *, threads: int, runs: int
    ) -> tuple[LayerLatency, ...]:
        """See `LayerProfiler.profile_layers`."""
        check_runs(runs)
        # A profiler slows the launches down, and sees nothing inside a graph.
        with self._load(model, threads=threads, graphs=False) as session:
            return session.profile_layers(runs)

    def _load(
        self, model: Path | bytes, *, threads: int, graphs: bool
    ) -> TensorRtSession:
        check_threads(threads)
        label = describe_model(model)
        trt, gpu = self._open()
        content = model if isinstance(model, bytes) else model.read_bytes()
        engine = build_engine(trt, content, label=label)
        if is_weight_only(engine.layers):
            warnings.warn(
                f"{label} has int8 weights, and no layer multiplies in int8: they save "
                "memory only; quantize the activations too",
                stacklevel=3,
            )
        return TensorRtSession(trt, gpu, engine, label=label, graphs=graphs)

    def runtime(self, *, threads: int) -> RuntimeSpec:
        """See `Backend.runtime`."""
        trt, _ = self._open()
        return RuntimeSpec(
            backend=self.name,
            version=str(trt.__version__),
            provider="CUDA",
            threads=threads,
            precision="f32",
        )

    def accelerator(self) -> str:
        """See `Backend.accelerator`."""
        _, gpu = self._open()
        return gpu.description

    def _open(self) -> tuple[Any, Gpu]:
        try:
            trt = importlib.import_module(self.module)
        except ImportError as error:
            raise MissingDependency(self.package, extra=self.extra) from error
        # First: without a driver, TensorRT's own objects are null pointers.
        return trt, open_gpu(extra=self.extra)


class TensorRtRtxGpu(TensorRtGpu):
    """The same API, in the library for GPUs of the RTX family (from Ampere on)."""

    name = "tensorrt-rtx-gpu"
    module = "tensorrt_rtx"
    package = "TensorRT for RTX"
    extra = "tensorrt-rtx"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binding:
    """Memory for inputs of certain shapes, and how the model is run on it.

    Attributes:
        inputs: By name.
        outputs: By name.
        launch: Asks for one run.
        fallback: Why that is not by a graph.
    """

    inputs: dict[str, Transfer]
    outputs: dict[str, Transfer]
    launch: Callable[[], None]
    fallback: str | None


class TensorRtSession(Closing):
    """An engine with one execution context and one stream.

    Inputs lie on the GPU before a run, and outputs stay there: times are the GPU's own.
    The first run with inputs of new shapes is captured in a CUDA graph.
    """

    def __init__(
        self, trt: Any, gpu: Gpu, engine: Engine, *, label: str, graphs: bool
    ) -> None:
        self._trt = trt
        self._log = process_log(trt)
        self._layers = engine.layers
        self._graphs = graphs
        self._loaded = self._deserialize(engine.plan, label)
        self._context = self._new_context()
        if self._context is None:
            raise ModelRejected(
                f"TensorRT cannot run {label}: {self._log.last_words}; close other "
                "sessions, or give a smaller model"
            )
        names = [
            self._loaded.get_tensor_name(index)
            for index in range(self._loaded.num_io_tensors)
        ]
        dtypes = {name: self._dtype(name) for name in names}
        mode = self._loaded.get_tensor_mode
        inputs = [name for name in names if mode(name) == trt.TensorIOMode.INPUT]
        self.input_shapes: dict[str, tuple[int, ...]] = {
            # -1 where free, which is what `DYNAMIC` is too.
            name: tuple(self._loaded.get_tensor_shape(name))
            for name in inputs
        }
        self.input_dtypes = {name: dtypes[name] for name in inputs}
        self._output_dtypes = {n: d for n, d in dtypes.items() if n not in inputs}
        self._binding: _Binding | None = None
        self._queue: WorkQueue | None = gpu.queue()

    @property
    def fallback(self) -> str | None:
        """See `DeviceTimed.fallback`."""
        return None if self._binding is None else self._binding.fallback

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        queue, binding = self._bind(inputs)
        try:
            binding.launch()
            for transfer in binding.outputs.values():
                queue.download(transfer)
            queue.wait()
        except Exception as error:  # CUDA's errors have no common class
            raise RunFailed(f"TensorRT failed to run the model: {error}") from error
        return {name: np.array(t.array) for name, t in binding.outputs.items()}

    def prepare(self, inputs: Arrays) -> Callable[[], None]:
        """See `Session.prepare`."""
        queue, binding = self._bind(inputs)

        def step() -> None:
            binding.launch()
            queue.wait()

        return step

    def prepare_timed(self, inputs: Arrays) -> Callable[[int], int]:
        """See `DeviceTimed.prepare_timed`."""
        queue, binding = self._bind(inputs)

        def timed(runs: int) -> int:
            return queue.time_ns(binding.launch, runs=runs)

        return timed

    def profile_layers(self, runs: int) -> tuple[LayerLatency, ...]:
        """Medians by layer; the session must have been made without graphs."""
        step = self.prepare(random_inputs(self, np.random.default_rng(0)))
        for _ in range(WARMUP_RUNS):
            step()
        times_ms: dict[str, list[float]] = {}
        # Kept until the last report: the context does not own it.
        profiler = _profiler(self._trt, times_ms)
        self._context.profiler = profiler
        self._context.enqueue_emits_profile = False
        for _ in range(runs):
            step()
            if not self._context.report_to_profiler():
                raise RunFailed(
                    f"TensorRT gave no times of layers: {self._log.last_words}"
                )
        kinds = {layer.name: layer.kind for layer in self._layers}
        return tuple(
            LayerLatency(
                name=name,
                kind=kinds.get(name, _UNLISTED),
                median_ms=statistics.median(times),
            )
            for name, times in times_ms.items()
        )

    def close(self) -> None:
        """See `Session.close`."""
        if self._queue is None:
            return
        self._unbind(self._queue)
        self._queue.close()
        self._queue = self._context = self._loaded = None

    def _deserialize(self, plan: bytes, label: str) -> Any:
        self._log.clear()
        # The engine keeps its runtime alive.
        loaded = self._trt.Runtime(self._log).deserialize_cuda_engine(plan)
        if loaded is None:
            raise ModelRejected(
                f"TensorRT cannot load the engine of {label}: {self._log.last_words}; "
                "check that the driver is new enough for this TensorRT"
            )
        return loaded

    def _new_context(self) -> Any:
        strategies = getattr(
            self._trt, "DynamicShapesKernelSpecializationStrategy", None
        )
        if strategies is None:
            return self._loaded.create_execution_context()
        # The library for RTX GPUs compiles kernels for a new shape while slower ones
        # run; the graph of the first run would keep these.
        config = self._loaded.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return self._loaded.create_execution_context(config)

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype = self._loaded.get_tensor_dtype(name)
        try:
            found: np.dtype[Any] = np.dtype(self._trt.nptype(dtype))
        except TypeError:
            raise ModelRejected(
                f"tensor {name!r} is a {dtype}, which numpy does not have; export the "
                "model with inputs and outputs of float32"
            ) from None
        return found

    def _bind(self, inputs: Arrays) -> tuple[WorkQueue, _Binding]:
        """Copy inputs to the GPU, into memory that the model is bound to."""
        queue = self._queue
        if queue is None:
            raise RunFailed("the session is closed; load the model again")
        arrays = dict(
            zip(
                self.input_shapes,
                check_inputs(
                    inputs, shapes=self.input_shapes, dtypes=self.input_dtypes
                ),
                strict=True,
            )
        )
        try:
            binding = self._binding
            if binding is None or any(
                binding.inputs[name].array.shape != array.shape
                for name, array in arrays.items()
            ):
                self._unbind(queue)
                binding = self._binding = self._bind_shapes(queue, arrays)
            else:
                _upload(queue, binding.inputs, arrays)
        except BackendError:
            raise
        except Exception as error:  # CUDA's errors have no common class
            raise RunFailed(f"TensorRT refused the inputs: {error}") from error
        return queue, binding

    def _bind_shapes(self, queue: WorkQueue, arrays: Arrays) -> _Binding:
        """Give every tensor an address; graphs stay valid while these are."""
        shapes = self._output_shapes(arrays)
        inputs = {
            name: queue.allocate(array.shape, array.dtype)
            for name, array in arrays.items()
        }
        outputs = {
            name: queue.allocate(shapes[name], dtype)
            for name, dtype in self._output_dtypes.items()
        }
        for name, transfer in (*inputs.items(), *outputs.items()):
            if not self._context.set_tensor_address(name, transfer.address):
                raise RunFailed(
                    f"TensorRT refused the memory of {name!r}: {self._log.last_words}"
                )
        # The first run still allocates and compiles, which a graph must not hold.
        _upload(queue, inputs, arrays)
        self._enqueue(queue.handle)
        queue.wait()
        launch, fallback = self._launcher(queue)
        return _Binding(
            inputs=inputs, outputs=outputs, launch=launch, fallback=fallback
        )

    def _output_shapes(self, arrays: Arrays) -> dict[str, tuple[int, ...]]:
        for name, array in arrays.items():
            if not self._context.set_input_shape(name, array.shape):
                raise RunFailed(
                    f"TensorRT refused shape {array.shape} of {name!r}: "
                    f"{self._log.last_words}"
                )
        unknown = self._context.infer_shapes()
        shapes = {
            name: tuple(self._context.get_tensor_shape(name))
            for name in self._output_dtypes
        }
        unknown += [name for name, shape in shapes.items() if min(shape, default=0) < 0]
        if unknown:
            raise RunFailed(
                f"the shapes of {sorted(unknown)} depend on values; export the model "
                "with shapes that follow from its inputs'"
            )
        return shapes

    def _launcher(self, queue: WorkQueue) -> tuple[Callable[[], None], str | None]:
        """What launches a run, and why it is not a graph if it should be one."""

        def launch() -> None:
            self._enqueue(queue.handle)

        if not self._graphs:
            return launch, None
        try:
            return queue.capture(self._enqueue), None
        except CaptureRefused as error:
            return launch, str(error)

    def _enqueue(self, stream: int) -> None:
        self._log.clear()
        if not self._context.execute_async_v3(stream):
            raise RunFailed(f"TensorRT failed to run: {self._log.last_words}")

    def _unbind(self, queue: WorkQueue) -> None:
        binding, self._binding = self._binding, None
        if binding is not None:
            for transfer in (*binding.inputs.values(), *binding.outputs.values()):
                queue.free(transfer)


def _upload(queue: WorkQueue, inputs: dict[str, Transfer], arrays: Arrays) -> None:
    for name, transfer in inputs.items():
        np.copyto(transfer.array, arrays[name])
        queue.upload(transfer)
    # The host's memory is the next inputs', too.
    queue.wait()


def _profiler(trt: Any, times_ms: dict[str, list[float]]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc] # its base is known only here
        """Adds what TensorRT reports to `times_ms`."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            """Called by TensorRT."""
            times_ms.setdefault(layer_name, []).append(ms)

    return Profiler()
