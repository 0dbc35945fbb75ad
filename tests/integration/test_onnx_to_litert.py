"""The .tflite of any convolutional network computes what torch does, in one piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")

from ofa_deploy.export.onnx_to_litert import UnwrittenOperator, convert_onnx
from ofa_deploy.nn import onnx_module
from ofa_deploy.nn.onnx_module import write_module
from ofa_deploy.target import parse_target
from ofa_deploy.verify import compare_outputs, run_one_by_one
from profilers.backends.litert_cpu import LiteRtCpu
from tests.support import own_networks
from tests.support.litert_models import operators

pytestmark = pytest.mark.usefixtures("quick_exports")

IMAGES = 3
SIZE = own_networks.SIZE


def exported(network: nn.Module, folder: Path) -> onnx.ModelProto:
    target = parse_target("onnxruntime-cpu")
    file = write_module(network.eval(), resolution=SIZE, target=target, folder=folder)
    return onnx.load(folder / file)


def require_alike(network: nn.Module, folder: Path) -> list[str]:
    """That a network and its .tflite agree; returns the operators of that."""
    model = convert_onnx(exported(network, folder))
    shape = (IMAGES, 3, SIZE, SIZE)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    with LiteRtCpu().load(model, threads=1) as session:
        assert session.fallback is None
        found = run_one_by_one(session, images)
    assert compare_outputs(found, expected, tolerance=1e-5).agrees
    return operators(model)


@pytest.mark.parametrize("name", own_networks.ALL)
def test_networks_as_people_bring_them(name: str, tmp_path: Path) -> None:
    network = own_networks.randomise(own_networks.ALL[name]())
    kinds = Counter(require_alike(network, tmp_path))
    # Maps become rows of features in the order that they are in.
    assert kinds["TRANSPOSE"] == 0
    # Activations are in the operators before them, and norms in the convolutions.
    assert kinds["RELU"] == 0
    assert kinds["MUL"] == {"dense": 3, "gated": 1, "shared": 2}.get(name, 0)


class Between(nn.Module):
    """Something between a convolution with its activation and a classifier."""

    def __init__(
        self, between: nn.Module | Callable[[Tensor], Tensor], *, relu: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.activation = nn.ReLU() if relu else nn.Identity()
        self.between = between
        with torch.no_grad():
            image = torch.zeros(1, 3, SIZE, SIZE)
            rows = self.between(self.activation(self.stem(image))).flatten(1)
        self.head = nn.Linear(rows.shape[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.activation(self.stem(x)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def shuffled(x: Tensor) -> Tensor:
    """Channels of two groups in turn."""
    count, channels, height, width = x.shape
    x = x.view(count, 2, channels // 2, height, width).transpose(1, 2)
    return x.reshape(count, channels, height, width)


def halved(x: Tensor) -> Tensor:
    """One half of the channels scaled by the other."""
    first, last = x.chunk(2, dim=1)
    return torch.cat([last, first * last, x], dim=1)


class Standardised(nn.Conv2d):
    """Its weights have no mean."""

    def forward(self, input: Tensor) -> Tensor:
        """As weight standardisation has them."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias)


