"""Views of maps that are stored channels-last, which are none in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ofa_deploy.train.replaced import Replaced


class ViewsInAnyOrder(Replaced):
    """While entered, `x.view(…)` copies what has no such view; `x.view_as(y)`, too.

    Networks train much faster on channels-last maps, and many flatten theirs by
    `x.view(len(x), -1)`, which those do not have.
    """

    def __init__(self) -> None:
        super().__init__({Tensor.view: _view, Tensor.view_as: _view_as})


def _view(x: Tensor, *sizes: Any, **named: Any) -> Tensor:
    try:
        return x.view(*sizes, **named)
    except RuntimeError:
        # Whatever else is wrong with it, torch says so again.
        return x.contiguous().view(*sizes, **named)


def _view_as(x: Tensor, other: Tensor) -> Tensor:
    return _view(x, other.shape)
