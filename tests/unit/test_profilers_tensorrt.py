"""The TensorRT backend on stand-ins, and its reader of layer listings.

The listings are what TensorRT for RTX 1.7.1 wrote when it built the models of
tests/support/quantized_models.py and their like on a CPU, cut after the layers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profilers.backends.cuda_device import open_gpu
from profilers.backends.tensorrt_gpu import TensorRtGpu, TensorRtRtxGpu, TensorRtSession
from profilers.backends.tensorrt_listing import is_weight_only, parse_listing
from profilers.device import this_device
from profilers.errors import DeviceUnfit, MissingDependency, RunFailed
from tests.support.binding_api import ClassApi
from tests.support.checked import Checked
from tests.support.gpu import needs_rtx
from tests.support.pretend_cuda import PretendGpu
from tests.support.pretend_tensorrt import RUN_MS, PretendRtxRuntime, PretendTensorRt
from tests.support.profilers_models import INPUT_SHAPE, conv_model
from tests.support.quantized_models import small_network

LISTINGS = Path(__file__).parent.parent / "fixtures" / "tensorrt" / "listings"
RUN_NS = round(RUN_MS * 1e6)


def images(batch: int = 1) -> dict[str, Any]:
    shape = (batch, *INPUT_SHAPE[1:])
    values = np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)
    return {"x": values}


@pytest.fixture
def gpu() -> PretendGpu:
    return PretendGpu()


def put_in_place(monkeypatch: pytest.MonkeyPatch, gpu: PretendGpu) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.core())
    trt: Any = PretendTensorRt(gpu, "11.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)


@pytest.fixture
def backend(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> TensorRtGpu:
    put_in_place(monkeypatch, gpu)
    return TensorRtGpu()


def load(backend: TensorRtGpu, model: bytes) -> TensorRtSession:
    return backend.load(model, threads=1)


# -- listings --------------------------------------------------------------------------


def layers(name: str) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    return [
        (layer.name, layer.kind, layer.input_types, layer.constant_types)
        for layer in parse_listing((LISTINGS / f"{name}.txt").read_text())
    ]


def test_a_listing_tells_each_layers_types() -> None:
    assert layers("qdq_int8") == [
        ("__myl_MulMinMaxRounCastConc_myl0_0", "kgen", ("Float",), ("Int8", "Float")),
        ("conv1_myl0_1", "correlation", ("Int8",), ("Int8", "Float", "Float")),
        (
            "__myl_MulReluMeanMulMinMaxRounCast_myl0_2",
            "kgen",
            ("Float",),
            ("Float", "Float"),
        ),
        ("fc_myl0_3", "gemm", ("Int8",), ("Int8", "Float", "Float")),
        ("__myl_Mul_myl0_4", "kgen", ("Float",), ("Float",)),
    ]


def test_a_layer_may_have_no_inputs() -> None:
    first = layers("weights_int8_float32")[0]
    assert first == ("__myl_CastMulCast_myl0_0", "kgen", (), ("Float", "Int8"))


def test_int8_counts_where_both_factors_are() -> None:
    text = (LISTINGS / "qdq_int8.txt").read_text()
    products = [layer.name for layer in parse_listing(text) if layer.multiplies_int8]
    assert products == ["conv1_myl0_1", "fc_myl0_3"]
    assert not is_weight_only(parse_listing(text))


@pytest.mark.parametrize("name", ["weights_int8_float32", "weights_int8_float16"])
def test_int8_weights_that_are_widened_first_do_not_count(name: str) -> None:
    found = parse_listing((LISTINGS / f"{name}.txt").read_text())
    assert not any(layer.multiplies_int8 for layer in found)
    assert is_weight_only(found)


def test_another_layout_gives_no_layers() -> None:
    assert parse_listing("") == ()
    assert not is_weight_only(())


# -- without a GPU or its packages -----------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "package", "extra"),
    [
        (TensorRtGpu(), "TensorRT", "tensorrt"),
        (TensorRtRtxGpu(), "TensorRT for RTX", "tensorrt-rtx"),
    ],
)
def test_a_missing_runtime_is_named_with_its_extra(
    backend: TensorRtGpu, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, backend.module, None)
    message = f"{package} is not installed. Run: pip install 'ofa-deploy[{extra}]'"
    for use in (
        lambda: backend.runtime(threads=1),
        backend.accelerator,
        lambda: backend.load(b"model", threads=1),
    ):
        with pytest.raises(MissingDependency) as error:
            use()
        assert str(error.value) == message


def test_a_missing_cuda_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependency, match=r"cuda-core .*\[tensorrt-rtx\]"):
        open_gpu(extra="tensorrt-rtx")


@needs_rtx
def test_a_machine_without_a_gpu_is_unfit_and_the_cure_is_told(
    backend: TensorRtGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device(number: int) -> None:
        raise RuntimeError("the driver is missing")

    monkeypatch.setattr(sys.modules["cuda.core"], "Device", device)
    with pytest.raises(DeviceUnfit) as error:
        backend.runtime(threads=1)
    assert str(error.value) == (
        "no NVIDIA GPU can be used: the driver is missing; check with nvidia-smi that "
        "the driver is installed and sees the GPU"
    )


# -- the device ------------------------------------------------------------------------


@needs_rtx
def test_the_accelerator_is_name_capability_and_driver(backend: TensorRtGpu) -> None:
    expected = "Pretend GPU, compute capability 8.6, driver 580.65.6"
    assert backend.accelerator() == expected


@needs_rtx
def test_tables_of_two_gpus_or_drivers_do_not_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fingerprints = set()
    for gpu in (
        PretendGpu(),
        PretendGpu(name="another GPU"),
        PretendGpu(compute_capability=(8, 9)),
        PretendGpu(driver=(581, 0, 0)),
    ):
        put_in_place(monkeypatch, gpu)
        device = this_device(accelerator=TensorRtGpu().accelerator())
        fingerprints.add(device.fingerprint)
    fingerprints.add(this_device().fingerprint)
    assert len(fingerprints) == 5


@needs_rtx
def test_a_driver_that_does_not_tell_its_release_is_unfit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_in_place(monkeypatch, PretendGpu(driver=None))
    with pytest.raises(DeviceUnfit, match="NVIDIA_DRIVER_CAPABILITIES"):
        TensorRtGpu().accelerator()


# -- sessions --------------------------------------------------------------------------


@needs_rtx
def test_times_are_the_gpus_own(backend: TensorRtGpu) -> None:
    with load(backend, conv_model()) as session:
        timed = session.prepare_timed(images())
        assert timed(1) == RUN_NS
        assert timed(7) == 7 * RUN_NS


@needs_rtx
def test_runs_are_launches_of_one_graph(gpu: PretendGpu, backend: TensorRtGpu) -> None:
    with load(backend, conv_model()) as session:
        for _ in range(3):
            session.prepare_timed(images())(5)
        assert gpu.graph_launches == 3 * (1 + 5)  # the first of each is not timed
        assert session.fallback is None


@needs_rtx
def test_a_model_that_no_graph_holds_runs_without_one_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = PretendGpu(capturable=False)
    put_in_place(monkeypatch, gpu)
    with load(TensorRtGpu(), conv_model()) as session:
        assert session.prepare_timed(images())(3) == 3 * RUN_NS
        assert session.fallback == (
            "no CUDA graph: TensorRT failed to run: operation not permitted when "
            "capturing"
        )
        # The stream that is measured on was not the one that the capture spoilt.
        assert session.run(images())["y"].shape[0] == 1
    assert gpu.graph_launches == 0


@needs_rtx
def test_other_shapes_get_memory_and_a_graph_of_their_own(
    gpu: PretendGpu, backend: TensorRtGpu
) -> None:
    with load(backend, conv_model("batch")) as session:
        session.run(images(4))
        held = gpu.live_bytes
        session.run(images(1))
        assert gpu.live_bytes == held // 4
        session.run(images(4))
        assert gpu.live_bytes == held
    assert gpu.live_bytes == 0


@needs_rtx
def test_a_batch_outside_the_range_fails_and_the_session_goes_on(
    backend: TensorRtGpu,
) -> None:
    with load(backend, conv_model("batch")) as session:
        with pytest.raises(RunFailed, match=r"refused shape \(65, .* of 'x': x: out"):
            session.run(images(65))
        assert session.run(images(2))["y"].shape[0] == 2


@needs_rtx
def test_inputs_and_outputs_keep_the_types_of_the_model(backend: TensorRtGpu) -> None:
    with load(backend, small_network("float16")) as session:
        assert session.input_dtypes == {"x": np.dtype("float16")}
        inputs = {"x": images()["x"].astype("float16")}
        assert session.run(inputs)["y"].dtype == np.float16


@needs_rtx
def test_layers_are_profiled_without_a_graph(
    gpu: PretendGpu, backend: TensorRtGpu
) -> None:
    (layer,) = backend.profile_layers(conv_model(), threads=1, runs=3)
    assert (layer.kind, layer.median_ms) == ("unlisted", RUN_MS)
    assert gpu.graph_launches == 0


@needs_rtx
def test_int8_that_only_saves_memory_is_warned_of(
    gpu: PretendGpu,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.core())
    trt: Any = PretendRtxRuntime(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    load(TensorRtRtxGpu(), small_network(quantized="all")).close()
    assert not recwarn.list
    with pytest.warns(UserWarning, match="no layer multiplies in int8"):
        load(TensorRtRtxGpu(), small_network(quantized="weights")).close()


# -- the stand-ins themselves ----------------------------------------------------------

API: ClassApi = {
    "run": ["(name: str, *, times: int = 1) -> bool"],
    "size": "property",
    "level": "settable",
}


class Implementation:
    size, level, absent = 3, 1, 0

    def run(self, name: str, times: int = 1) -> object:
        return name if name == "wrong" else True


@pytest.mark.parametrize(
    ("misuse", "error"),
    [
        (lambda x: x.absent, AttributeError),
        (lambda x: setattr(x, "size", 1), AttributeError),
        (lambda x: setattr(x, "absent", 1), AttributeError),
        (lambda x: x.run(), TypeError),
        (lambda x: x.run(1), TypeError),
        (lambda x: x.run("a", 2), TypeError),
        (lambda x: x.run("a", times="2"), TypeError),
        (lambda x: x.run("a", other=2), TypeError),
        (lambda x: x.run("wrong"), TypeError),
    ],
)
def test_a_stand_in_refuses_what_the_real_class_lacks(
    misuse: Any, error: type[Exception]
) -> None:
    standin = Checked("Real", API, Implementation())
    with pytest.raises(error):
        misuse(standin)


def test_a_stand_in_allows_what_the_real_class_has() -> None:
    standin = Checked("Real", API, Implementation())
    assert standin.run("a", times=2) is True
    standin.level = standin.size
    assert standin.level == 3
