"""Whether tests on a real GPU can run here, and backends to run tests over."""

from __future__ import annotations

import functools
import platform
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from profilers.backends import backend_names
from profilers.backends.cuda_device import open_gpu
from profilers.backends.tensorrt_gpu import TensorRtGpu, TensorRtRtxGpu
from profilers.errors import DeployError

GPU_BACKENDS = (TensorRtGpu, TensorRtRtxGpu)

# NVIDIA ships TensorRT for RTX for no other platform that these tests run on. Where it
# does, it is a part of the development environment, and its absence is an error.
needs_rtx = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="there is no TensorRT for RTX for this platform",
)


@functools.cache
def why_no_gpu() -> str:
    """Why tests marked `gpu` cannot run; empty where they can."""
    try:
        open_gpu(extra="tensorrt")
    except DeployError as error:
        return str(error)
    return ""


def gpu_marks(backend: type[TensorRtGpu]) -> list[Any]:
    """Marks of a test that runs a backend on a real GPU."""
    missing = find_spec(backend.module) is None
    reason = f"{backend.package} is not installed"
    return [pytest.mark.gpu, pytest.mark.skipif(missing, reason=reason)]


def usable_backends() -> list[str]:
    """Names of the backends that can run here: without a GPU, those of the CPU."""
    missing = {b.name for b in GPU_BACKENDS if find_spec(b.module) is None}
    unusable = {b.name for b in GPU_BACKENDS} if why_no_gpu() else missing
    return [name for name in backend_names() if name not in unusable]


def every_backend() -> list[Any]:
    """Names of all backends as parameters; those of GPUs are marked."""
    marks = {backend.name: gpu_marks(backend) for backend in GPU_BACKENDS}
    return [pytest.param(n, marks=marks.get(n, [])) for n in backend_names()]
