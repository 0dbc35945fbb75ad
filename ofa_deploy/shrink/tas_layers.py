"""Layers whose width and depth are drawn from distributions that are learned.

Source: X. Dong, Y. Yang, "Network Pruning via Transformable Architecture Search",
NeurIPS 2019, and its code. Everything keeps the whole network's shape: channels beyond
the drawn width are zero, so that sums of different widths add their first channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError
from ofa_deploy.nn.stand_in import StandIn

# Widths are these tenths of a layer's own, rounded down.
TENTHS = range(3, 11)
# Candidates drawn at a time.
DRAWN = 2
# So that what has no chance can still be drawn as the second one.
LEAST_CHANCE = 1e-7
INITIAL_SPREAD = 0.01


def width_choices(channels: int, *, step: int = 1) -> tuple[int, ...]:
    """Widths to choose from, ascending, the whole one last.

    Args:
        channels: Of the whole layer.
        step: Widths are multiples of this, or all that there are.

    Raises:
        SpaceError: There is but one.
    """
    tenths = [max(1, channels * tenth // 10) for tenth in TENTHS]
    aligned = {min(channels, -(-width // step) * step) for width in tenths}
    if len(aligned) < DRAWN:
        raise SpaceError(
            f"{channels} channels in steps of {step} leave but one width to choose; "
            "search networks whose layers have more, or smaller steps"
        )
    return tuple(sorted(aligned))


def depth_choices(blocks: int) -> tuple[int, ...]:
    """Depths to choose from, ascending: every other one of more than three."""
    if blocks <= 3:
        return tuple(range(1, blocks + 1))
    return tuple(sorted({*range(1, blocks + 1, 2), blocks}))


def temperature(
    done: float, *, highest: float, lowest: float, falls: str = "cosine"
) -> float:
    """Of the distributions, as the search goes on.

    Args:
        done: Share of the search that is done, 0..1.
        highest: At the beginning.
        lowest: At the end.
        falls: `cosine`, as in the method's code (5 to 0.1), or `linear`, as in its
            text (10 to 0.1).
    """
    if falls == "linear":
        return highest + (lowest - highest) * done
    cosine = float(torch.cos(torch.tensor(torch.pi * done)))
    return lowest + (highest - lowest) * (1 + cosine) / 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """Choices drawn from a distribution.

    Args:
        indices: Of the choices.
        weights: How much each counts, positive, of sum 1; differentiable.
    """

    indices: tuple[int, ...]
    weights: Tensor


class Distribution(nn.Module):
    """Of one layer's width, or one stage's depth.

    Args:
        choices: What there is to choose from, ascending.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        super().__init__()
        self.choices = tuple(choices)
        self.logits = nn.Parameter(INITIAL_SPREAD * torch.randn(len(self.choices)))
        # Of this pass through the network; all layers of a group share it.
        self.drawn: Draw | None = None

    @classmethod
    def settled(cls, choice: int) -> Distribution:
        """Of one choice, which is drawn."""
        found = cls((choice,))
        found.settle(choice)
        return found

    @property
    def probabilities(self) -> Tensor:
        """Of the choices; differentiable."""
        return self.logits.softmax(0)

    @property
    def widest_drawn(self) -> int:
        """The largest choice of this pass."""
        assert self.drawn is not None
        return max(self.choices[index] for index in self.drawn.indices)

    @property
    def likeliest(self) -> int:
        """The choice of the highest probability."""
        return self.choices[int(self.logits.detach().argmax())]

    def prefer(self, choice: int) -> None:
        """Let one choice be the likeliest, by far."""
        certain = [50.0 * (one == choice) for one in self.choices]
        self.logits.data = torch.tensor(certain)

    def draw(self, tau: float) -> None:
        """Draw two choices for the passes that come."""
        self.drawn = drawn_pair(self.logits, tau=tau)

    def draw_all(self, tau: float) -> None:
        """Draw all choices, with weights, for the passes that come."""
        weights = (_gumbel(self.logits) / tau).softmax(0)
        self.drawn = Draw(indices=tuple(range(len(self.choices))), weights=weights)

    def settle(self, choice: int) -> None:
        """Let one choice be drawn with certainty."""
        index = self.choices.index(choice)
        self.drawn = Draw(indices=(index,), weights=torch.ones(1))


