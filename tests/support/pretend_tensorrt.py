"""TensorRT on a pretend GPU: what runs there is computed by ONNX Runtime.

Arrays are read and written at the addresses that TensorRT is given.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from profilers.backends.tensorrt_build import LONGEST_FREE
from profilers.backends.tensorrt_listing import parse_listing
from tests.support.binding_api import RTX_CLASSES, ModuleApi, describe_module
from tests.support.checked import Checked, require_fitting
from tests.support.pretend_cuda import PretendGpu

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tensorrt"
RECORDED_VERSIONS = ("10.16.1", "11.4.0")

RUN_MS = 0.25  # of every model, by the pretend GPU's clock

_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}
_ORT = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


class PretendTensorRt:
    """Stands in for the module `tensorrt` of a version whose API was recorded.

    A plan is the ONNX model that it was made of.

    Args:
        gpu: Where engines run.
        version: One of `RECORDED_VERSIONS`.
    """

    def __init__(self, gpu: PretendGpu, version: str) -> None:
        text = (FIXTURES / f"api-{version}.json").read_text()
        self._api: ModuleApi = json.loads(text)
        self._gpu = gpu
        self.__version__ = version
        for name in (
            "BuilderFlag",
            "DataType",
            "NetworkDefinitionCreationFlag",
            "ProfilingVerbosity",
            "TensorIOMode",
        ):
            setattr(self, name, self._enumeration(name))
        self.ILogger = self._base("ILogger", required="log")
        self.ILogger.Severity = self._enumeration("ILogger.Severity")
        self.IProfiler = self._base("IProfiler", required="report_layer_time")

    def nptype(self, dtype: Any) -> Any:
        return np.dtype(_NUMPY[dtype.name]).type

    def Builder(self, logger: Any) -> Checked:  # noqa: N802 # a class in the real one
        return self._checked("Builder", _Builder(self, logger), logger)

    def OnnxParser(self, network: Checked, logger: Any) -> Checked:  # noqa: N802
        parser = _Parser(network._implementation, logger)
        return self._checked("OnnxParser", parser, network, logger)

    def Runtime(self, logger: Any) -> Checked:  # noqa: N802
        runtime = _Runtime(self, self._gpu, lambda plan: (plan, ()), logger)
        return self._checked("Runtime", runtime, logger)

    def checked(self, name: str, implementation: Any) -> Checked:
        return Checked(name, self._api[name], implementation)

    def _checked(self, name: str, implementation: Any, *given: Any) -> Checked:
        signatures = self._api[name]["__init__"]
        assert isinstance(signatures, list)
        require_fitting(name, signatures, given, {})
        return self.checked(name, implementation)

    def _enumeration(self, name: str) -> Any:
        members = {n: v for n, v in self._api[name].items() if isinstance(v, int)}
        return enum.IntEnum(name.rpartition(".")[2], members)

    def _base(self, name: str, *, required: str) -> Any:
        assert required in self._api[name]

        class Base:
            initialized = False

            def __init_subclass__(cls) -> None:
                assert required in vars(cls)

            def __init__(self) -> None:
                self.initialized = True

        Base.__name__ = name
        return Base


class _Builder:
    def __init__(self, trt: PretendTensorRt, log: Any) -> None:
        assert log.initialized
        self._trt = trt
        self._log = log

    def create_network(self, flags: int) -> Checked:
        kinds: Any = vars(self._trt)["NetworkDefinitionCreationFlag"]
        assert flags == 1 << kinds.STRONGLY_TYPED
        return self._trt.checked("INetworkDefinition", _Network(self._trt))

    def create_builder_config(self) -> Checked:
        return self._trt.checked("IBuilderConfig", _Config())

    def create_optimization_profile(self) -> Checked:
        return self._trt.checked("IOptimizationProfile", _Profile())

    def build_serialized_network(self, network: Checked, config: Checked) -> Any:
        settings = config._implementation
        assert settings.profiling_verbosity.name == "DETAILED"
        assert settings.cleared == ["TF32"]
        inputs = network._implementation.inputs
        free = {tensor.name for tensor in inputs if -1 in tensor.shape}
        if not inputs or free != set(settings.ranges):
            self._log.log(self._trt.ILogger.Severity.ERROR, "no optimization profile")
            return None
        return network._implementation.model


class _Network:
    def __init__(self, trt: PretendTensorRt) -> None:
        self._trt = trt
        self.model = b""
        self.inputs: list[SimpleNamespace] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Checked:
        return self._trt.checked("ITensor", self.inputs[index])


class _Config:
    def __init__(self) -> None:
        self.profiling_verbosity: Any = None
        self.cleared: list[str] = []
        self.ranges: dict[str, Any] = {}

    def clear_flag(self, flag: Any) -> None:
        self.cleared.append(flag.name)

    def add_optimization_profile(self, profile: Checked) -> int:
        self.ranges = profile._implementation.ranges
        return 0


class _Profile:
    def __init__(self) -> None:
        self.ranges: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.ranges[input] = (min, opt, max)


class _Parser:
    num_errors = 0

    def __init__(self, network: _Network, log: Any) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        try:
            session = _session(model)
        except Exception:  # whatever ONNX Runtime makes of garbage
            return False
        self._network.model = model
        self._network.inputs = [
            SimpleNamespace(name=node.name, shape=_shape(node))
            for node in session.get_inputs()
        ]
        return True


class PretendRtxRuntime:
    """The real TensorRT for RTX for building, and a pretend GPU for running.

    Stands in for the module `tensorrt_rtx`. The pretend runtime cannot read a real
    plan, so it remembers the models that plans were built of.
    """

    def __init__(self, gpu: PretendGpu) -> None:
        import tensorrt_rtx

        self._real: Any = tensorrt_rtx
        self._gpu = gpu
        self._api = describe_module(tensorrt_rtx, RTX_CLASSES)
        self.parsed = b""
        self.models: dict[bytes, tuple[bytes, tuple[str, ...]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Builder(self, logger: Any) -> Any:  # noqa: N802 # a class in the real one
        return _RememberingBuilder(self, self._real.Builder(logger), logger)

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        return _RememberingParser(self, self._real.OnnxParser(network, logger))

    def Runtime(self, logger: Any) -> Checked:  # noqa: N802 # a class in the real one
        runtime = _Runtime(self, self._gpu, self.models.__getitem__, logger)
        return self.checked("Runtime", runtime)

    def checked(self, name: str, implementation: Any) -> Checked:
        return Checked(name, self._api[name], implementation)


# Not subclasses of the real ones: these warn when an object of a subclass is collected.
class _RememberingParser:
    def __init__(self, trt: PretendRtxRuntime, real: Any) -> None:
        self._trt = trt
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def parse(self, model: bytes) -> bool:
        self._trt.parsed = model
        return bool(self._real.parse(model))


class _RememberingBuilder:
    def __init__(self, trt: PretendRtxRuntime, real: Any, log: Any) -> None:
        self._trt = trt
        self._real = real
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        plan = self._real.build_serialized_network(network, config)
        if plan is not None:
            layers = tuple(layer.name for layer in parse_listing(self._log.listing))
            self._trt.models[bytes(memoryview(plan))] = self._trt.parsed, layers
        return plan


class _Runtime:
    def __init__(
        self,
        trt: Any,
        gpu: PretendGpu,
        model_of: Callable[[bytes], tuple[bytes, tuple[str, ...]]],
        log: Any,
    ) -> None:
        self._trt = trt
        self._gpu = gpu
        self._model_of = model_of
        self._log = log

    def deserialize_cuda_engine(self, plan: bytes) -> Checked:
        model, layers = self._model_of(plan)
        engine = _Engine(self._trt, self._gpu, _session(model), layers, self._log)
        checked: Checked = self._trt.checked("ICudaEngine", engine)
        return checked


class _Engine:
    def __init__(
        self,
        trt: Any,
        gpu: PretendGpu,
        session: Any,
        layers: tuple[str, ...],
        log: Any,
    ) -> None:
        self.trt = trt
        self.gpu = gpu
        self.session = session
        self.layers = layers or ("the whole model",)
        self.log = log
        self.inputs = {node.name: node for node in session.get_inputs()}
        self.outputs = {node.name: node for node in session.get_outputs()}
        self.nodes = {**self.inputs, **self.outputs}

    @property
    def num_io_tensors(self) -> int:
        return len(self.nodes)

    def get_tensor_name(self, index: int) -> str:
        return [str(name) for name in self.nodes][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.trt.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, _ORT[self.nodes[name].type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return _shape(self.nodes[name])

    def create_runtime_config(self) -> Checked:
        checked: Checked = self.trt.checked("IRuntimeConfig", _RuntimeConfig())
        return checked

    def create_execution_context(self, runtime_config: Any = None) -> Checked:
        # A graph would keep the kernels that the library for RTX GPUs begins with.
        rtx = hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")
        assert rtx == (runtime_config is not None)
        if rtx:
            chosen = runtime_config.dynamic_shapes_kernel_specialization_strategy
            assert chosen.name == "EAGER"
        checked: Checked = self.trt.checked("IExecutionContext", _Context(self))
        return checked


class _RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._runs = 0
        self.profiler: Any = None
        self.enqueue_emits_profile = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = _shape(self._engine.inputs[name])
        fits = all(
            size == given if size != -1 else 1 <= given <= LONGEST_FREE
            for size, given in zip(wanted, shape, strict=True)
        )
        if fits:
            self._shapes[name] = shape
        else:
            severity = self._engine.trt.ILogger.Severity.ERROR
            self._engine.log.log(severity, f"{name}: out of the profile's range")
        return fits

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        feed = {
            name: np.zeros(shape, self._numpy(name))
            for name, shape in self._shapes.items()
        }
        return tuple(self._engine.session.run([name], feed)[0].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu = self._engine.gpu
        stream = gpu.streams[stream_handle]
        if stream.capturing and not (gpu.capturable and self._runs):
            severity = self._engine.trt.ILogger.Severity.ERROR
            self._engine.log.log(severity, "operation not permitted when capturing")
            return False
        stream.launch(self._compute)
        return True

    def report_to_profiler(self) -> bool:
        for name in self._engine.layers:
            self.profiler.report_layer_time(name, RUN_MS / len(self._engine.layers))
        return True

    def _compute(self) -> None:
        self._runs += 1
        self._engine.gpu.now_ms += RUN_MS
        feed = {name: self._memory(name, shape) for name, shape in self._shapes.items()}
        names = list(self._engine.outputs)
        values = self._engine.session.run(names, feed)
        for name, value in zip(names, values, strict=True):
            self._memory(name, value.shape)[...] = value

    def _memory(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = self._numpy(name)
        size = math.prod(shape) * dtype.itemsize
        address = self._addresses[name]
        memory = memoryview((ctypes.c_byte * size).from_address(address))
        found: NDArray[Any] = np.frombuffer(memory, dtype).reshape(shape)
        return found

    def _numpy(self, name: str) -> np.dtype[Any]:
        return np.dtype(_NUMPY[_ORT[self._engine.nodes[name].type]])


def _session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"]
    )


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in node.shape)
