from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import latency_tables
from ofa_deploy import (
    assembly,
    device_bench,
    drift,
    pipeline,
    profiling,
    specialize,
)
from ofa_deploy.bundle import Bundle
from ofa_deploy.errors import (
    BundleError,
    DataError,
    DeployError,
    DeviceError,
    FormatError,
    IncompatibleTables,
    InfeasibleBudget,
    SpaceError,
)
from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME
from ofa_deploy.pipeline import Specializer
from ofa_deploy.plan import lower
from ofa_deploy.preprocess import prepare
from ofa_deploy.profiling import profile_space
from ofa_deploy.report.page import REPORT_FILE
from ofa_deploy.space import SubnetConfig
from ofa_deploy.space_file import space_sha256
from ofa_deploy.stored import StoredSupernet, write_supernet
from ofa_deploy.table_files import table_name
from ofa_deploy.verify import accuracy_interval
from ofa_deploy.zoo import zoo_names
from profilers import LatencyTable
from profilers.backends import backend_names, get_backend
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.device import available_cores, this_device
from tests.support import tiny
from tests.support.gpu import every_backend, usable_backends
from tests.support.quick import QUICK

GENEROUS_MS = 10_000.0
ZOO_SUPERNET = "cifar10-small"


@pytest.fixture(scope="module", autouse=True)
def _quick_timing() -> Iterator[None]:
    """Few runs: how precise the timing is, is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "CONFIRM_SETTINGS", QUICK)
        patch.setattr(device_bench, "CERTIFY_SETTINGS", QUICK)
        patch.setattr(device_bench, "CERTIFY_PROCESSES", 1)
        patch.setattr(profiling, "PROFILE_SETTINGS", QUICK)
        yield


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernet")
    write_supernet(folder, tiny.stored())
    return folder


def made_up_table(backend: str, *, scale: float = 1.0, **changes: Any) -> LatencyTable:
    """A table for this machine whose latencies grow with the work."""

    def network_ms(config: SubnetConfig) -> float:
        blocks = lower(tiny.SPACE, config).blocks
        return scale * sum(tiny.work_ms(block) for block in blocks)

    runner = get_backend(backend)
    table = tiny.latency_table(
        tiny.SPACE,
        networks=tiny.random_configs(tiny.SPACE, 20),
        network_ms=network_ms,
        block_ms=lambda block: scale * tiny.work_ms(block),
        device=this_device(accelerator=runner.accelerator()),
        runtime=runner.runtime(threads=1),
        origin="measured",
    )
    return replace(table, **changes)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A table file per backend."""
    folder = tmp_path_factory.mktemp("tables")
    paths = {name: folder / f"{name}.json" for name in usable_backends()}
    for name, path in paths.items():
        made_up_table(name).save(path)
    return paths


@pytest.fixture(scope="module")
def eval_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "eval.npz"
    data = tiny.images(per_class=20, seed=21)
    np.savez(
        path,
        images=data.images,
        labels=data.labels,
        class_names=np.array(data.class_names),
    )
    return path