def drawn_pair(logits: Tensor, *, tau: float) -> Draw:
    """Two distinct choices by their Gumbel-softmax probabilities.

    Args:
        logits: `(choices,)`.
        tau: Temperature, above 0.
    """
    heights = _gumbel(logits) / tau
    chances = heights.detach().softmax(0) + LEAST_CHANCE
    picked = torch.multinomial(chances, DRAWN)
    return Draw(
        indices=tuple(int(index) for index in picked),
        weights=heights[picked].softmax(0),
    )


def _gumbel(logits: Tensor) -> Tensor:
    """Log-probabilities with Gumbel noise."""
    noise = -torch.empty_like(logits).exponential_().log()
    while not torch.isfinite(noise).all():
        noise = -torch.empty_like(logits).exponential_().log()
    return logits.log_softmax(0) + noise


def interpolation_matrix(channels: int, out: int) -> Tensor:
    """What makes `out` channels of `channels`, `(out, channels)`.

    Each is the mean of those in its stretch: adaptive average pooling over channels.
    """
    rows, columns = torch.arange(out)[:, None], torch.arange(channels)
    first, end = rows * channels // out, -(-(rows + 1) * channels // out)
    return ((first <= columns) & (columns < end)) / (end - first)


def interpolate_channels(x: Tensor, out: int) -> Tensor:
    """Interpolation of `(N, channels)`, or `(N, channels, H, W)`, to `out` channels."""
    channels = x.shape[1]
    if channels == out:
        return x
    return _through(x, interpolation_matrix(channels, out).to(x.dtype))


