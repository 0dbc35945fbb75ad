"""Views of maps that are stored channels-last, which are none in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class ViewsInAnyOrder(TorchFunctionMode):
    """While entered, `x.view(…)` copies what has no such view; `x.view_as(y)`, too.

    Networks train much faster on channels-last maps, and many flatten theirs by
    `x.view(len(x), -1)`, which those do not have.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `torch.overrides`."""
        called: Callable[..., Any] = _INSTEAD.get(func, func)
        return called(*args, **(kwargs or {}))


def _view(x: Tensor, *sizes: Any, **named: Any) -> Tensor:
    try:
        return x.view(*sizes, **named)
    except RuntimeError:
        # Whatever else is wrong with it, torch says so again.
        return x.contiguous().view(*sizes, **named)


def _view_as(x: Tensor, other: Tensor) -> Tensor:
    return _view(x, other.shape)


_INSTEAD: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    Tensor.view: _view,
    Tensor.view_as: _view_as,
}