@pytest.fixture(scope="module", params=every_backend())
def bundle(
    request: pytest.FixtureRequest,
    supernet: Path,
    tables: dict[str, Path],
    eval_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """What specialising for a generous budget makes, per backend."""
    return specialize(
        request.param,
        latency_ms=GENEROUS_MS,
        out=tmp_path_factory.mktemp("out") / "bundle",
        supernet=supernet,
        table=tables[request.param],
        on_drift="accept",
        eval_data=eval_data,
    )


# -- what a bundle is ------------------------------------------------------------------


def test_a_new_bundle_passes_its_own_check(bundle: Bundle) -> None:
    with Bundle.open(bundle.path) as opened:
        assert opened.check().agrees


def test_the_measured_latency_is_within_the_budget(bundle: Bundle) -> None:
    manifest = bundle.manifest
    (verdict,) = manifest.verdicts
    assert manifest.measured.quiet_ms <= verdict.bound <= verdict.limit == GENEROUS_MS


def test_a_generous_budget_gives_the_network_predicted_to_be_best(
    bundle: Bundle,
) -> None:
    space, predictor = tiny.SPACE, tiny.predictor()
    rows = space.sample(20_000, np.random.default_rng(0))
    config = SubnetConfig.from_id(bundle.manifest.config_id)
    found = predictor.predict(space.encode(config)[None])[0]
    assert found >= predictor.predict(np.unique(rows, axis=0)).max() - 1e-6


def test_the_manifest_tells_the_costs_of_its_network(bundle: Bundle) -> None:
    manifest = bundle.manifest
    plan = lower(tiny.SPACE, SubnetConfig.from_id(manifest.config_id))
    assert (manifest.cost.mac_count, manifest.cost.parameter_count) == (
        plan.mac_count,
        plan.parameter_count,
    )
    assert manifest.resolution == plan.resolution


def test_the_manifest_lists_every_file_of_the_folder(bundle: Bundle) -> None:
    names = {file.name for file in bundle.path.iterdir()}
    assert names == {"manifest.json", *bundle.manifest.files}


def test_the_measured_accuracy_is_that_of_the_exported_model(bundle: Bundle) -> None:
    data = tiny.images(per_class=20, seed=21)
    inputs = prepare(
        data.images,
        resolution=bundle.manifest.resolution,
        normalisation=tiny.NORMALISATION,
    )
    # The ONNX file is in every bundle, whatever its own runtime reads.
    with OnnxRuntimeCpu().load(bundle.path / "model.onnx", threads=1) as session:
        right = [
            int(session.run({INPUT_NAME: image[None]})[OUTPUT_NAME].argmax()) == label
            for image, label in zip(inputs, data.labels, strict=True)
        ]
    accuracy = bundle.manifest.accuracy
    assert (accuracy.kind, accuracy.image_count) == ("measured", len(right))
    assert accuracy.value == sum(right) / len(right)


def test_the_measured_accuracy_lies_in_its_interval(bundle: Bundle) -> None:
    accuracy = bundle.manifest.accuracy
    interval = accuracy_interval(accuracy.value, accuracy.image_count)
    assert (accuracy.low, accuracy.high) == interval


def test_probabilities_are_of_all_classes_and_sum_to_one(bundle: Bundle) -> None:
    with Bundle.open(bundle.path) as opened:
        prediction = opened.predict(tiny.images(per_class=1).images[0])
    assert tuple(prediction.probabilities) == tiny.CLASS_NAMES
    assert sum(prediction.probabilities.values()) == pytest.approx(1)
    assert prediction.probability == max(prediction.probabilities.values())
    assert tiny.CLASS_NAMES[prediction.label] == prediction.class_name


def test_a_file_an_image_and_an_array_are_predicted_alike(
    bundle: Bundle, tmp_path: Path
) -> None:
    pixels = tiny.images(per_class=1).images[0]
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    with Bundle.open(bundle.path) as opened:
        from_array = opened.predict(pixels)
        assert opened.predict(image) == from_array
        assert opened.predict(tmp_path / "image.png") == from_array
        assert opened.predict(str(tmp_path / "image.png")) == from_array


def test_an_image_of_any_size_is_predicted(bundle: Bundle) -> None:
    with Bundle.open(bundle.path) as opened:
        large = tiny.images(per_class=1, size=40).images[0][:30]
        assert opened.predict(large).class_name in tiny.CLASS_NAMES


def test_a_closed_bundle_can_be_used_again(bundle: Bundle) -> None:
    pixels = tiny.images(per_class=1).images[0]
    opened = Bundle.open(bundle.path)
    before = opened.predict(pixels)
    opened.close()
    opened.close()
    assert opened.predict(pixels) == before
    opened.close()


def test_an_array_that_is_no_image_is_refused(bundle: Bundle) -> None:
    with Bundle.open(bundle.path) as opened, pytest.raises(DataError) as caught:
        opened.predict(np.zeros((12, 12), dtype=np.uint8))
    assert str(caught.value) == (
        "an image array must be uint8 of shape (height, width, 3); got uint8 of shape "
        "(12, 12)"
    )


def test_a_file_that_is_no_image_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no image")
    with Bundle.open(bundle.path) as opened, pytest.raises(DataError) as caught:
        opened.predict(file)
    assert str(caught.value).startswith(f"{file} cannot be read as an image: ")


def test_an_opened_image_that_ends_too_soon_is_refused(bundle: Bundle) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 80).save(buffer, format="PNG")
    half = Image.open(io.BytesIO(buffer.getvalue()[: buffer.tell() // 2]))
    with Bundle.open(bundle.path) as opened, pytest.raises(DataError) as caught:
        opened.predict(half)
    assert "cannot be read as an image: " in str(caught.value)


# -- repeating -------------------------------------------------------------------------


TIMED = {"created_at", "measured", "verdicts", "candidates", "files", "anchor_ratio"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bundle_but_for_its_timing(
    bundle: Bundle,
    supernet: Path,
    tables: dict[str, Path],
    eval_data: Path,
    tmp_path: Path,
) -> None:
    backend = bundle.manifest.runtime.backend
    again = specialize(
        backend,
        latency_ms=GENEROUS_MS,
        out=tmp_path / "again",
        supernet=supernet,
        table=tables[backend],
        on_drift="accept",
        eval_data=eval_data,
    )
    first, second = (
        {
            file.name: file.read_bytes()
            for file in folder.iterdir()
            if file.name not in ("manifest.json", assembly.SAMPLES_FILE, REPORT_FILE)
        }
        for folder in (bundle.path, again.path)
    )
    assert first == second
    manifests = [json.loads(b.manifest.to_json()) for b in (bundle, again)]
    for manifest in manifests:
        for name in TIMED:
            del manifest[name]
    assert manifests[0] == manifests[1]


# -- profiling -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.quiet
def test_a_machine_is_profiled_once(
    supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = Specializer("onnxruntime-cpu", supernet=supernet, cache=cache)
    name = table_name(tiny.SPACE, first.device, first.runtime)
    content = (cache / name).read_bytes()
    again = Specializer("onnxruntime-cpu", supernet=supernet, cache=str(cache))
    assert again.table == first.table
    assert (cache / name).read_bytes() == content


@pytest.mark.slow
def test_a_real_table_leads_to_a_bundle(supernet: Path, tmp_path: Path) -> None:
    table = profile_space(
        tiny.SPACE,
        backend=get_backend("openvino-cpu"),
        threads=1,
        settings=QUICK,
        journal_path=tmp_path / "journal",
        network_count=8,
    )
    table.save(tmp_path / "table.json")
    session = Specializer(
        "openvino-cpu",
        supernet=supernet,
        table=tmp_path / "table.json",
        on_drift="accept",  # so few runs are off by more
    )
    with session.specialize(GENEROUS_MS, out=tmp_path / "bundle") as bundle:
        assert bundle.check().agrees


def test_the_reachable_range_is_ordered(
    supernet: Path, tables: dict[str, Path]
) -> None:
    session = Specializer(
        "onnxruntime-cpu", supernet=supernet, table=tables["onnxruntime-cpu"]
    )
    reachable = session.reachable()
    assert 0 < reachable.fastest_ms < reachable.middle_ms < reachable.slowest_ms
    assert reachable.fastest_ms <= reachable.median_ms <= reachable.slowest_ms


# -- refusals --------------------------------------------------------------------------


@pytest.fixture
def session(supernet: Path, tables: dict[str, Path]) -> Specializer:
    return Specializer(
        "onnxruntime-cpu",
        supernet=supernet,
        table=tables["onnxruntime-cpu"],
        on_drift="accept",
    )


def test_a_budget_below_the_fastest_network_names_the_fastest(
    supernet: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.json"
    # Of a machine that no real one is faster than.
    made_up_table("onnxruntime-cpu", scale=1e-6).save(table)
    session = Specializer(
        "onnxruntime-cpu", supernet=supernet, table=table, on_drift="accept"
    )
    table.unlink()
    fastest_ms = session.reachable().fastest_ms
    with pytest.raises(InfeasibleBudget) as caught:
        session.specialize(fastest_ms / 2, out=tmp_path / "bundle")
    error = caught.value
    assert error.fastest_ms == pytest.approx(fastest_ms)
    assert error.budget_ms == fastest_ms / 2
    enough_ms = fastest_ms * session.predictor.upper_ratio
    assert str(error) == (
        f"no network of tiny meets {fastest_ms / 2:g} ms on onnxruntime-cpu here; the "
        f"fastest is predicted to take {fastest_ms:.4g} ms. Ask for at least "
        f"{enough_ms:.4g} ms"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_table_that_promises_too_much_ends_in_a_measured_refusal(
    supernet: Path, tmp_path: Path
) -> None:
    made_up_table("onnxruntime-cpu", scale=1e-6).save(tmp_path / "table.json")
    session = Specializer(
        "onnxruntime-cpu",
        supernet=supernet,
        table=tmp_path / "table.json",
        on_drift="accept",
    )
    budget_ms = session.reachable().slowest_ms * 2
    with pytest.raises(InfeasibleBudget) as caught:
        session.specialize(budget_ms, out=tmp_path / "bundle")
    assert caught.value.fastest_ms is not None
    assert caught.value.fastest_ms > budget_ms
    assert str(caught.value).startswith(
        f"no network of tiny meets {budget_ms:g} ms on onnxruntime-cpu here: the "
        f"fastest, exported and timed, took up to {caught.value.fastest_ms:.4g} ms, "
    )
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("budget_ms", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_budget_that_makes_no_sense_is_refused_first(
    budget_ms: float, tmp_path: Path
) -> None:
    with pytest.raises(SpaceError) as caught:
        specialize("no device", latency_ms=budget_ms, out=tmp_path / "bundle")
    assert str(caught.value) == (
        f"a latency budget of {budget_ms} ms makes no sense; give a finite number "
        "above 0, such as 0.5"
    )


@pytest.mark.parametrize("budget_ms", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_session_refuses_a_budget_that_makes_no_sense(
    budget_ms: float, session: Specializer, tmp_path: Path
) -> None:
    with pytest.raises(SpaceError, match=rf"^a latency budget of {budget_ms} ms "):
        session.specialize(budget_ms, out=tmp_path / "bundle")


def test_an_output_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError) as caught:
        specialize("onnxruntime-cpu", latency_ms=1.0, out=tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} exists and is not an empty folder; name another output folder, "
        "or remove it first"
    )


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bundle"
    file.write_text("mine")
    with pytest.raises(BundleError, match=f"^{file} exists and is not"):
        specialize("onnxruntime-cpu", latency_ms=1.0, out=file)


CORES = available_cores()
COUNT = f"must be a whole number from 1 to {CORES}, the cores that this process can use"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "tpu",
            f"device 'tpu' is unknown; there are {', '.join(backend_names())}, "
            "optionally with ?threads=N",
        ),
        (
            "openvino-cpu?thread=2",
            "device 'openvino-cpu?thread=2': option 'thread' is unknown; use threads",
        ),
        *(
            (
                f"openvino-cpu?threads={bad}",
                f"device 'openvino-cpu?threads={bad}': threads={bad!r} {COUNT}",
            )
            for bad in ("0", "-1", "two", "1.5", "", str(CORES + 1), "9" * 30)
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str) -> None:
    with pytest.raises(DeviceError) as caught:
        Specializer(device)
    assert str(caught.value) == message


def test_an_unknown_supernet_is_refused() -> None:
    with pytest.raises(DeployError) as caught:
        Specializer("onnxruntime-cpu", supernet="no-such-supernet")
    assert str(caught.value) == (
        "'no-such-supernet' is neither a folder nor a supernet of the zoo "
        f"({', '.join(zoo_names()) or 'none'})"
    )


def test_a_folder_without_a_supernet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"; {tmp_path} is not a supernet's folder; "):
        Specializer("onnxruntime-cpu", supernet=tmp_path)


def refused_table(
    table: LatencyTable, supernet: Path, tmp_path: Path, error: type[DeployError]
) -> str:
    path = tmp_path / "table.json"
    table.save(path)
    with pytest.raises(error) as caught:
        Specializer("onnxruntime-cpu", supernet=supernet, table=path)
    return str(caught.value)


def test_a_missing_table_is_refused(supernet: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        Specializer(
            "onnxruntime-cpu", supernet=supernet, table=tmp_path / "missing.json"
        )
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}: missing.json cannot be read (")


def test_a_table_of_another_device_is_refused(supernet: Path, tmp_path: Path) -> None:
    other = replace(this_device(), cpu_model="another processor")
    table = made_up_table("onnxruntime-cpu", device=other)
    message = refused_table(table, supernet, tmp_path, IncompatibleTables)
    assert message == (
        "the table of 'local' does not hold here: device cpu_model is 'another "
        f"processor' in the table and {this_device().cpu_model!r} here. Run "
        "`ofa-deploy profile` on this device to measure a new one"
    )


def test_a_table_of_another_runtime_is_refused(supernet: Path, tmp_path: Path) -> None:
    table = made_up_table("openvino-cpu")
    message = refused_table(table, supernet, tmp_path, IncompatibleTables)
    assert "runtime backend is 'openvino-cpu' in the table and" in message


def test_a_table_of_another_thread_count_is_refused(
    supernet: Path, tmp_path: Path
) -> None:
    other = OnnxRuntimeCpu().runtime(threads=64)
    table = made_up_table("onnxruntime-cpu", runtime=other)
    message = refused_table(table, supernet, tmp_path, IncompatibleTables)
    assert "runtime threads is 64 in the table and 1 here" in message


def test_a_table_of_another_space_is_refused(supernet: Path, tmp_path: Path) -> None:
    table = made_up_table("onnxruntime-cpu", space_sha256="a" * 64, space_name="other")
    message = refused_table(table, supernet, tmp_path, IncompatibleTables)
    assert message == (
        "table.json is of space other (aaaaaaaa), not of tiny "
        f"({space_sha256(tiny.SPACE)[:8]}). Run `ofa-deploy profile` for this space"
    )


@pytest.mark.parametrize("origin", ["synthetic", "emulated"])
def test_a_table_that_was_not_measured_is_refused(
    origin: str, supernet: Path, tmp_path: Path
) -> None:
    table = made_up_table("onnxruntime-cpu", origin=origin)
    message = refused_table(table, supernet, tmp_path, IncompatibleTables)
    assert message == (
        f"table.json is {origin}, not measured; latencies are only taken from "
        "measurements. Run `ofa-deploy profile` on the device"
    )


def test_no_table_of_the_package_is_of_the_tiny_space() -> None:
    # Else tests of profiling would find it, and profile nothing.
    assert list(Path(latency_tables.__path__[0]).glob("tiny-*")) == []


def of(
    supernet: StoredSupernet, tables: dict[str, Path], tmp_path: Path
) -> Specializer:
    write_supernet(tmp_path / "supernet", supernet)
    return Specializer(
        "onnxruntime-cpu",
        supernet=tmp_path / "supernet",
        table=tables["onnxruntime-cpu"],
    )


def test_a_supernet_without_predictor_is_refused(
    tables: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DeployError) as caught:
        of(replace(tiny.stored(), accuracy=None), tables, tmp_path)
    assert str(caught.value) == (
        "the supernet has no accuracy predictor; finish its training with "
        "`ofa-deploy train --resume`"
    )


def test_without_calibration_images_some_must_be_given(
    tables: dict[str, Path], tmp_path: Path
) -> None:
    session = of(replace(tiny.stored(), calibration=None), tables, tmp_path)
    with pytest.raises(DataError) as caught:
        session.specialize(GENEROUS_MS, out=tmp_path / "bundle")
    assert str(caught.value) == (
        "the supernet has no calibration images of its own; give some with "
        "`calibration=` (`--calibration`): a few hundred of what it will see"
    )


def test_a_folder_of_photographs_calibrates(
    session: Specializer, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
    bundle = session.specialize(
        GENEROUS_MS, out=tmp_path / "bundle", calibration=photos
    )
    assert bundle.check().agrees


def test_images_that_cannot_be_used_are_told_before_any_profiling(
    supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profile(*_: object, **__: object) -> None:
        raise AssertionError("profiled before the images were looked at")

    monkeypatch.setattr(pipeline, "measure_table", profile)
    nowhere, out = tmp_path / "nowhere", tmp_path / "bundle"
    one = np.zeros((1, 12, 12, 3), dtype=np.uint8)
    for calibration, evaluation, told in (
        (nowhere, None, "does not exist"),
        (None, nowhere, "does not exist"),
        (one, None, "1 calibration images are too few"),
    ):
        with pytest.raises(DataError, match=told):
            specialize(
                "onnxruntime-cpu",
                latency_ms=1.0,
                out=out,
                supernet=supernet,
                calibration=calibration,
                eval_data=evaluation,
            )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((1, 12, 12, 3), dtype=np.uint8),
            "1 calibration images are too few; batch statistics need at least 2, and "
            "some hundreds to be good",
        ),
        (
            np.zeros((4, 12, 12), dtype=np.uint8),
            "images must be uint8 of shape (count, height, width, 3); got uint8 of "
            "shape (4, 12, 12)",
        ),
        (
            np.zeros((4, 12, 12, 3), dtype=np.float32),
            "images must be uint8 of shape (count, height, width, 3); got float32 of "
            "shape (4, 12, 12, 3)",
        ),
    ],
    ids=["one image", "no channels", "floats"],
)
def test_calibration_images_that_do_not_do_leave_nothing_behind(
    images: Any, message: str, session: Specializer, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        session.specialize(GENEROUS_MS, out=tmp_path / "bundle", calibration=images)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_evaluation_data_of_other_classes_leaves_nothing_behind(
    session: Specializer, tmp_path: Path
) -> None:
    data = tiny.images(per_class=2)
    path = tmp_path / "other.npz"
    np.savez(path, images=data.images, labels=data.labels)
    with pytest.raises(DataError) as caught:
        session.specialize(GENEROUS_MS, out=tmp_path / "bundle", eval_data=path)
    assert str(caught.value) == (
        "the evaluation data has class 'class 0' where the network has 'blue' (3 and 3 "
        "in all); they must be the same, in the same order: rename the folders, or "
        "reorder the .npz's class_names"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["other.npz"]


# -- the supernet that comes with the package ------------------------------------------


@pytest.mark.slow
@pytest.mark.quiet
@pytest.mark.skipif(
    ZOO_SUPERNET not in zoo_names(), reason=f"no {ZOO_SUPERNET} in the zoo yet"
)
def test_the_supernet_of_the_package_is_specialised(
    tmp_path: Path,
) -> None:
    session = Specializer(
        "openvino-cpu",
        supernet=ZOO_SUPERNET,
        cache=tmp_path / "cache",
        on_drift="accept",
    )
    # Binding where the machine is calm, and met on one that others slow down, too.
    budget_ms = session.reachable().middle_ms
    reached = session.reachable().slowest_ms * 5
    try:
        bundle = session.specialize(budget_ms, out=tmp_path / "bundle")
    except InfeasibleBudget:
        bundle = session.specialize(reached, out=tmp_path / "bundle")
    with bundle:
        manifest = bundle.manifest
        assert bundle.check().agrees
        assert manifest.accuracy.kind == "predicted"
        assert manifest.binding.met
        assert manifest.measured.quiet_ms <= manifest.binding.bound
        images = session.supernet.calibration
        assert images is not None
        prediction = bundle.predict(images[0])
        assert prediction.class_name in manifest.class_names
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