def _through(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matrix of channels times `(N, channels)`, or `(N, channels, H, W)`."""
    if x.ndim == 2:
        return F.linear(x, matrix, bias)
    return F.conv2d(x, matrix[:, :, None, None], bias)


def padded_channels(x: Tensor, channels: int) -> Tensor:
    """Zeros for the channels that are missing."""
    missing = channels - x.shape[1]
    if not missing:
        return x
    return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, missing))


def padded_matrix(values: Tensor, size: int) -> Tensor:
    """Zeros for the rows and columns that are missing."""
    missing = [(0, size - count) for count in reversed(values.shape)]
    return F.pad(values, [one for pair in missing for one in pair])


class SearchedNorm(nn.Module):
    """A batch norm for each width of the layer before it.

    Args:
        norm: Of the whole layer; None where it has none, and widths alone are mixed.
        width: The distribution of its width.
    """

    def __init__(self, norm: nn.BatchNorm2d | None, width: Distribution) -> None:
        super().__init__()
        self.channels = width.choices[-1]
        self.norms = nn.ModuleList(
            nn.Identity() if norm is None else _norm_like(norm, choice)
            for choice in width.choices
        )
        self._width = (width,)  # belongs to the network

    @property
    def width(self) -> Distribution:
        """The distribution of its width."""
        return self._width[0]

    def forward(self, input: Tensor) -> Tensor:
        """Mix the drawn widths of `(N, channels, …)`; zeros beyond the widest."""
        drawn = self.width.drawn
        assert drawn is not None
        norms = [self.norms[index] for index in drawn.indices]
        plain = [norm for norm in norms if _only_norms(norm)]
        if len(plain) == len(norms):
            return self._normed_once(input, drawn, plain)
        widest = self.width.widest_drawn
        choices = [self.width.choices[index] for index in drawn.indices]
        total: Tensor | None = None
        for place, (norm, count) in enumerate(zip(norms, choices, strict=True)):
            normed = norm(input[:, :count])
            mixed = interpolate_channels(normed, widest) * drawn.weights[place]
            total = mixed if total is None else total + mixed
        assert total is not None
        return padded_channels(total, self.channels)

    def _normed_once(
        self, x: Tensor, drawn: Draw, norms: Sequence[nn.BatchNorm2d]
    ) -> Tensor:
        """The same mixture in fewer passes over the pixels: memory is what bounds them.

        A width's statistics are the first ones of the whole layer's, and all that
        follows is linear in a pixel's channels: one 1×1 convolution. Of all channels:
        to part the widest from the others takes longer than to multiply with zeros.
        """
        sums_type = torch.promote_types(x.dtype, torch.float32)
        mean, variance = x.new_zeros((2, self.channels), dtype=sums_type)
        normed = F.batch_norm(
            x, mean, variance, training=True, momentum=1.0, eps=norms[0].eps
        )
        matrix = mean.new_zeros((self.channels, self.channels))
        bias = mean.new_zeros(self.channels)
        for norm, weight in zip(norms, drawn.weights, strict=True):
            count = norm.num_features
            _note_statistics(norm, mean[:count], variance[:count])
            stretch = interpolation_matrix(count, self.width.widest_drawn).to(mean)
            stretch = stretch * weight
            if norm.bias is not None:
                bias = bias + padded_matrix((stretch * norm.bias).sum(1), self.channels)
            if norm.weight is not None:
                stretch = stretch * norm.weight
            matrix = matrix + padded_matrix(stretch, self.channels)
        return _through(normed, matrix.to(x.dtype), bias.to(x.dtype))


def _only_norms(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it norms by this batch, and its call does nothing besides."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return (
        type(module) is nn.BatchNorm2d
        and module.training
        and not any(hooks)
        and "forward" not in vars(module)
    )


def _note_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """As the norm does itself of a batch with these; the variance is the unbiased."""
    counter = norm.num_batches_tracked
    if not norm.track_running_stats or norm.running_mean is None:
        return
    if counter is not None:
        counter.add_(1)
    momentum = norm.momentum
    if momentum is None:  # of all batches
        momentum = 0.0 if counter is None else 1 / int(counter)
    assert norm.running_var is not None
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance, momentum)


def _norm_like(norm: nn.BatchNorm2d, channels: int) -> nn.BatchNorm2d:
    """It for the first channels, as they are, and whatever a subclass does besides."""
    like = copy.deepcopy(norm)
    like.num_features = channels
    for name, parameter in norm.named_parameters(recurse=False):
        first = parameter.detach()[:channels].clone()
        like.register_parameter(name, nn.Parameter(first))
    for name, buffer in norm.named_buffers(recurse=False):
        first = buffer[:channels] if buffer.ndim else buffer
        kept = name not in norm._non_persistent_buffers_set
        like.register_buffer(name, first.clone(), persistent=kept)
    return like


class SearchedOutput(StandIn):
    """A layer without a norm, whose output is mixed as it is.

    Args:
        layer: The layer.
        width: The distribution of its width.
    """

    def __init__(self, layer: nn.Module, width: Distribution) -> None:
        super().__init__(layer)
        self.mixed = SearchedNorm(None, width)

    def forward(self, input: Tensor) -> Tensor:
        """See `SearchedNorm`."""
        result = self.mixed(self.layer(input))
        assert isinstance(result, Tensor)
        return result


class SearchedStage(nn.Module):
    """Blocks of one shape in sequence, of which the first few are kept.

    Args:
        blocks: In order; the first may change the shape.
        depth: The distribution of their number.
        written: Distributions of widths whose channels are in each block's output; none
            where that is as wide whatever is drawn.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        depth: Distribution,
        written: Sequence[Sequence[Distribution]],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._depth, self._written = (depth,), tuple(tuple(one) for one in written)

    @property
    def depth(self) -> Distribution:
        """The distribution of the number of blocks."""
        return self._depth[0]

    def forward(self, x: Tensor) -> Tensor:
        """Mix what the drawn depths give, of which each is as wide as the widest."""
        drawn = self.depth.drawn
        assert drawn is not None
        weights = {
            self.depth.choices[index]: weight
            for index, weight in zip(drawn.indices, drawn.weights, strict=True)
        }
        widths = {
            count: max(
                (one.widest_drawn for one in self._written[count - 1]), default=0
            )
            for count in weights
        }
        widest = max(widths.values())
        total: Tensor | None = None
        for count, block in enumerate(self.blocks, start=1):
            if count > max(weights):
                break
            x = block(x)
            if count in weights:
                mixed = _stretched(x, widths[count], widest, times=weights[count])
                total = mixed if total is None else total + mixed
                if count < max(weights):
                    x = x.clone()  # the next one may write into what was just mixed
        assert total is not None
        return total


def _stretched(x: Tensor, width: int, out: int, *, times: Tensor) -> Tensor:
    """The first channels as more of them, times a factor; zeros stay beyond."""
    if width == out:
        return x * times
    matrix = padded_matrix(interpolation_matrix(width, out) * times, x.shape[1])
    return _through(x, matrix.to(x.dtype))
