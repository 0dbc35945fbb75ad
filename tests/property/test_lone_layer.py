"""A layer that is timed by itself computes, on each runtime, what torch computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")

from ofa_deploy.export.lone_layer import (
    LoneLayer,
    _random,
    emit_litert,
    emit_onnx,
)
from ofa_deploy.layers import ConvLayer, Window
from profilers.backends.litert_cpu import LiteRtCpu
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu

SEED = 0
sizes = st.tuples(st.integers(7, 14), st.integers(7, 14))


def few(most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(1, most), st.integers(1, most))


windows = st.builds(
    Window,
    kernel=few(4),
    stride=few(3),
    dilation=few(2),
    pads=st.tuples(*(st.integers(0, 2) for _ in range(4))),
)
# Channels read, written, and groups of them.
channels = st.sampled_from(
    [(3, 5, 1), (8, 8, 8), (4, 8, 4), (8, 12, 4), (8, 4, 2), (1, 4, 1)]
)


def convolution(
    window: Window, size: tuple[int, int], numbers: tuple[int, int, int]
) -> LoneLayer:
    read, written, groups = numbers
    return LoneLayer(
        name="conv",
        in_channels=read,
        out_channels=written,
        in_size=size,
        window=window,
        groups=groups,
    )


def random_map(layer: LoneLayer) -> NDArray[np.float32]:
    shape = (1, layer.in_channels, *layer.in_size)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def computed(layer: LoneLayer, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """By torch, with the layer's own weights."""
    weight, bias = map(torch.from_numpy, _random(layer, np.random.default_rng(SEED)))
    window = layer.window
    assert window is not None
    above, left, below, right = window.pads
    padded = F.pad(torch.from_numpy(image), (left, right, above, below))
    out = F.conv2d(
        padded,
        weight,
        bias,
        stride=window.stride,
        dilation=window.dilation,
        groups=layer.groups,
    )
    return F.relu(out).numpy()


@settings(deadline=None)
@given(windows, sizes, channels)
def test_convolutions_of_any_kind(
    window: Window, size: tuple[int, int], numbers: tuple[int, int, int]
) -> None:
    layer = convolution(window, size, numbers)
    assume(min(layer.out_size) > 0)
    image = random_map(layer)
    expected = computed(layer, image)
    assert expected.shape[2:] == layer.out_size
    model = emit_onnx(layer, rng=np.random.default_rng(SEED))
    with OnnxRuntimeCpu().load(model, threads=1) as session:
        found = session.run({"image": image})["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    model = emit_litert(layer, rng=np.random.default_rng(SEED))
    with LiteRtCpu().load(model, threads=1) as session:
        assert session.fallback is None
        last = session.run({"image": image.transpose(0, 2, 3, 1).copy()})["logits"]
    np.testing.assert_allclose(last.transpose(0, 3, 1, 2), expected, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20))
def test_linear_layers_at_any_number_of_places(
    places: int, read: int, written: int
) -> None:
    layer = LoneLayer(
        name="linear",
        in_channels=read,
        out_channels=written,
        in_size=(places, 1),
        window=None,
    )
    rows = np.random.default_rng(1).standard_normal((places, read), dtype=np.float32)
    weight, bias = _random(layer, np.random.default_rng(SEED))
    expected = rows @ weight.T + bias
    model = emit_onnx(layer, rng=np.random.default_rng(SEED))
    with OnnxRuntimeCpu().load(model, threads=1) as session:
        found = session.run({"image": rows})["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    model = emit_litert(layer, rng=np.random.default_rng(SEED))
    with LiteRtCpu().load(model, threads=1) as session:
        last = session.run({"image": rows})["logits"]
    np.testing.assert_allclose(last, expected, atol=1e-5)


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 40))
def test_a_plan_s_convolution_goes_over_its_map_as_its_window(
    kernel: int, stride: int, size: int
) -> None:
    kernel += 1 - kernel % 2
    layer = ConvLayer(
        name="conv",
        in_channels=3,
        out_channels=4,
        kernel=kernel,
        kernels=(kernel,),
        stride=stride,
        depthwise=False,
        batch_norm=True,
        activation="relu",
        in_size=size,
    )
    assert layer.window.out_size((size, size)) == (layer.out_size,) * 2


@given(windows, sizes, channels, windows, sizes, channels)
def test_only_what_is_alike_has_one_key(
    window: Window,
    size: tuple[int, int],
    numbers: tuple[int, int, int],
    other_window: Window,
    other_size: tuple[int, int],
    other_numbers: tuple[int, int, int],
) -> None:
    one = convolution(window, size, numbers)
    other = convolution(other_window, other_size, other_numbers)
    assert (one.key == other.key) == (one == other)
