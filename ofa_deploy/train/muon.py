"""Muon in float32, for CPUs that have no instructions for bfloat16.

`torch.optim.Muon` makes updates orthogonal in bfloat16 whatever the CPU. Where torch
has no fast product for it (x86 without AVX-512), a plain loop does it: most of a
VGG-like network's training went there (`benchmarks/muon.py` times the steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ofa_deploy.train.precision import prefers_bf16


def new_muon(
    matrices: Iterable[nn.Parameter], *, momentum: float, weight_decay: float
) -> torch.optim.Muon:
    """The one for this CPU, with a rate of 1.

    Args:
        matrices: To be stepped.
        momentum: Nesterov's, in [0, 1).
        weight_decay: Decoupled, so times the rate.
    """
    kind = torch.optim.Muon if prefers_bf16() else Float32Muon
    return kind(matrices, lr=1.0, weight_decay=weight_decay, momentum=momentum)


class Float32Muon(torch.optim.Muon):
    """Steps as `torch.optim.Muon` does by default, in the gradients' number format.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024. Rates are adjusted as there: by the root of rows over columns, where above 1.

    Args:
        matrices: To be stepped.
        lr: The rate.
        momentum: Nesterov's, in [0, 1).
        weight_decay: Decoupled, so times the rate.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_one(matrix, matrix.grad, group)
        return loss

    def _step_one(
        self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        state, momentum, rate = self.state[matrix], group["momentum"], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        update = _orthogonal(
            gradient.lerp(buffer, momentum),
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
        )
        rows, columns = matrix.shape
        matrix.mul_(1 - rate * group["weight_decay"])
        matrix.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def _orthogonal(
    matrix: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Singular values near 1 in place of a matrix's own: Newton and Schulz's steps.

    Each step multiplies by a polynomial in `x @ x.T`. These are multiplied with each
    other first: they are square, and convolutions' matrices several times as wide.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=eps)  # no singular value is above 1
    gram = x @ x.T
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial  # of x after the step
    found: Tensor = product @ x
    return found.T if is_tall else found
