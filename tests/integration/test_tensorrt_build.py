"""Engines that the real TensorRT for RTX builds on a CPU, and what its log says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ofa_deploy.probe import operator_probes
from profilers.backends.tensorrt_build import Engine, build_engine, process_log
from profilers.backends.tensorrt_listing import EngineLayer, is_weight_only
from profilers.errors import ModelRejected
from tests.support.gpu import needs_rtx, why_no_gpu
from tests.support.profilers_models import conv_model
from tests.support.quantized_models import small_network, unknown_operator

pytestmark = needs_rtx

PLAN_MARK = b"vtrt"


@pytest.fixture(scope="module")
def trt() -> Any:
    import tensorrt_rtx

    return tensorrt_rtx


def build(trt: Any, model: bytes) -> Engine:
    return build_engine(trt, model, label="the model")


def layer_of(engine: Engine, kind: str) -> EngineLayer:
    return next(layer for layer in engine.layers if layer.kind == kind)


@pytest.mark.parametrize(
    ("dtype", "datatype"), [("float32", "Float"), ("float16", "Half")]
)
def test_layers_compute_in_the_type_of_the_model(
    trt: Any, dtype: str, datatype: str
) -> None:
    engine = build(trt, small_network(dtype))
    assert PLAN_MARK in engine.plan[:64]
    assert {kind for layer in engine.layers for kind in layer.input_types} == {datatype}
    conv = layer_of(engine, "correlation")
    assert conv.name.startswith("conv")
    assert conv.constant_types[0] == datatype
    assert not any(layer.multiplies_int8 for layer in engine.layers)
    assert not is_weight_only(engine.layers)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_quantized_activations_and_weights_are_multiplied_as_int8(
    trt: Any, dtype: str
) -> None:
    engine = build(trt, small_network(dtype, quantized="all"))
    products = [layer for layer in engine.layers if layer.multiplies_int8]
    assert [layer.kind for layer in products] == ["correlation", "gemm"]
    for layer in products:
        assert (layer.input_types[0], layer.constant_types[0]) == ("Int8", "Int8")
    assert not is_weight_only(engine.layers)


@pytest.mark.parametrize(
    ("dtype", "datatype"), [("float32", "Float"), ("float16", "Half")]
)
def test_quantized_weights_alone_are_not_taken_for_int8_arithmetic(
    trt: Any, dtype: str, datatype: str
) -> None:
    engine = build(trt, small_network(dtype, quantized="weights"))
    assert any("Int8" in layer.constant_types for layer in engine.layers)
    assert layer_of(engine, "correlation").input_types == (datatype, datatype)
    assert not any(layer.multiplies_int8 for layer in engine.layers)
    assert is_weight_only(engine.layers)


def test_the_module_tells_what_numpy_calls_a_type(trt: Any) -> None:
    # Of functions, which the stand-ins are not held to, the backend uses this one.
    assert np.dtype(trt.nptype(trt.DataType.FLOAT)) == np.float32
    assert np.dtype(trt.nptype(trt.DataType.HALF)) == np.float16


def test_the_int8_operators_of_a_probe_can_be_built(trt: Any) -> None:
    probes = [p for p in operator_probes() if p.precision == "int8"]
    assert probes
    for probe in probes:
        model, _ = probe.models
        assert build(trt, model.emit("tensorrt-rtx-gpu")).layers


def test_a_free_batch_gets_a_range(trt: Any) -> None:
    assert build(trt, conv_model("batch")).plan


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(
            b"garbage",
            "cannot read the model: .*Failed to parse the ONNX model",
            id="garbage",
        ),
        pytest.param(
            unknown_operator(),
            r"cannot read the model: node 'odd' \(Mystery\): .*Plugin not found",
            id="unknown-operator",
        ),
        pytest.param(
            b"",
            "cannot build the model: .*Network must have at least one output",
            id="empty",
        ),
    ],
)
def test_what_cannot_be_built_is_rejected_in_the_words_of_tensorrt(
    trt: Any, model: bytes, message: str
) -> None:
    with pytest.raises(ModelRejected, match=message):
        build(trt, model)
    # A refusal leaves nothing behind that the next build would report.
    assert build(trt, small_network()).layers


def test_the_log_is_one_however_many_builds_there_are(trt: Any) -> None:
    # A second logger is ignored while objects of the first are alive.
    runtime = trt.Runtime(process_log(trt))
    for _ in range(2):
        assert build(trt, small_network()).layers
    del runtime


def test_an_engine_needs_a_gpu_to_be_loaded(trt: Any) -> None:
    if not why_no_gpu():
        pytest.skip("there is a GPU")
    log = process_log(trt)
    plan = build(trt, small_network()).plan
    assert trt.Runtime(log).deserialize_cuda_engine(plan) is None
    assert "CUDA driver version is insufficient" in log.last_words


def test_importing_the_backends_imports_neither_tensorrt_nor_cuda() -> None:
    program = (
        "import sys, profilers.backends\n"
        "print(sorted({'cuda', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "[]"