class Twice(nn.Module):
    """One layer for rows and for others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.layer(self.layer(x.flatten(2)[:, :, :SIZE]).relu())
        return rows


def norm(channels: int) -> nn.BatchNorm2d:
    """As if trained."""
    torch.manual_seed(1)
    found = nn.BatchNorm2d(channels)
    for tensor in (*found.parameters(), *found.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return found


PARTS: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "pool-even": nn.MaxPool2d(2),
    "pool-padded": nn.MaxPool2d(3, 2, 1),
    "pool-same": nn.MaxPool2d(3, 1, 1),
    "average": nn.AvgPool2d(3, 2),
    "average-padded": nn.AvgPool2d(3, 2, 1),
    "average-same": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "adaptive": nn.AdaptiveAvgPool2d(1),
    "global": lambda x: x.mean((2, 3)),
    "relu6": nn.ReLU6(),
    "clip": lambda x: x.clamp(-0.5, 0.25),
    "hswish": nn.Hardswish(),
    "hsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "leaky": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(8, init=0.3),
    "elu": nn.ELU(),
    "tanh": nn.Tanh(),
    "same-twice": lambda x: F.relu(x - 0.1) + x,
    "norm": norm(8),
    "grouped": nn.Conv2d(8, 12, 3, groups=4),
    "multiplied": nn.Conv2d(8, 16, 3, groups=8, bias=False),
    "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "far": nn.Conv2d(8, 8, 2, padding="same", bias=False),
    "every-other": lambda x: x[:, :, ::2, ::2],
    "crop": lambda x: x[:, 2:6, 1:-1, 3:],
    "zeros": lambda x: F.pad(x, (1, 0, 2, 1, 0, 3)),
    "shuffle": shuffled,
    "halves": halved,
    "by-channel": lambda x: x * torch.linspace(0.5, 1.5, 8).view(8, 1, 1),
    "gate": lambda x: x * x.mean((2, 3)).sigmoid().view(-1, 8, 1, 1),
    "rows": lambda x: x.flatten(1).tanh(),
    "columns": lambda x: x.permute(0, 2, 3, 1),
    "turned": lambda x: x.transpose(2, 3),
    "shares": lambda x: x.flatten(1).softmax(1),
    "shares-of-channels": lambda x: x.softmax(1),
    "standardised": Standardised(8, 4, 3),
    "twice": Twice(),
    "rest": lambda x: 1 - x,
    "along-width": lambda x: x + torch.linspace(-1, 1, SIZE),
    "means-of-channels": lambda x: x.mean(1, keepdim=True),
    "unequal": lambda x: torch.cat([t * 2 for t in torch.split(x, [1, 5, 2], 1)], 1),
    "ones": lambda x: torch.cat([x, torch.ones(len(x), 1, SIZE, SIZE)], 1),
    "features-twice": lambda x: torch.cat([x.flatten(1), x.flatten(1).tanh()], 1),
    "read-twice": lambda x: F.relu(x * 2 - 1) + (x * 2 - 1),
    "places": lambda x: (
        x + torch.linspace(0, 1, 96**2).view(1, 1, 96, 96)[:, :, :SIZE, :SIZE]
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", PARTS)
def test_each_operator_that_is_written(name: str, tmp_path: Path) -> None:
    require_alike(Between(PARTS[name]), tmp_path)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (torch.sin, "Sin .*no such operator"),
        (nn.MaxPool2d(3, 2, 1), "MaxPool .*pads with"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "AveragePool .*pads with"),
        (nn.MaxPool2d(3, 2, ceil_mode=True), "rounds sizes up"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "Pad .*than zeros"),
        (lambda x: x @ x.transpose(2, 3), "MatMul .*depends on the image"),
        (nn.ELU(0.5), "Elu .*alpha is not 1"),
        (lambda x: torch.stack([x, x * 2], 1).mean(1), "ReduceMean .*no row"),
        (nn.Sequential(nn.Flatten(2), nn.PReLU(8)), "PRelu .*not of channels"),
    ],
    ids=[
        *("sin", "pool", "average", "ceil", "reflect", "product"),
        *("elu", "stack", "slopes"),
    ],
)
def test_what_is_not_written_is_named(
    part: nn.Module | Callable[[Tensor], Tensor], told: str, tmp_path: Path
) -> None:
    model = exported(Between(part, relu=False), tmp_path)
    with pytest.raises(UnwrittenOperator, match=told):
        convert_onnx(model)


def test_sizes_that_are_not_known_are_told(tmp_path: Path) -> None:
    model = exported(Between(nn.Identity()), tmp_path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    with pytest.raises(UnwrittenOperator, match="one image in float32"):
        convert_onnx(model)


def test_kernels_are_as_large_as_their_weights(tmp_path: Path) -> None:
    """Older exporters do not say so."""
    model = exported(Between(nn.Identity()), tmp_path)
    expected = convert_onnx(model)
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    (told,) = (a for a in conv.attribute if a.name == "kernel_shape")
    conv.attribute.remove(told)
    assert convert_onnx(model) == expected


def test_what_is_not_written_is_left_to_the_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "convert_module", lambda *_, **__: b"converted")
    target = parse_target("litert-cpu")
    network = Between(torch.sin).eval()
    file = write_module(network, resolution=SIZE, target=target, folder=tmp_path)
    assert (tmp_path / file).read_bytes() == b"converted"
