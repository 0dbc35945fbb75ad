"""What only a GPU can show. The contract of all backends runs there as well."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from profilers.backends.base import DeviceTimed
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.backends.tensorrt_gpu import TensorRtGpu, TensorRtRtxGpu
from tests.support.gpu import gpu_marks
from tests.support.quantized_models import Quantized, small_network

BACKENDS = [
    pytest.param(backend(), id=backend.name, marks=gpu_marks(backend))
    for backend in (TensorRtGpu, TensorRtRtxGpu)
]


def inputs(dtype: str = "float32") -> dict[str, NDArray[Any]]:
    values = np.random.default_rng(0).standard_normal((1, 3, 8, 8))
    return {"x": values.astype(dtype)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "quantized", "tolerance"),
    [
        ("float32", "nothing", 1e-4),
        ("float16", "nothing", 1e-2),
        ("float32", "all", 5e-2),  # a value on the edge may round the other way
    ],
)
def test_outputs_are_those_of_onnxruntime(
    backend: TensorRtGpu, dtype: str, quantized: Quantized, tolerance: float
) -> None:
    model = small_network(dtype, quantized=quantized)
    with (
        backend.load(model, threads=1) as session,
        OnnxRuntimeCpu(optimize=False).load(model, threads=1) as reference,
    ):
        found = session.run(inputs(dtype))["y"].astype(np.float64)
        expected = reference.run(inputs(dtype))["y"].astype(np.float64)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gpus_own_time_is_within_the_hosts(backend: TensorRtGpu) -> None:
    with backend.load(small_network(), threads=1) as session:
        assert isinstance(session, DeviceTimed)
        timed = session.prepare_timed(inputs())
        timed(10)
        start_ns = time.perf_counter_ns()
        device_ns = timed(100)
        host_ns = time.perf_counter_ns() - start_ns
        assert session.fallback is None
    assert 0 < device_ns <= host_ns


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_profiled_layers_are_those_of_the_listing(backend: TensorRtGpu) -> None:
    layers = backend.profile_layers(small_network(), threads=1, runs=5)
    assert "unlisted" not in {layer.kind for layer in layers}
