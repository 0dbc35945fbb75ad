"""From an ONNX model to a TensorRT engine; TensorRT for RTX does it without a GPU.

`trt` is the module `tensorrt` or `tensorrt_rtx`: the two have one API.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from profilers.backends.base import DYNAMIC
from profilers.backends.tensorrt_listing import (
    LISTING_START,
    EngineLayer,
    parse_listing,
)
from profilers.errors import DeviceUnfit, ModelRejected

__all__ = ["Engine", "build_engine", "process_log"]

# The range of a dimension that each run may choose. Memory is planned for its end, and
# kernels are chosen for its start, which is what gets measured.
SHORTEST_FREE = 1
LONGEST_FREE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A built engine.

    Attributes:
        plan: What a TensorRT of the same version loads.
        layers: As the build log lists them; none where it has another layout.
    """

    plan: bytes
    layers: tuple[EngineLayer, ...]


def process_log(trt: Any) -> Any:
    """The logger of this process: `clear()`, `last_words`, and the last `listing`.

    TensorRT keeps the first logger that it is given for as long as any of its objects
    lives, and ignores others: there can be only one.
    """
    return _log_of(trt.ILogger)


@functools.cache
def _log_of(base: Any) -> Any:
    severe = (base.Severity.ERROR, base.Severity.INTERNAL_ERROR)

    class Log(base):  # type: ignore[misc] # known only here
        """Keeps what a message to the user needs; a build writes thousands of lines."""

        def __init__(self) -> None:
            # Not super(): pybind11 wants the base's own initializer called.
            base.__init__(self)
            self.errors: list[str] = []
            self.listing = ""

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in severe:
                self.errors.append(message)
            elif message.startswith(LISTING_START):
                self.listing = message

        def clear(self) -> None:
            """Forget what was said before."""
            self.errors.clear()
            self.listing = ""

        @property
        def last_words(self) -> str:
            """The errors, for a message."""
            return "; ".join(self.errors) or "TensorRT gave no reason"

    return Log()


def build_engine(trt: Any, model: bytes, *, label: str) -> Engine:
    """Build an engine in the types that the model is written in.

    Every tensor keeps its type in the model: float16 and int8 come from converting and
    quantizing the model, not from here. TF32 is off: it would round the factors of
    float32 products to 10 bits, 1e-3 off from the model that was checked.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        model: ONNX.
        label: Names the model in a message.

    Raises:
        DeviceUnfit: TensorRT does not start on this machine.
        ModelRejected: TensorRT cannot read or build the model.
    """
    log = process_log(trt)
    log.clear()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise DeviceUnfit(
            f"TensorRT does not start: {log.last_words}; check the NVIDIA driver with "
            "nvidia-smi"
        ) from error
    # Needed by TensorRT 10, where types were hints otherwise; the default since.
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise ModelRejected(
            f"TensorRT cannot read {label}: {_parse_errors(parser) or log.last_words}; "
            "give a valid ONNX model of operators that TensorRT has"
        )
    plan = builder.build_serialized_network(network, _config(trt, builder, network))
    if plan is None:
        raise ModelRejected(
            f"TensorRT cannot build {label}: {log.last_words}; export the model in "
            "types and shapes that TensorRT takes"
        )
    return Engine(plan=bytes(memoryview(plan)), layers=parse_listing(log.listing))


def _config(trt: Any, builder: Any, network: Any) -> Any:
    config = builder.create_builder_config()
    # Without it neither the log nor the profiler names layers by the model's nodes.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    # The library for RTX GPUs may allocate in a run, which no graph can hold.
    allocates_before = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if allocates_before is not None:
        config.set_flag(allocates_before)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    free = {name: shape for name, shape in shapes.items() if DYNAMIC in shape}
    if free:
        profile = builder.create_optimization_profile()
        for name, shape in free.items():
            least = _filled(shape, SHORTEST_FREE)
            profile.set_shape(name, least, least, _filled(shape, LONGEST_FREE))
        config.add_optimization_profile(profile)
    return config


def _filled(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The shape, its free dimensions of this length."""
    return tuple(length if size == DYNAMIC else size for size in shape)


def _parse_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(
        f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}"
        for error in errors
    )
