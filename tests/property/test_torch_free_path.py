"""Specialising computes without torch what training computes with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ofa_deploy.errors import DataError, ParityError
from ofa_deploy.export.onnx import (
    INPUT_NAME,
    OUTPUT_NAME,
    emit_block,
    emit_network,
    random_weights,
)
from ofa_deploy.export.openvino import write_ir
from ofa_deploy.exporting import compare_exported, export_network
from ofa_deploy.families import mbv3
from ofa_deploy.fuse import BatchNorm, fuse
from ofa_deploy.layers import ConvLayer
from ofa_deploy.materialise import Weights, materialise
from ofa_deploy.nn.elastic import ElasticConv
from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.plan import NetworkPlan, all_blocks, lower
from ofa_deploy.preprocess import prepare
from ofa_deploy.recalibrate import mixed, recalibrate
from ofa_deploy.space import SearchSpace, SubnetConfig
from ofa_deploy.target import Target
from ofa_deploy.train.evaluate import recalibrate_supernet
from ofa_deploy.verify import (
    compare_outputs,
    require_parity,
    run_one_by_one,
)
from profilers.backends import get_backend
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from tests.support import tiny, tiny_torch
from tests.support.gpu import every_backend

Floats = NDArray[np.float32]
CONFIGS = [
    tiny.SPACE.largest(),
    tiny.SPACE.smallest(),
    *tiny.random_configs(tiny.SPACE, 6),
]
SMALL = mbv3.small()
# The others are compared with these in tests of their own format.
ONNX_BACKENDS = ("onnxruntime-cpu", "openvino-cpu")
SMALL_CONFIGS = [SMALL.largest(), SMALL.smallest()]


def network_inputs(resolution: int, count: int, *, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, resolution, resolution), dtype=np.float32)


def relative_error(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def run(model: bytes | Path, inputs: Floats, *, backend: str) -> Floats:
    with get_backend(backend).load(model, threads=1) as session:
        result: Floats = session.run({INPUT_NAME: inputs})[OUTPUT_NAME]
    return result


def torch_logits(network: Supernet, plan: NetworkPlan, inputs: Floats) -> Floats:
    with torch.no_grad():
        result: Floats = network(torch.from_numpy(inputs), plan).numpy()
    return result


# -- materialise -----------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.id)
def test_numpy_cuts_the_weights_that_torch_applies(config: SubnetConfig) -> None:
    network = tiny_torch.supernet()
    plan = lower(tiny.SPACE, config)
    weights = materialise(tiny_torch.arrays(network), plan)
    for layer in plan.layers:
        if not isinstance(layer, ConvLayer):
            continue
        elastic = network.get_submodule(layer.name)
        assert isinstance(elastic, ElasticConv)
        expected = elastic.active_weight(layer).detach().numpy()
        np.testing.assert_allclose(
            weights[f"{layer.name}.weight"], expected, rtol=1e-5, atol=1e-6
        )


def test_the_largest_network_is_the_stored_weights_without_transforms() -> None:
    stored = tiny.random_supernet_weights(tiny.SPACE, np.random.default_rng(0))
    weights = materialise(stored, lower(tiny.SPACE, tiny.SPACE.largest()))
    assert weights.keys() == {name for name in stored if "transform" not in name}
    assert all(np.array_equal(weights[name], stored[name]) for name in weights)


# -- recalibrate -----------------------------------------------------------------------


def statistics(weights: Weights) -> dict[str, Floats]:
    return {
        name: array
        for name, array in weights.items()
        if name.endswith((".norm.mean", ".norm.variance"))
    }


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda c: c.id)
def test_runtimes_find_the_statistics_that_torch_finds(
    config: SubnetConfig, backend: str
) -> None:
    network = tiny_torch.supernet()
    plan = lower(tiny.SPACE, config)
    inputs = network_inputs(plan.resolution, 22)
    weights = materialise(tiny_torch.arrays(network), plan)
    # Batches of 8, 8 and 6.
    found = recalibrate(
        weights, plan, inputs, backend=get_backend(backend), threads=1, batch_size=8
    )
    batches = torch.split(torch.from_numpy(mixed(inputs)), 8)
    recalibrate_supernet(network, plan, batches)
    expected = statistics(materialise(tiny_torch.arrays(network), plan))
    assert statistics(found).keys() == expected.keys()
    for name, array in expected.items():
        assert relative_error(found[name], array) <= 1e-5, name


def test_images_in_the_order_of_their_classes_are_as_good_as_mixed_ones() -> None:
    plan = lower(tiny.SPACE, CONFIGS[0])
    weights = materialise(tiny.stored().weights, plan)
    inputs = network_inputs(plan.resolution, 400)
    inputs[:200] += 3.0  # a class of its own
    found = recalibrate(weights, plan, inputs, backend=OnnxRuntimeCpu(), threads=1)
    whole = recalibrate(
        weights, plan, inputs, backend=OnnxRuntimeCpu(), threads=1, batch_size=400
    )
    for name, expected in statistics(whole).items():
        assert relative_error(found[name], expected) < 0.1, name


def test_recalibration_changes_nothing_but_statistics() -> None:
    plan = lower(tiny.SPACE, CONFIGS[0])
    weights = materialise(tiny.stored().weights, plan)
    inputs = network_inputs(plan.resolution, 8)
    found = recalibrate(weights, plan, inputs, backend=OnnxRuntimeCpu(), threads=1)
    assert found.keys() == weights.keys()
    changed = {n for n in weights if not np.array_equal(found[n], weights[n])}
    assert changed == statistics(weights).keys()


def test_a_last_image_alone_joins_the_batch_before() -> None:
    plan = lower(tiny.SPACE, CONFIGS[0])
    weights = materialise(tiny.stored().weights, plan)
    inputs = network_inputs(plan.resolution, 9)
    whole, split = (
        recalibrate(
            weights,
            plan,
            inputs,
            backend=OnnxRuntimeCpu(),
            threads=1,
            batch_size=batch_size,
        )
        for batch_size in (9, 8)
    )
    assert all(np.array_equal(whole[name], split[name]) for name in whole)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count: int) -> None:
    plan = lower(tiny.SPACE, CONFIGS[0])
    with pytest.raises(DataError) as caught:
        recalibrate(
            materialise(tiny.stored().weights, plan),
            plan,
            network_inputs(plan.resolution, count),
            backend=OnnxRuntimeCpu(),
            threads=1,
        )
    assert str(caught.value) == (
        f"{count} calibration images are too few; batch statistics need at least 2, "
        "and some hundreds to be good"
    )


# -- fuse ------------------------------------------------------------------------------


def test_folding_gives_what_the_batch_norm_gives() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 1, 1), dtype=np.float32)
    gamma, beta, mean = (rng.standard_normal(4, dtype=np.float32) for _ in range(3))
    variance = rng.uniform(0.1, 3, 4).astype(np.float32)
    norm = BatchNorm(gamma=gamma, beta=beta, mean=mean, variance=variance)
    fused, bias = norm.fold(weight)
    pixel = rng.standard_normal(3, dtype=np.float32)
    convolved = weight[:, :, 0, 0] @ pixel
    normed = gamma * (convolved - mean) / np.sqrt(variance + 1e-5) + beta
    np.testing.assert_allclose(fused[:, :, 0, 0] @ pixel + bias, normed, rtol=1e-4)


def test_folding_another_number_of_channels_is_refused() -> None:
    four = np.ones(4, dtype=np.float32)
    weight = np.ones((5, 3, 1, 1), dtype=np.float32)
    with pytest.raises(ValueError, match=r"^norm covers 4 channels, weight has 5$"):
        BatchNorm(gamma=four, beta=four, mean=four, variance=four).fold(weight)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.id)
def test_the_fused_network_equals_the_unfused_one(config: SubnetConfig) -> None:
    plan = lower(tiny.SPACE, config)
    weights = materialise(tiny.stored().weights, plan)
    inputs = network_inputs(plan.resolution, 32)
    unfused = emit_network(plan, weights, form="unfused", batch=None)
    fused = emit_network(plan, fuse(weights, plan), form="fused", batch=None)
    expected = run(unfused, inputs, backend="onnxruntime-cpu")
    found = run(fused, inputs, backend="onnxruntime-cpu")
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.id)
def test_a_fused_network_has_the_tensors_that_are_made_up_for_timing(
    config: SubnetConfig,
) -> None:
    plan = lower(tiny.SPACE, config)
    fused = fuse(materialise(tiny.stored().weights, plan), plan)
    timed = random_weights(plan.layers, rng=np.random.default_rng(0))
    assert {n: a.shape for n, a in fused.items()} == {
        n: a.shape for n, a in timed.items()
    }


# -- exported files --------------------------------------------------------------------


def export(plan: NetworkPlan, weights: Weights, backend: str, folder: Path) -> Path:
    """The fused network as a file of a runtime's kind."""
    model = emit_network(plan, fuse(weights, plan), form="fused", batch=None)
    if backend == "openvino-cpu":
        write_ir(model, folder / "model.xml")
        return folder / "model.xml"
    (folder / "model.onnx").write_bytes(model)
    return folder / "model.onnx"


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
@pytest.mark.parametrize(
    ("space", "config"),
    [
        *((tiny.SPACE, c) for c in CONFIGS[:4]),
        *((SMALL, c) for c in SMALL_CONFIGS),
    ],
    ids=lambda value: value.id if isinstance(value, SubnetConfig) else "",
)
def test_an_exported_file_computes_what_the_supernet_computes(
    space: SearchSpace, config: SubnetConfig, backend: str, tmp_path: Path
) -> None:
    network = tiny_torch.supernet(space)
    plan = lower(space, config)
    calibration = torch.from_numpy(network_inputs(plan.resolution, 32, seed=1))
    recalibrate_supernet(network, plan, [calibration])
    weights = materialise(tiny_torch.arrays(network), plan)
    model = export(plan, weights, backend, tmp_path)
    inputs = network_inputs(plan.resolution, 256)
    expected = torch_logits(network, plan, inputs)
    report = compare_outputs(run(model, inputs, backend=backend), expected)
    assert report.max_relative_error <= 1e-4
    assert report.top1_agreement == 1.0


