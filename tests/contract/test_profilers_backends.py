"""What every backend promises, asked of each in the same words."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from profilers.backends.base import DYNAMIC, Backend, DeviceTimed, LayerProfiler
from profilers.backends.fake import FakeAnchor, FakeBackend, FakeClock, FakeDevice
from profilers.backends.litert_cpu import LiteRtCpu
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.backends.openvino_cpu import OpenVinoCpu
from profilers.backends.tensorrt_gpu import TensorRtGpu, TensorRtRtxGpu
from profilers.device import available_cores
from profilers.errors import BackendError, ModelRejected, RunFailed
from profilers.measure import MeasureSettings, ModelUnderTest, measure_models
from tests.support.gpu import gpu_marks, needs_rtx
from tests.support.pretend_cuda import PretendGpu
from tests.support.pretend_tensorrt import (
    RECORDED_VERSIONS,
    PretendRtxRuntime,
    PretendTensorRt,
)
from tests.support.profilers_models import INPUT_SHAPE, conv_model

MODEL = conv_model()

# How runtimes call one. TensorRT 10's listing of layers is not read.
CONVOLUTIONS = ("Conv", "correlation", "unlisted")

needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="OpenVINO is not installed"
)
needs_litert = pytest.mark.skipif(
    find_spec("ai_edge_litert") is None, reason="LiteRT is not installed"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A backend, and the same small model in the format that it reads.

    Attributes:
        backend: The backend.
        model: Takes `x` of `INPUT_SHAPE`, gives `y`.
        free_batch: The same with a first dimension that each run chooses.
        file_name: With the format's ending.
    """

    backend: Backend
    model: bytes
    free_batch: bytes
    file_name: str


def onnx_case(backend: Backend) -> Case:
    return Case(
        backend=backend,
        model=MODEL,
        free_batch=conv_model("batch"),
        file_name="model.onnx",
    )


def fake(device: FakeDevice | None = None) -> Case:
    latency_ns: dict[str | bytes, int] = {MODEL: 1000, "model.onnx": 1000}
    backend = FakeBackend(FakeClock(), latency_ns=latency_ns, device=device)
    return onnx_case(backend)


def fake_device() -> Case:
    return fake(FakeDevice(waiting_ns=500))


def onnxruntime() -> Case:
    return onnx_case(OnnxRuntimeCpu())


def unoptimized() -> Case:
    return onnx_case(OnnxRuntimeCpu(optimize=False))


def openvino() -> Case:
    return onnx_case(OpenVinoCpu())


def litert() -> Case:
    from tests.support.litert_models import conv_tflite

    return Case(
        backend=LiteRtCpu(),
        model=conv_tflite(),
        free_batch=conv_tflite(free_batch=True),
        file_name="model.tflite",
    )


def on_standins(
    backend: TensorRtGpu, make: Callable[[PretendGpu], Any]
) -> Callable[[pytest.MonkeyPatch], Case]:
    """A backend whose modules are stand-ins for as long as a test runs."""

    def made(monkeypatch: pytest.MonkeyPatch) -> Case:
        gpu = PretendGpu()
        monkeypatch.setitem(sys.modules, "cuda.core", gpu.core())
        monkeypatch.setitem(sys.modules, backend.module, make(gpu))
        return onnx_case(backend)

    return made


REAL = [
    pytest.param(onnxruntime, id="onnxruntime"),
    pytest.param(unoptimized, id="onnxruntime-unoptimized"),
    pytest.param(openvino, id="openvino", marks=needs_openvino),
    pytest.param(litert, id="litert", marks=needs_litert),
    *(
        pytest.param(partial(onnx_case, b()), id=b.name, marks=gpu_marks(b))
        for b in (TensorRtGpu, TensorRtRtxGpu)
    ),
]

FAKES = [
    pytest.param(fake, id="fake"),
    pytest.param(fake_device, id="fake-device"),
]

# The backend's code is real; what it calls is not, but for building with RTX.
ON_STANDINS = [
    *(
        pytest.param(
            on_standins(TensorRtGpu(), partial(PretendTensorRt, version=v)),
            id=f"tensorrt-{v}-standin",
            marks=needs_rtx,  # cuda-core comes with it
        )
        for v in RECORDED_VERSIONS
    ),
    pytest.param(
        on_standins(TensorRtRtxGpu(), PretendRtxRuntime),
        id="tensorrt-rtx-standin",
        marks=needs_rtx,
    ),
]


