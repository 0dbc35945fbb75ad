"""Runtimes behind one protocol. Importing this imports no runtime."""

from __future__ import annotations

from collections.abc import Callable

from profilers.backends.base import Backend, Session
from profilers.backends.litert_cpu import LiteRtCpu
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.backends.openvino_cpu import OpenVinoCpu
from profilers.backends.tensorrt_gpu import TensorRtGpu, TensorRtRtxGpu
from profilers.errors import DeviceError

__all__ = ["Backend", "Session", "backend_names", "get_backend"]

_FACTORIES: dict[str, Callable[[], Backend]] = {
    LiteRtCpu.name: LiteRtCpu,
    OnnxRuntimeCpu.name: OnnxRuntimeCpu,
    OpenVinoCpu.name: OpenVinoCpu,
    TensorRtGpu.name: TensorRtGpu,
    TensorRtRtxGpu.name: TensorRtRtxGpu,
}


def backend_names() -> tuple[str, ...]:
    """Names that `get_backend` takes, sorted, whether installed or not."""
    return tuple(sorted(_FACTORIES))


def get_backend(name: str) -> Backend:
    """Return the backend of that name; its runtime is imported at the first use.

    Raises:
        DeviceError: There is no such backend.
    """
    try:
        return _FACTORIES[name]()
    except KeyError:
        allowed = ", ".join(backend_names())
        raise DeviceError(
            f"there is no backend {name!r}; choose one of: {allowed}"
        ) from None
