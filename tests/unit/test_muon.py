"""Muon in float32 is torch's without the rounding to bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ofa_deploy.train import muon
from ofa_deploy.train.muon import Float32Muon, new_muon

SHAPES = [(8, 8), (4, 36), (64, 16), (96, 288), (1, 9)]


def stepped(
    kind: type[torch.optim.Muon], matrix: nn.Parameter, *, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What steps by the same random gradients leave of a matrix; and the momentum."""
    mine = copy.deepcopy(matrix)
    optimizer = kind([mine], lr=0.1, momentum=0.9, weight_decay=0.5)
    drawn = torch.Generator().manual_seed(1)
    for _ in range(steps):
        mine.grad = torch.randn(mine.shape, generator=drawn)
        optimizer.step()  # type: ignore[no-untyped-call]
    return mine.detach(), optimizer.state[mine]["momentum_buffer"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 4])
def test_its_steps_are_those_of_torch_without_rounding(
    shape: tuple[int, int], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(shape))
    rounded, _ = stepped(torch.optim.Muon, matrix, steps=steps)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    theirs, their_momentum = stepped(torch.optim.Muon, matrix, steps=steps)
    ours, our_momentum = stepped(Float32Muon, matrix, steps=steps)
    assert not torch.equal(rounded, theirs)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(our_momentum, their_momentum)


def test_in_float64_it_is_exact_where_torch_rounds() -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(16, 32, dtype=torch.float64))
    matrix.grad = torch.randn(16, 32, dtype=torch.float64)
    Float32Muon([matrix], lr=1.0, momentum=0.9, weight_decay=0.0).step()
    left, _, right = torch.linalg.svd(matrix.grad, full_matrices=False)
    inner = left.T @ -matrix.detach() @ right.T
    # Neither singular vector is turned.
    assert torch.allclose(inner, inner.diagonal().diag(), atol=1e-9)
    assert 0.6 < float(inner.diagonal().min()) < float(inner.diagonal().max()) < 1.3


def test_a_matrix_without_a_gradient_stays() -> None:
    still, moved = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moved.grad = torch.eye(4)
    optimizer = Float32Muon([still, moved], lr=0.1, momentum=0.9, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moved, torch.ones(4, 4))
    assert still not in optimizer.state


def test_a_closure_is_called_with_gradients() -> None:
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = Float32Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.0)

    def loss() -> float:
        found = (matrix**2).sum()
        found.backward()  # type: ignore[no-untyped-call]
        return float(found.detach())

    assert optimizer.step(loss) == 4.0
    assert not torch.equal(matrix, torch.ones(2, 2))


@pytest.mark.parametrize("has_bf16", [True, False])
def test_it_is_taken_where_the_cpu_has_no_bf16(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "prefers_bf16", lambda: has_bf16)
    found = new_muon([nn.Parameter(torch.ones(2, 2))], momentum=0.9, weight_decay=0.5)
    assert isinstance(found, Float32Muon) != has_bf16
    (group,) = found.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1.0, 0.9, 0.5)
