"""Batch norms of any width are trained as torch trains them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.train.batch_norm import LineAlignedBatchNorm, pixels_per_row

NARROW = (16, 7, 4, 4)


def is_ours(output: Tensor) -> bool:
    """Whether its backward pass goes by rows of whole lines."""
    return type(output.grad_fn).__name__ == "_BatchNormBackward"


def noise(*shape: int, number_format: torch.dtype = torch.float32) -> Tensor:
    """In channels-last memory, with a mean."""
    x = (2 * torch.randn(shape) + 3).to(number_format)
    return x.contiguous(memory_format=torch.channels_last)


def randomised(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With weights and statistics that no two channels share."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def trained_once(
    norm: nn.BatchNorm2d,
    x: Tensor,
    pulled: Tensor,
    mode: AbstractContextManager[object],
) -> dict[str, Tensor]:
    """Output, gradients and statistics of a step; of a copy."""
    again = nn.BatchNorm2d(
        norm.num_features,
        affine=norm.affine,
        momentum=norm.momentum,
        track_running_stats=norm.track_running_stats,
    ).to(torch.promote_types(x.dtype, torch.float32))
    again.load_state_dict(norm.state_dict())
    inputs = x.clone().requires_grad_()
    with mode:
        output = again(inputs)
    output.backward(pulled)
    assert inputs.grad is not None
    found = {"output": output.detach(), "x": inputs.grad}
    found |= {
        name: parameter.grad
        for name, parameter in again.named_parameters()
        if parameter.grad is not None
    }
    return found | dict(again.named_buffers())


def error(found: Tensor, right: Tensor) -> float:
    """Relative to what is right."""
    return float((found.double() - right.double()).norm() / right.double().norm())


@settings(max_examples=80)
@given(
    channels=st.integers(2, 70),
    count=st.integers(2, 17),
    size=st.sampled_from([2, 4, 7, 8, 12]),
    affine=st.booleans(),
    tracks=st.booleans(),
    momentum=st.sampled_from([0.0, 0.1, None]),
    bf16=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_step_is_that_of_torch(
    channels: int,
    count: int,
    size: int,
    affine: bool,
    tracks: bool,
    momentum: float | None,
    bf16: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    number_format = torch.bfloat16 if bf16 else torch.float32
    x = noise(count, channels, size, size, number_format=number_format)
    pulled = (torch.randn(x.shape) + 0.2 * x).to(number_format)
    norm = nn.BatchNorm2d(
        channels, affine=affine, momentum=momentum, track_running_stats=tracks
    )
    randomised(norm)
    right = trained_once(norm, x.double(), pulled.double(), nullcontext())
    theirs = trained_once(norm, x, pulled, nullcontext())
    ours = trained_once(norm, x, pulled, LineAlignedBatchNorm())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        # Roundings to eight bits: of offset, slope, their sum, and torch's own.
        most = 4 * error(theirs[name], right[name]) + 1e-5
        assert error(value, right[name]) <= most, name


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("number_format", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [7, 8, 24, 45])
def test_pixels_that_are_no_whole_lines_are_put_together(
    channels: int, number_format: torch.dtype, affine: bool
) -> None:
    assert channels * pixels_per_row(channels) % 16 == 0
    x = noise(16, channels, 4, 4, number_format=number_format).requires_grad_()
    with LineAlignedBatchNorm():
        assert is_ours(nn.BatchNorm2d(channels, affine=affine)(x))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(noise(16, 32, 4, 4), id="whole lines"),
        pytest.param(noise(*NARROW).contiguous(), id="a channel at a time"),
        pytest.param(noise(19, 7, 5, 5), id="475 pixels are no rows of 16"),
        pytest.param(noise(2, 7, 4, 4), id="two rows"),
        pytest.param(noise(*NARROW, number_format=torch.float64), id="float64"),
    ],
)
def test_all_else_is_left_to_torch(x: Tensor) -> None:
    norm = nn.BatchNorm2d(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    with LineAlignedBatchNorm():
        assert not is_ours(norm(x.requires_grad_()))


def test_what_is_evaluated_is_left_to_torch() -> None:
    with LineAlignedBatchNorm():
        assert not is_ours(nn.BatchNorm2d(7).eval()(noise(*NARROW).requires_grad_()))


def test_statistics_in_bfloat16_are_left_to_torch() -> None:
    norm = nn.BatchNorm2d(7, affine=False).bfloat16()
    x = noise(*NARROW, number_format=torch.bfloat16).requires_grad_()
    with LineAlignedBatchNorm():
        assert not is_ours(norm(x))


def test_what_torch_refuses_is_refused() -> None:
    x = noise(*NARROW)
    with LineAlignedBatchNorm():
        with pytest.raises(RuntimeError, match="7 elements"):
            F.batch_norm(x, None, None, weight=torch.ones(5), training=True)
        with pytest.raises(ValueError, match="eps"):
            F.batch_norm(x, None, None, training=True, eps=0.0)


def test_layers_that_follow_may_write_into_it() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 7, 3), randomised(nn.BatchNorm2d(7))
    net = nn.Sequential(conv, norm)
    x = noise(16, 3, 6, 6)

    def gradients(mode: AbstractContextManager[object]) -> list[Tensor]:
        net.zero_grad()
        with mode:
            y = net(x)
            y += 1.0
            F.relu(y, inplace=True)
        y.square().sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    with LineAlignedBatchNorm():
        assert is_ours(net(x))
    ours = gradients(LineAlignedBatchNorm())
    theirs = gradients(nullcontext())
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def test_frozen_weights_and_gradients_of_one_number_are_as_with_torch() -> None:
    norm = randomised(nn.BatchNorm2d(7)).requires_grad_(requires_grad=False)
    x = noise(*NARROW).requires_grad_()
    with LineAlignedBatchNorm():
        output = norm(x)
    # Expanded: every element is the same place in memory.
    output.sum().backward()
    assert is_ours(output)
    assert norm.weight.grad is None
    assert x.grad is not None
    # A constant is what a batch norm takes away.
    assert float(x.grad.abs().max()) < 1e-5


def test_a_second_derivative_is_refused() -> None:
    x = noise(*NARROW).requires_grad_()
    with LineAlignedBatchNorm():
        output = nn.BatchNorm2d(7)(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]