@pytest.mark.parametrize("backend", every_backend())
def test_an_exported_network_is_checked_on_256_images(
    backend: str, tmp_path: Path
) -> None:
    supernet = tiny.stored()
    assert supernet.calibration is not None
    exported = export_network(
        supernet,
        lower(tiny.SPACE, tiny.SPACE.largest()),
        calibration=supernet.calibration,
        target=Target(backend=backend, threads=1),
        folder=tmp_path,
    )
    parity = compare_exported(
        exported, supernet.calibration, normalisation=supernet.normalisation
    )
    assert parity.image_count == 256
    assert parity.agrees


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    supernet = tiny.stored()
    assert supernet.calibration is not None
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        export_network(
            supernet,
            lower(tiny.SPACE, tiny.SPACE.largest()),
            calibration=supernet.calibration,
            target=Target(backend="openvino-cpu", threads=1),
            folder=folder,
        )
        contents.append({f.name: f.read_bytes() for f in folder.iterdir()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_every_block_of_a_space_runs_alone(backend: str) -> None:
    rng = np.random.default_rng(0)
    for block in all_blocks(tiny.SPACE).values():
        model = emit_block(block, rng=rng)
        inputs = np.ones((1, block.in_channels, block.in_size, block.in_size))
        output = run(model, inputs.astype(np.float32), backend=backend)
        assert output.shape[:2] == (1, block.out_channels)


# -- parity ----------------------------------------------------------------------------


def test_outputs_are_compared_in_units_of_the_largest_reference() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 8.0]], dtype=np.float32)
    found = reference + np.array([[0.0, 0.0], [0.04, 0.0]], dtype=np.float32)
    report = compare_outputs(found, reference, tolerance=0.01)
    assert report.max_relative_error == pytest.approx(0.005)
    assert report.agrees


