"""What holds of every method that trains its choices on images of their own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ofa_deploy.train.loop import Regulariser, TrainingLoop


def assert_trained_in_turn(
    loop: TrainingLoop, method: Regulariser, choices: Sequence[nn.Parameter]
) -> None:
    """A step of the weights moves no choice, and one of the choices no weight.

    Args:
        loop: Of the weights.
        method: Its regulariser, which steps the choices.
        choices: Parameters of the loop's network.
    """
    ids = {id(choice) for choice in choices}

    def state() -> tuple[list[Tensor], list[Tensor]]:
        parameters = list(loop.network.parameters())
        return (
            [p.detach().clone() for p in parameters if id(p) not in ids],
            [p.detach().clone() for p in parameters if id(p) in ids],
        )

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    weights, before = state()
    assert len(before) == len(choices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "after_step", lambda: None)
        loop._train_step(0)
    stepped, unchanged = state()
    assert same(before, unchanged)
    assert not same(weights, stepped)
    method.after_step()
    after, moved = state()
    assert same(stepped, after)
    assert not same(unchanged, moved)
