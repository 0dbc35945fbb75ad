"""Convolutions over maps of a few pixels compute what torch's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofa_deploy.nn.memory_format import store_channels_last
from ofa_deploy.train.convolutions import ConvolutionsBy
from ofa_deploy.train.small_maps import as_product, product

MANY = 256


def stored(*shape: int, number_format: torch.dtype = torch.float32) -> Tensor:
    """Noise, in channels-last memory."""
    x = torch.randn(shape).to(number_format)
    return x.contiguous(memory_format=torch.channels_last)


def conv(
    channels: int = MANY, *, stored_plainly: bool = False, **named: object
) -> nn.Conv2d:
    """By default with weights enough, in channels-last memory."""
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1, **named}
    made = nn.Conv2d(channels, channels, **options)
    if not stored_plainly:
        store_channels_last(made)
    return made


def gradient_of(x: Tensor) -> Tensor:
    """That there must be."""
    assert x.grad is not None
    return x.grad


def is_product(output: Tensor) -> bool:
    """Whether it is the product's output, turned back into a map."""
    return type(output.grad_fn).__name__ == "PermuteBackward0"


def trained(call: Callable[..., Tensor], *inputs: Tensor | None) -> list[Tensor]:
    """Output and gradients, pulled at by the same noise."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    output = call(*leaves)
    generator = torch.Generator().manual_seed(0)
    pulled = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(pulled.to(output.dtype))  # type: ignore[no-untyped-call]
    return [output.detach(), *(gradient_of(x) for x in leaves if x is not None)]


@settings(max_examples=60)
@given(
    count=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    extra=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_product_is_the_convolution(
    count: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    extra: tuple[int, int],
    has_bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = stored(count, channels[0], *size, number_format=torch.float64)
    weight = stored(channels[1], channels[0], *kernel, number_format=torch.float64)
    bias = torch.randn(channels[1], dtype=torch.float64) if has_bias else None
    rows, columns = (
        max(0, -(-(k - s) // 2)) + more
        for s, k, more in zip(size, kernel, extra, strict=True)
    )

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=(rows, columns))

    def as_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(x, weight, bias, padding=(rows, columns))

    ours = trained(as_product, x, weight, bias)
    right = trained(by_torch, x, weight, bias)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert len(ours) == len(right) == 3 + has_bias
    for found, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_layer_of_many_channels_is_trained_as_torch_trains_it(
    size: int, bf16: bool
) -> None:
    torch.manual_seed(0)
    layer, x = conv(bias=not bf16), stored(4, MANY, size, size)
    results = []
    for mode in (None, ConvolutionsBy(as_product)):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if mode is None:
                output = layer(inputs)
            else:
                with mode:
                    output = layer(inputs)
        assert is_product(output) == (mode is not None)
        output.float().square().sum().backward()
        gradients = map(gradient_of, (inputs, *layer.parameters()))
        results.append([output.float().detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        distance = (ours - theirs).norm() / theirs.norm()
        assert distance < (0.02 if bf16 else 1e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        pytest.param(conv(), stored(2, MANY, 4, 4), id="many pixels"),
        pytest.param(conv(kernel_size=1, padding=0), stored(2, MANY, 2, 2), id="1×1"),
        pytest.param(conv(stride=2), stored(2, MANY, 2, 2), id="stride"),
        pytest.param(conv(dilation=2), stored(2, MANY, 3, 3), id="dilation"),
        pytest.param(conv(groups=2), stored(2, MANY, 2, 2), id="groups"),
        pytest.param(conv(padding="same"), stored(2, MANY, 2, 2), id="by name"),
        pytest.param(
            conv(64, kernel_size=8, padding=4), stored(2, 64, 2, 2), id="large windows"
        ),
        pytest.param(
            conv(), stored(2, MANY, 2, 2).contiguous(), id="a channel at a time"
        ),
        pytest.param(conv(), stored(2, MANY, 2, 2)[0], id="one image"),
        pytest.param(
            conv(stored_plainly=True),
            stored(2, MANY, 2, 2),
            id="weights a channel at a time",
        ),
        pytest.param(
            conv(8),
            stored(2, 8, 2, 2),
            id="few weights",
        ),
    ],
)
def test_all_else_is_left_to_torch(layer: nn.Conv2d, x: Tensor) -> None:
    with ConvolutionsBy(as_product):
        output = layer(x)
    assert not is_product(output)
    assert output.equal(layer(x))


@pytest.mark.parametrize(
    "options",
    [
        *({"padding_mode": mode} for mode in ("circular", "replicate")),
        {"stride": np.int64(1), "padding": np.int64(1)},
        {"stride": [1], "padding": [1]},
    ],
    ids=str,
)
def test_a_layer_may_be_told_of_in_other_ways(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, weight = stored(2, MANY, 1, 1), stored(MANY, MANY, 3, 3)

    def call(x: Tensor) -> Tensor:
        mode = options.get("padding_mode")
        if mode is None:
            return F.conv2d(x, weight, **options)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), weight)

    with ConvolutionsBy(as_product):
        output = call(x)
    torch.testing.assert_close(output, call(x), rtol=1e-5, atol=1e-5)


def test_a_window_that_does_not_fit_is_refused_as_torch_refuses_it() -> None:
    with (
        ConvolutionsBy(as_product),
        pytest.raises(RuntimeError, match="Kernel size can't be greater"),
    ):
        conv(padding=0)(stored(2, MANY, 2, 2))


def test_what_a_checkpoint_computes_again_is_left_to_torch() -> None:
    layer, x = conv(), stored(2, MANY, 2, 2).requires_grad_()
    with ConvolutionsBy(as_product):
        output = checkpoint(layer, x, use_reentrant=False)
    output.sum().backward()
    ours = gradient_of(x)
    x.grad = None
    layer(x).sum().backward()
    assert ours.equal(gradient_of(x))
