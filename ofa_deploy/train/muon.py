"""Muon in float32, for CPUs that have no fast product of bfloat16 matrices.

`torch.optim.Muon` makes updates orthogonal in bfloat16 whatever the CPU. Without
instructions for it torch multiplies in a plain loop, which took most of a training's
time there (measured by `benchmarks/muon.py`).
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
    """The faster one here, with a rate of 1.

    Args:
        matrices: To be stepped.
        momentum: Nesterov's, in [0, 1).
        weight_decay: Decoupled, so times the rate.
    """
    kind = torch.optim.Muon if prefers_bf16() else Float32Muon
    return kind(matrices, lr=1.0, weight_decay=weight_decay, momentum=momentum)


class Float32Muon(torch.optim.Muon):
    """The same steps as `torch.optim.Muon` up to rounding, in the gradients' format.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024. Rates are adjusted as there: by the root of rows over columns, where above 1.
    """

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
    """Singular values near 1 in place of a matrix's own: Newton and Schulz's steps."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