def make_case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    on_standin = any(request.param in parameter.values for parameter in ON_STANDINS)
    made: Case = request.param(monkeypatch) if on_standin else request.param()
    return made


@pytest.fixture(params=[*FAKES, *REAL, *ON_STANDINS])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    return make_case(request, monkeypatch)


@pytest.fixture(params=[*REAL, *ON_STANDINS])
def real_case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    return make_case(request, monkeypatch)


def image(seed: int = 0, batch: int = 1) -> NDArray[np.float32]:
    shape = (batch, *INPUT_SHAPE[1:])
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_a_session_knows_its_inputs(case: Case) -> None:
    with case.backend.load(case.model, threads=1) as session:
        assert dict(session.input_shapes) == {"x": INPUT_SHAPE}
        assert dict(session.input_dtypes) == {"x": np.dtype("float32")}


def test_a_file_and_its_bytes_are_the_same_model(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.file_name
    path.write_bytes(case.model)
    with (
        case.backend.load(case.model, threads=1) as one,
        case.backend.load(path, threads=1) as other,
    ):
        np.testing.assert_array_equal(
            one.run({"x": image()})["y"], other.run({"x": image()})["y"]
        )


def test_the_same_input_gives_the_same_output_at_any_time(case: Case) -> None:
    with case.backend.load(case.model, threads=1) as session:
        first = session.run({"x": image(0)})
        kept = first["y"].copy()
        session.run({"x": image(1)})
        # Outputs are the caller's: a later run does not write into them.
        np.testing.assert_array_equal(first["y"], kept)
        np.testing.assert_array_equal(session.run({"x": image(0)})["y"], kept)


def test_outputs_are_numpy_arrays_that_outlive_the_session(case: Case) -> None:
    with case.backend.load(case.model, threads=1) as session:
        outputs = session.run({"x": image()})
    assert set(outputs) == {"y"}
    assert type(outputs["y"]) is np.ndarray
    assert outputs["y"].dtype == np.float32
    assert np.isfinite(outputs["y"]).all()


def test_the_order_in_memory_of_an_input_is_irrelevant(case: Case) -> None:
    with case.backend.load(case.model, threads=1) as session:
        expected = session.run({"x": image()})["y"]
        given = np.asfortranarray(image())
        np.testing.assert_array_equal(session.run({"x": given})["y"], expected)


def test_a_prepared_step_can_run_often_and_leaves_later_runs_alone(
    case: Case,
) -> None:
    with case.backend.load(case.model, threads=1) as session:
        expected = session.run({"x": image(0)})["y"]
        step = session.prepare({"x": image(1)})
        for _ in range(3):
            step()
        np.testing.assert_array_equal(session.run({"x": image(0)})["y"], expected)


def test_sessions_of_one_backend_do_not_disturb_each_other(case: Case) -> None:
    with (
        case.backend.load(case.model, threads=1) as one,
        case.backend.load(case.model, threads=1) as other,
    ):
        expected = one.run({"x": image(0)})["y"]
        other.run({"x": image(1)})
        other.close()
        np.testing.assert_array_equal(one.run({"x": image(0)})["y"], expected)


def test_what_is_no_model_is_rejected(case: Case) -> None:
    for model in (b"", b"garbage", case.model[: len(case.model) // 2]):
        with pytest.raises(ModelRejected):
            case.backend.load(model, threads=1)


def test_a_file_that_holds_no_model_is_rejected(
    real_case: Case, tmp_path: Path
) -> None:
    path = tmp_path / real_case.file_name
    path.write_bytes(b"garbage")
    with pytest.raises(ModelRejected, match=re.escape(path.name)):
        real_case.backend.load(path, threads=1)


def test_a_missing_file_is_rejected_by_name(real_case: Case, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"there is no model file .*absent"):
        real_case.backend.load(tmp_path / "absent", threads=1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        pytest.param({"x": np.zeros((1, 4, 8, 8), np.float32)}, "1x3x8x8", id="shape"),
        pytest.param({"x": np.zeros((3, 8, 8), np.float32)}, "3x8x8", id="rank"),
        pytest.param({"x": np.zeros(INPUT_SHAPE)}, "float64", id="type"),
        pytest.param({"z": np.zeros(INPUT_SHAPE, np.float32)}, "'z'", id="name"),
        pytest.param({}, r"\['x'\]", id="missing"),
    ],
)
def test_inputs_that_do_not_fit_fail_and_the_session_goes_on(
    case: Case, inputs: dict[str, NDArray[np.float32]], message: str
) -> None:
    with case.backend.load(case.model, threads=1) as session:
        with pytest.raises(RunFailed, match=message):
            session.run(inputs)
        with pytest.raises(RunFailed, match=message):
            session.prepare(inputs)
        session.run({"x": image()})


def test_closing_twice_is_fine_and_running_after_it_fails(case: Case) -> None:
    session = case.backend.load(case.model, threads=1)
    session.close()
    session.close()
    with pytest.raises(RunFailed, match="closed"):
        session.run({"x": image()})
    with pytest.raises(RunFailed, match="closed"):
        session.prepare({"x": image()})


def test_an_inference_has_at_least_one_thread(case: Case) -> None:
    with pytest.raises(ValueError, match="threads=0"):
        case.backend.load(case.model, threads=0)


def test_the_runtime_is_described(case: Case) -> None:
    runtime = case.backend.runtime(threads=2)
    assert (runtime.backend, runtime.threads) == (case.backend.name, 2)
    assert runtime.precision == "f32"


def test_a_session_of_an_accelerator_times_itself_and_others_do_not(
    case: Case,
) -> None:
    accelerated = case.backend.accelerator() is not None
    with case.backend.load(case.model, threads=1) as session:
        assert isinstance(session, DeviceTimed) == accelerated


def test_a_session_that_times_itself_counts_the_runs_it_is_asked_for(
    case: Case,
) -> None:
    if case.backend.accelerator() is None:
        pytest.skip("the host times what runs on its own processor")
    with case.backend.load(case.model, threads=1) as session:
        assert isinstance(session, DeviceTimed)
        expected = session.run({"x": image(0)})["y"]
        timed = session.prepare_timed({"x": image(1)})
        assert session.fallback is None
        timed(1)
        assert 1 < timed(64) / timed(8) < 64
        with pytest.raises(ValueError, match="runs=0"):
            timed(0)
        with pytest.raises(RunFailed, match="'x'"):
            session.prepare_timed({"z": image(0)})
        np.testing.assert_array_equal(session.run({"x": image(0)})["y"], expected)
    with pytest.raises(RunFailed, match="closed"):
        session.prepare_timed({"x": image(0)})


def test_models_are_measured_alike_everywhere(case: Case) -> None:
    settings = MeasureSettings(
        visits=2,
        runs_per_visit=2,
        warmup_runs=2,
        warmup_windows=1,
        anchor_repeats=1,
        seed=0,
        target_relative_error=10.0,
        max_seconds=5.0,
    )
    models = [ModelUnderTest(name=name, model=case.model) for name in ("a", "b")]
    rng = np.random.default_rng(0)
    backend = case.backend
    if isinstance(backend, FakeBackend):
        run = measure_models(
            models,
            backend=backend,
            threads=1,
            settings=settings,
            clock=backend.clock,
            anchor=FakeAnchor(backend.clock),
            rng=rng,
        )
    else:
        run = measure_models(
            models, backend=backend, threads=1, settings=settings, rng=rng
        )
    assert [measurement.name for measurement in run.measurements] == ["a", "b"]
    assert all(measurement.quiet_ms > 0 for measurement in run.measurements)


def test_a_free_batch_may_change_from_run_to_run(real_case: Case) -> None:
    with real_case.backend.load(real_case.free_batch, threads=1) as session:
        assert session.input_shapes["x"] == (DYNAMIC, *INPUT_SHAPE[1:])
        for batch in (1, 5, 2):
            images = image(batch, batch)
            together = session.run({"x": images})["y"]
            assert together.shape[0] == batch
            alone = [session.run({"x": images[i : i + 1]})["y"] for i in range(batch)]
            np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


@needs_openvino
def test_the_runtimes_agree() -> None:
    outputs = []
    for backend in (
        OnnxRuntimeCpu(),
        OnnxRuntimeCpu(optimize=False),
        OpenVinoCpu(),
    ):
        with backend.load(MODEL, threads=1) as session:
            outputs.append(session.run({"x": image()})["y"])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-5)


@needs_openvino
def test_openvino_runs_as_many_threads_as_it_is_asked_for() -> None:
    """By itself it leaves out the second thread of each core."""
    backend = OpenVinoCpu()
    for threads in range(1, available_cores() + 1):
        with backend.load(MODEL, threads=threads) as session:
            compiled = session._request.get_compiled_model()
            assert int(compiled.get_property("INFERENCE_NUM_THREADS")) == threads


@needs_openvino
def test_openvino_reads_its_own_format(tmp_path: Path) -> None:
    import openvino

    path = tmp_path / "model.xml"
    openvino.save_model(
        openvino.Core().read_model(MODEL), str(path), compress_to_fp16=False
    )
    with (
        OpenVinoCpu().load(path, threads=1) as own,
        OpenVinoCpu().load(MODEL, threads=1) as onnx,
    ):
        np.testing.assert_array_equal(
            own.run({"x": image()})["y"], onnx.run({"x": image()})["y"]
        )


@needs_litert
def test_litert_warns_of_a_model_that_runs_in_pieces(
    recwarn: pytest.WarningsRecorder,
) -> None:
    from tests.support.litert_models import conv_tflite

    with LiteRtCpu().load(conv_tflite(), threads=1) as session:
        assert session.partition_count == 1
    assert not recwarn.list
    with (
        pytest.warns(UserWarning, match="runs in 2 partitions of the XNNPACK"),
        LiteRtCpu().load(conv_tflite(interrupted=True), threads=1) as session,
    ):
        assert session.partition_count == 2


@pytest.fixture
def only_tflite_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only `tflite-runtime` is installed, whose interpreter is older."""
    from ai_edge_litert.interpreter import Interpreter

    stand_in = ModuleType("tflite_runtime.interpreter")
    monkeypatch.setattr(stand_in, "Interpreter", Interpreter, raising=False)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime", ModuleType("tflite_runtime"))
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", stand_in)
    monkeypatch.setattr(
        importlib.metadata, "version", {"tflite-runtime": "2.14.0"}.__getitem__
    )


@needs_litert
@pytest.mark.usefixtures("only_tflite_runtime")
def test_tflite_runtime_serves_where_only_that_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.support.litert_models import conv_tflite

    monkeypatch.setattr(np, "__version__", "1.26.4")
    runtime = LiteRtCpu().runtime(threads=1)
    assert (runtime.version, runtime.provider) == (
        "2.14.0",
        "XNNPACK in tflite-runtime",
    )
    with LiteRtCpu().load(conv_tflite(), threads=1) as session:
        assert session.run({"x": image()})["y"].size > 0


@needs_litert
@pytest.mark.usefixtures("only_tflite_runtime")
def test_tflite_runtime_beside_a_numpy_that_it_dies_of_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(BackendError, match=r"pip install 'numpy<2'"):
        LiteRtCpu().load(b"", threads=1)


# -- layers ----------------------------------------------------------------------------


def test_layers_are_told_where_the_runtime_can(real_case: Case) -> None:
    backend = real_case.backend
    if not isinstance(backend, LayerProfiler):
        assert isinstance(backend, LiteRtCpu)  # has no way to read them from Python
        return
    layers = backend.profile_layers(real_case.model, threads=1, runs=5)
    assert any(layer.kind.startswith(CONVOLUTIONS) for layer in layers)
    assert sum(layer.median_ms for layer in layers) > 0
    assert len({layer.name for layer in layers}) == len(layers)
    with pytest.raises(ValueError, match="runs=0"):
        backend.profile_layers(real_case.model, threads=1, runs=0)
    with pytest.raises(ModelRejected):
        backend.profile_layers(b"garbage", threads=1, runs=1)
