"""1×1 convolutions that skip pixels compute what torch's do, without its backward."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ofa_deploy.train.convolutions import ConvolutionsBy
from ofa_deploy.train.pointwise import ENOUGH_CHANNELS, of_read_pixels
from ofa_deploy.train.precision import prefers_bf16

FEW = 4


def stored(*shape: int) -> Tensor:
    """Noise, in channels-last memory."""
    x = torch.randn(shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def skips_pixels(output: Tensor) -> bool:
    """Whether torch's own convolution skips any, and so does its backward pass."""
    stride: list[int] = output.grad_fn._saved_stride  # type: ignore[union-attr]
    return max(stride) > 1


def trained(
    x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """Output and gradients, pulled at by the same noise."""
    output = F.conv2d(x, weight, bias, **options)
    drawn = torch.Generator().manual_seed(0)
    pulled = torch.randn(output.shape, generator=drawn, dtype=output.dtype)
    inputs = [one for one in (x, weight, bias) if one is not None]
    return output, *torch.autograd.grad(output, inputs, pulled)


@settings(max_examples=60)
@given(
    count=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    groups=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_they_compute_the_same(
    count: int,
    channels: tuple[int, int],
    groups: int,
    size: tuple[int, int],
    stride: tuple[int, int],
    has_bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    read, written = channels
    x, weight = (
        stored(count, groups * read, *size),
        stored(groups * written, read, 1, 1),
    )
    bias = torch.randn(groups * written, dtype=torch.float64).requires_grad_()
    parameters = (weight, bias if has_bias else None)
    options: dict[str, Any] = {"stride": stride, "groups": groups}
    # A map that is stored plainly is in no danger.
    right = trained(x.contiguous(), *parameters, **options)
    with ConvolutionsBy(of_read_pixels):
        found = trained(x, *parameters, **options)
    assert not skips_pixels(found[0])
    for one, expected in zip(found, right, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (1, 2)},
        {"stride": [2]},
        {"stride": np.int64(3)},
        {"stride": 2, "padding": "valid"},
        {"stride": 2, "padding": [0, 0]},
        {"stride": 2, "dilation": 3},
    ],
    ids=str,
)
def test_a_layer_may_be_told_of_in_any_way(options: dict[str, Any]) -> None:
    x, weight = stored(2, FEW, 5, 5), stored(3, FEW, 1, 1)
    with ConvolutionsBy(of_read_pixels):
        output = F.conv2d(x, weight, **options)
        one = F.conv2d(x[0], weight, **options)
    assert not skips_pixels(output)
    torch.testing.assert_close(output, F.conv2d(x, weight, **options))
    torch.testing.assert_close(one, output[0])


@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [
        pytest.param(ENOUGH_CHANNELS, 1, {"stride": 2}, id="many channels"),
        pytest.param(FEW, 3, {"stride": 2}, id="3×3"),
        pytest.param(FEW, 1, {"stride": 2, "padding": 1}, id="padding"),
    ],
)
def test_all_else_is_left_to_torch(
    channels: int, kernel: int, options: dict[str, Any]
) -> None:
    x, weight = stored(2, channels, 6, 6), stored(3, channels, kernel, kernel)
    with ConvolutionsBy(of_read_pixels):
        output = F.conv2d(x, weight, **options)
    assert skips_pixels(output)
    assert output.equal(F.conv2d(x, weight, **options))


@pytest.mark.parametrize("stride", [0, -1])
def test_strides_that_are_none_are_refused_as_torch_refuses_them(stride: int) -> None:
    with (
        ConvolutionsBy(of_read_pixels),
        pytest.raises(RuntimeError, match="non-positive stride"),
    ):
        F.conv2d(stored(2, FEW, 5, 5), stored(3, FEW, 1, 1), stride=stride)


def test_what_a_checkpoint_computes_again_is_left_to_torch_and_warned_of() -> None:
    x, weight = stored(1, FEW, 5, 5), stored(3, FEW, 1, 1)
    with (
        ConvolutionsBy(of_read_pixels),
        pytest.warns(UserWarning, match="of 4 channels that skips pixels"),
    ):
        output = checkpoint(
            lambda one: F.conv2d(one, weight, stride=2), x, use_reentrant=False
        )
    (found,) = torch.autograd.grad(output.sum(), x)
    (right,) = torch.autograd.grad(F.conv2d(x, weight, stride=2).sum(), x)
    assert found.equal(right)


# In a process of its own, as torch's may crash it, or never end. On CPUs without
# AVX-512 the narrower half is in danger; a map of one channel never lies channels-last.
TRAINED = """
import sys
import torch
import torch.nn.functional as F
from ofa_deploy.train.logits import called_as_in_training

def noise(*shape):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()

bf16 = sys.argv[1] == "True"
for channels in (2, 3, 4, 7, 12, 15):
    for size in (8, 32):
        x, weight = noise(16, channels, size, size), noise(8, channels, 1, 1)
        right = F.conv2d(x[:, :, ::2, ::2].contiguous(), weight.contiguous())
        (right,) = torch.autograd.grad(right.square().sum(), weight)
        with called_as_in_training(bf16=bf16):
            found = F.conv2d(x, weight, stride=2)
        (found,) = torch.autograd.grad(found.float().square().sum(), weight)
        distance = (found - right).norm() / right.norm()
        assert distance < (0.02 if bf16 else 1e-4), (channels, size, distance)
"""


@pytest.mark.parametrize("bf16", sorted({False, prefers_bf16()}))
def test_trainings_survive_shortcuts_of_few_channels(bf16: bool) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TRAINED, str(bf16)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
