"""Convolutions that are computed by other rules than torch's while a network trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from ofa_deploy.train.replaced import Replaced


class ConvolutionCall(NamedTuple):
    """What `torch.nn.functional.conv2d` is called with, by its names."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


# Gives the call's output, or None where it is not for such calls.
ConvolutionRule: TypeAlias = Callable[[ConvolutionCall], Tensor | None]


class ConvolutionsBy(Replaced):
    """While entered, the first rule that is for a convolution computes it.

    Args:
        rules: Each computes what torch does, up to rounding. What none of them is for
            is torch's.
    """

    def __init__(self, *rules: ConvolutionRule) -> None:
        super().__init__({F.conv2d: self._conv2d})
        self._rules = rules

    def _conv2d(self, *args: Any, **kwargs: Any) -> Tensor:
        call = ConvolutionCall(*args, **kwargs)
        for rule in self._rules:
            if (output := rule(call)) is not None:
                return output
        return F.conv2d(*call)
