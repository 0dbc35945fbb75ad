"""The .tflite of a plan computes what its ONNX does, in one piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")

from ai_edge_litert import schema_py_generated as schema

from ofa_deploy.export import litert
from ofa_deploy.export.onnx import emit_network, random_weights
from ofa_deploy.families import mbv3
from ofa_deploy.plan import NetworkPlan, all_blocks, lower
from ofa_deploy.space import SearchSpace
from profilers.backends.litert_cpu import LiteRtCpu
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from tests.support import tiny
from tests.support.litert_models import operators

NETWORKS_PER_SPACE = 10
SPACES = (mbv3.small(), mbv3.imagenet(), mbv3.imagenet(width=1.2))


def plans(space: SearchSpace) -> Iterator[NetworkPlan]:
    for genome in space.sample(NETWORKS_PER_SPACE, np.random.default_rng(0)):
        yield lower(space, space.decode(genome))


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_it_computes_what_the_onnx_model_computes(space: SearchSpace) -> None:
    rng = np.random.default_rng(1)
    for plan in plans(space):
        weights = random_weights(plan.layers, rng=rng)
        size = plan.resolution
        image = rng.standard_normal((1, 3, size, size), dtype=np.float32)
        onnx = emit_network(plan, weights, form="fused")
        with OnnxRuntimeCpu().load(onnx, threads=1) as session:
            expected = session.run({"image": image})["logits"]
        model = litert.emit_network(plan, weights)
        with LiteRtCpu().load(model, threads=1) as session:
            assert session.partition_count == 1
            assert session.input_shapes == {"image": (1, size, size, 3)}
            nhwc = image.transpose(0, 2, 3, 1)
            found = session.run({"image": nhwc})["logits"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_it_has_no_operator_that_the_network_does_not_need() -> None:
    space = mbv3.imagenet()
    plan = lower(space, space.largest())
    weights = random_weights(plan.layers, rng=np.random.default_rng(0))
    count = Counter(operators(litert.emit_network(plan, weights)))
    assert count == {
        "CONV_2D": 1 + 1 + 20 * 2 + 12 * 2 + 1,  # stem, blocks, gates, head
        "DEPTHWISE_CONV_2D": 1 + 20,
        "PAD": 1 + 4,  # strides of 2 over even sizes: the stem and four stages
        "ADD": 1 + 15,
        "MEAN": 12 + 1,
        "MUL": 12 * 2,
        "HARD_SWISH": 1 + 12 * 2 + 2,
        "FULLY_CONNECTED": 2,
    }


def test_buffers_are_aligned_as_the_schema_asks() -> None:
    plan = lower(tiny.SPACE, tiny.SPACE.largest())
    weights = random_weights(plan.layers, rng=np.random.default_rng(0))
    model = litert.emit_network(plan, weights)
    # Pads of two kernels, axes, and a sixth are constants, too.
    assert aligned_buffers(model) == len(weights) + 4


def aligned_buffers(model: bytes) -> int:
    """How many buffers with data there are, all of which start where they should."""
    root = schema.Model.GetRootAsModel(model, 0)
    base = np.frombuffer(model, np.uint8).__array_interface__["data"][0]
    count = 0
    for index in range(root.BuffersLength()):
        buffer = root.Buffers(index)
        if buffer.DataIsNone():
            continue
        start = buffer.DataAsNumpy().__array_interface__["data"][0]
        assert (start - base) % litert.BUFFER_ALIGNMENT == 0
        count += 1
    return count


def test_a_converter_s_model_gets_the_names_used_here_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = lower(tiny.SPACE, tiny.SPACE.largest())
    weights = random_weights(plan.layers, rng=np.random.default_rng(0))
    expected = litert.emit_network(plan, weights)
    with monkeypatch.context() as patch:
        patch.setattr(litert, "INPUT_NAME", "args_0")
        patch.setattr(litert, "OUTPUT_NAME", "output_0")
        patch.setattr(litert, "SIGNATURE", "main")
        converted = litert.emit_network(plan, weights)
    found = litert.named_alike(converted)
    assert aligned_buffers(found) == aligned_buffers(expected)
    size = plan.resolution
    image = np.random.default_rng(1).standard_normal((1, size, size, 3), np.float32)
    with LiteRtCpu().load(converted, threads=1) as session:
        assert session.input_shapes.keys() == {"args_0"}
    outputs = []
    for model in (expected, found):
        with LiteRtCpu().load(model, threads=1) as session:
            outputs.append(session.run({"image": image})["logits"])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    root = schema.ModelT.InitFromPackedBuf(found, 0)
    assert [bytes(entry.signatureKey) for entry in root.signatureDefs] == [
        b"serving_default"
    ]


def test_equal_networks_give_equal_files() -> None:
    plan = lower(tiny.SPACE, tiny.SPACE.smallest())
    weights = random_weights(plan.layers, rng=np.random.default_rng(0))
    assert litert.emit_network(plan, weights) == litert.emit_network(plan, weights)


def test_every_block_of_a_space_runs_in_one_piece() -> None:
    rng = np.random.default_rng(0)
    for block in all_blocks(tiny.SPACE).values():
        with LiteRtCpu().load(litert.emit_block(block, rng=rng), threads=1) as session:
            assert session.partition_count == 1
