"""Networks that people bring: our .tflite files beside the converter's, and where it
steps in."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "litert_torch", reason="litert-torch (1.2 GB) is not installed; see `make oracle`"
)

import torch
from torch import Tensor, nn

from ofa_deploy.nn.litert_module import convert_module
from ofa_deploy.nn.onnx_module import write_module
from ofa_deploy.target import parse_target
from ofa_deploy.verify import compare_outputs, run_one_by_one
from profilers.backends.litert_cpu import LiteRtCpu
from tests.support import own_networks
from tests.support.litert_models import operators

IMAGES = 4
SIZE = own_networks.SIZE
# XNNPACK has no slices of every other place, of which shortcuts without parameters are.
IN_PIECES = {"padded"}


class SameNet(nn.Module):
    """Pads by a word, which torch exports as another operator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding="same")
        self.norm, self.last = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.stem(x)).relu().mean((2, 3)))
        return logits


class UnwrittenNet(SameNet):
    """With an operator that is not written here."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


NETWORKS: dict[str, type[nn.Module]] = {**own_networks.ALL, "same": SameNet}


def images() -> np.ndarray:
    shape = (IMAGES, 3, SIZE, SIZE)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def logits_of(model: Path | bytes) -> np.ndarray:
    with LiteRtCpu().load(model, threads=1) as session:
        return run_one_by_one(session, images())


def computed(network: nn.Module) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = network(torch.from_numpy(images())).numpy()
    return found


def written(network: nn.Module, folder: Path) -> Path:
    target = parse_target("litert-cpu")
    return folder / write_module(network, resolution=SIZE, target=target, folder=folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_writer_agrees_with_the_converter(name: str, tmp_path: Path) -> None:
    network = own_networks.randomise(NETWORKS[name]())
    ours = written(network, tmp_path)
    theirs = convert_module(network, input_shape=(1, 3, SIZE, SIZE))
    expected = computed(network)
    assert compare_outputs(logits_of(ours), expected, tolerance=1e-5).agrees
    told = pytest.warns(match="partitions") if name in IN_PIECES else nullcontext()
    with told:
        assert compare_outputs(logits_of(theirs), expected, tolerance=1e-5).agrees
    assert len(operators(ours.read_bytes())) <= len(operators(theirs))
    # Of the converter's norms, too, those behind convolutions are in them.
    alone = {"dense": 3, "gated": 1, "asking": 2, "shared": 2}.get(name, 0)
    kinds = Counter(operators(theirs))
    assert (kinds["MUL"], kinds["SUB"]) == (alone, 0)


def test_what_is_not_written_here_is_converted(tmp_path: Path) -> None:
    network = own_networks.randomise(UnwrittenNet())
    file = written(network, tmp_path)
    assert "SIN" in operators(file.read_bytes())
    with pytest.warns(match="outside of the XNNPACK delegate"):
        found = logits_of(file)
    assert compare_outputs(found, computed(network), tolerance=1e-5).agrees