def test_another_top_class_is_no_parity_however_small_the_error() -> None:
    reference = np.array([[1.0, 1.00001]], dtype=np.float32)
    found = np.array([[1.0, 0.99999]], dtype=np.float32)
    report = compare_outputs(found, reference)
    assert report.max_relative_error <= report.tolerance
    assert not report.agrees


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_no_number_is_no_parity(value: float) -> None:
    reference = np.array([[1.0, 2.0]], dtype=np.float32)
    found = np.array([[value, 2.0]], dtype=np.float32)
    assert not compare_outputs(found, reference).agrees


def test_missing_parity_is_an_error_with_its_figures() -> None:
    reference = np.array([[1.0, 2.0], [1.0, 2.0]], dtype=np.float32)
    found = np.array([[1.0, 2.0], [3.0, 2.0]], dtype=np.float32)
    with pytest.raises(ParityError) as caught:
        require_parity(compare_outputs(found, reference), what="the file")
    error = caught.value
    assert (error.max_relative_error, error.top1_agreement) == (1.0, 0.5)
    assert str(error) == (
        "the file differs from the unfused reference: relative error 1 (allowed "
        "0.0001), the same top class on 50.0% of 2 images (all are required). The "
        "runtime computes something else; report this with the versions of "
        "`ofa-deploy doctor`"
    )


def test_outputs_one_by_one_are_those_of_the_batch() -> None:
    plan = lower(tiny.SPACE, tiny.SPACE.largest())
    weights = fuse(materialise(tiny.stored().weights, plan), plan)
    inputs = prepare(
        tiny.images(per_class=2).images,
        resolution=plan.resolution,
        normalisation=tiny.NORMALISATION,
    )
    free = emit_network(plan, weights, form="fused", batch=None)
    single = emit_network(plan, weights, form="fused")
    together = run(free, inputs, backend="onnxruntime-cpu")
    with OnnxRuntimeCpu().load(single, threads=1) as session:
        alone = run_one_by_one(session, inputs)
    assert relative_error(alone, together) <= 1e-5
