"""Batch norms of any width are trained as torch trains them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.train import batch_norm
from ofa_deploy.train.batch_norm import LineAlignedBatchNorm, pixels_per_row


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the backward passes that were ours."""
    widths: list[int] = []
    own = batch_norm.batch_norm_backward

    def noted(
        gradient: Tensor, x: Tensor, **others: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        widths.append(x.shape[1])
        return own(gradient, x, **others)

    monkeypatch.setattr(batch_norm, "batch_norm_backward", noted)
    return widths


def trained_once(
    norm: nn.BatchNorm2d,
    x: Tensor,
    pulled: Tensor,
    mode: AbstractContextManager[object],
) -> dict[str, Tensor]:
    """Output, gradients and statistics of a step."""
    again = nn.BatchNorm2d(
        norm.num_features, affine=norm.affine, momentum=norm.momentum
    ).to(x.dtype if x.dtype == torch.float64 else torch.float32)
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


@settings(max_examples=60)
@given(
    channels=st.integers(1, 70),
    count=st.integers(1, 9),
    size=st.sampled_from([1, 2, 4, 6, 7]),
    affine=st.booleans(),
    momentum=st.sampled_from([0.1, None]),
    bf16=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_step_is_that_of_torch(
    channels: int,
    count: int,
    size: int,
    affine: bool,
    momentum: float | None,
    bf16: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shape = (max(count, 2), channels, size, size)
    number_format = torch.bfloat16 if bf16 else torch.float32
    x = (2 * torch.randn(shape) + 3).to(number_format)
    x = x.contiguous(memory_format=torch.channels_last)
    pulled = (torch.randn(shape) + 0.2 * x).to(number_format)
    norm = nn.BatchNorm2d(channels, affine=affine, momentum=momentum)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    right = trained_once(norm, x.double(), pulled.double(), nullcontext())
    theirs = trained_once(norm, x, pulled, nullcontext())
    ours = trained_once(norm, x, pulled, LineAlignedBatchNorm())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        # Roundings to eight bits: of offset, slope, their sum, and torch's own.
        most = 4 * error(theirs[name], right[name]) + 1e-5
        assert error(value, right[name]) <= most, name


@pytest.mark.parametrize("channels", [7, 8, 24, 45])
def test_rows_that_are_no_whole_lines_are_put_together(
    channels: int, calls: list[int]
) -> None:
    assert channels * pixels_per_row(channels) % 16 == 0
    x = torch.randn(16, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(channels)
    trained_once(norm, x, torch.ones_like(x), LineAlignedBatchNorm())
    assert calls == [channels]


@pytest.mark.parametrize(
    ("channels", "count", "memory_format"),
    [
        (32, 16, torch.channels_last),  # whole lines
        (7, 16, torch.contiguous_format),  # sums are of one channel at a time
        (7, 3, torch.channels_last),  # 27 pixels are no rows of 16
    ],
)
def test_all_else_is_left_to_torch(
    channels: int,
    count: int,
    memory_format: torch.memory_format,
    calls: list[int],
) -> None:
    x = torch.randn(count, channels, 3, 3).contiguous(memory_format=memory_format)
    norm = nn.BatchNorm2d(channels)
    trained_once(norm, x, torch.ones_like(x), LineAlignedBatchNorm())
    assert calls == []


def test_what_is_evaluated_is_left_to_torch(calls: list[int]) -> None:
    norm = nn.BatchNorm2d(7).eval()
    x = torch.randn(16, 7, 4, 4).contiguous(memory_format=torch.channels_last)
    with LineAlignedBatchNorm():
        output = norm(x.requires_grad_())
    output.sum().backward()
    assert calls == []


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(16, 7, 4, 4).contiguous(memory_format=torch.channels_last)
    with LineAlignedBatchNorm():
        output = nn.BatchNorm2d(7)(x.requires_grad_())
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]
