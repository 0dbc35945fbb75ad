"""Functions of torch that others stand in for while a network is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Replaced(TorchFunctionMode):
    """While entered, other functions are called in place of torch's.

    Args:
        functions: What is called, by what it stands in for. In there torch's own are
            themselves again.
    """

    def __init__(
        self, functions: Mapping[Callable[..., Any], Callable[..., Any]]
    ) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `torch.overrides`."""
        called = self._functions.get(func, func)
        return called(*args, **(kwargs or {}))


def saves_elsewhere() -> bool:
    """Whether what is saved for the backward pass goes through hooks.

    Those of a checkpoint compute it again, outside of the mode, by torch's functions:
    what those save is not what ours did. There is no public way to ask.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def pair(value: Any) -> tuple[int, int]:
    """Of rows and of columns, as torch takes them: a number, or a row of one or two."""
    if not isinstance(value, Sequence):
        return int(value), int(value)
    first, *rest = value
    return first, rest[0] if rest else first
