"""Networks that people bring, on LiteRT: what is converted, timed and shrunk."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "litert_torch", reason="litert-torch (1.2 GB) is not installed; see `make oracle`"
)

import torch

from ofa_deploy import specialize
from ofa_deploy.nn.onnx_module import write_module
from ofa_deploy.shrink import to_budget
from ofa_deploy.shrink.to_budget import HISTORY_FILE
from ofa_deploy.target import parse_target
from ofa_deploy.verify import compare_outputs, run_one_by_one
from profilers.backends.litert_cpu import LiteRtCpu
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from tests.support import own_networks, tiny
from tests.support.litert_models import operators
from tests.support.shrinking import (
    ResidualNet,
    data,
    own_network,
    priced_ms,
    recipe,
    time_quickly,
    train,
)

IMAGES = 4
# XNNPACK has no slices of every other place, of which shortcuts without parameters are.
IN_PIECES = {"padded"}


@pytest.mark.parametrize("name", own_networks.ALL)
def test_the_files_of_a_network_agree_and_run_in_one_piece(
    name: str, tmp_path: Path
) -> None:
    network = own_networks.randomise(own_networks.ALL[name]())
    size = own_networks.SIZE
    target = parse_target("litert-cpu")
    file = write_module(network, resolution=size, target=target, folder=tmp_path)
    assert file == "model.tflite"
    images = np.random.default_rng(0).standard_normal(
        (IMAGES, 3, size, size), dtype=np.float32
    )
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    told = pytest.warns(match="partitions") if name in IN_PIECES else nullcontext()
    with told, LiteRtCpu().load(tmp_path / file, threads=1) as session:
        assert (session.fallback is None) == (name not in IN_PIECES)
        found = run_one_by_one(session, images)
    assert compare_outputs(found, expected, tolerance=1e-5).agrees
    with OnnxRuntimeCpu().load(tmp_path / "model.onnx", threads=1) as session:
        assert compare_outputs(run_one_by_one(session, images), expected).agrees
    kinds = Counter(operators((tmp_path / file).read_bytes()))
    # At the end alone, where maps become rows of features.
    assert kinds["TRANSPOSE"] <= 1
    # Norms are in the convolutions before them; those that have none take two. Others
    # are of a gate, and of a slope.
    assert kinds["MUL"] == {"dense": 3, "gated": 1, "asking": 2}.get(name, 0)
    assert kinds["SUB"] == 0


def test_a_network_with_skips_is_shrunk_to_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = tmp_path / "prices"
    caches.mkdir()
    time_quickly(monkeypatch)
    monkeypatch.setattr(to_budget, "cache_folder", lambda: caches)
    network = train(ResidualNet())
    bundle = specialize(
        "litert-cpu",
        model=network,
        method="legr",
        data=data(),
        eval_data=tiny.images(per_class=40, seed=12),
        out=tmp_path / "out",
        latency_ms=0.85 * priced_ms(own_network(network), caches, backend="litert-cpu"),
        recipe=recipe(),
    )
    manifest = bundle.manifest
    assert manifest.model_file == "model.tflite"
    assert manifest.binding.met
    assert manifest.accuracy.kind == "measured"
    assert manifest.accuracy.value > 0.6
    assert bundle.check().agrees
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert sum(history["kept"]) < sum(history["channels"])
