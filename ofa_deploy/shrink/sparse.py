"""AutoPrune weight by weight: a smaller file, and the same arithmetic.

Source: X. Xiao, Z. Wang, S. Rajasekaran, "AutoPrune: Automatic Network Pruning by
Regularizing Auxiliary Parameters", NeurIPS 2019. Runtimes multiply by zeros like by
anything else: single weights that are gone make a network no faster, and nothing here
says so. What shrinks is what has to be stored or sent.
"""

from __future__ import annotations

import copy
import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ofa_deploy.errors import SpaceError, TraceError, TrainingError
from ofa_deploy.shrink.autoprune import AutoPrune, Deciding
from ofa_deploy.shrink.masks import (
    INITIAL_LATENT,
    THRESHOLD,
    Estimator,
    estimated_slope,
)
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LoopProgress, NoRegulariser, TrainingLoop
from ofa_deploy.train.precision import prefers_bf16
from ofa_deploy.train.recipe import Recipe

BYTES_PER_WEIGHT = 4


class _IndicatedWeight(torch.autograd.Function):
    """Weights times the step of their auxiliary parameters, by the sign rule."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, latent: Tensor, estimator: Estimator
    ) -> Tensor:
        """The weights that are kept, and zeros."""
        ctx.save_for_backward(weight, latent)
        ctx.estimator = estimator
        return weight * (latent > THRESHOLD)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of kept weights as usual; of parameters by the weights' signs."""
        weight, latent = ctx.saved_tensors
        (gradient,) = gradients
        # A weight of exactly zero has a sign, too: else it would never move.
        signed = torch.where(weight < 0, -gradient, gradient)
        slope = estimated_slope(latent - THRESHOLD, ctx.estimator)
        return gradient * (latent > THRESHOLD), signed * slope, None


def indicated(weight: Tensor, latent: Tensor, *, estimator: Estimator) -> Tensor:
    """`weight * (latent > threshold)`, with AutoPrune's gradients."""
    result = _IndicatedWeight.apply(  # type: ignore[no-untyped-call]
        weight, latent, estimator
    )
    assert isinstance(result, Tensor)
    return result


class WeightMask(nn.Module):
    """A parametrization: which weights of a layer are kept.

    Args:
        weight: Of the layer.
        estimator: Of the gradient.
    """

    def __init__(self, weight: Tensor, *, estimator: Estimator) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.full_like(weight, INITIAL_LATENT))
        self._estimator: Estimator = estimator

    def forward(self, weight: Tensor) -> Tensor:
        """The weights that are kept, and zeros."""
        return indicated(weight, self.latent, estimator=self._estimator)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsitySettings:
    """How many weights are to stay, and how hard that is pulled at.

    Args:
        target_share: Weights that stay, of those of convolutions and linear layers;
            in (0, 1].
        latent_rate: Learning rate of the auxiliary parameters.
        momentum: Of their optimiser.
        strength: Of the pull towards the share, while it is above.
        weight_decay: Of weights that are kept; others keep their values.
        deciding_share: Of the training images, on which auxiliary parameters are
            trained and weights are not.
        estimator: Of the gradient.
    """

    target_share: float
    latent_rate: float = 0.02
    momentum: float = 0.9
    strength: float = 1.0
    weight_decay: float = 5e-4
    deciding_share: float = 0.2
    estimator: Estimator = "softplus"

    def __post_init__(self) -> None:
        if not 0 < self.target_share <= 1:
            raise SpaceError(
                f"target share {self.target_share:g} of the weights; give a number "
                "above 0 and at most 1"
            )


class SparsityPull:
    """The pull of the number of weights on their auxiliary parameters.

    Args:
        network: Whose weights; its convolutions and linear layers get masks, in place.
        settings: How.

    Raises:
        TraceError: It has no such layers.
    """

    def __init__(self, network: nn.Module, *, settings: SparsitySettings) -> None:
        self.settings, self.module = settings, network
        self.masks: dict[str, WeightMask] = {}
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                mask = WeightMask(layer.weight.detach(), estimator=settings.estimator)
                parametrize.register_parametrization(layer, "weight", mask)
                self.masks[name] = mask
        if not self.masks:
            raise TraceError(
                f"{type(network).__name__} has no convolution and no linear layer"
            )
        self._all = sum(mask.latent.numel() for mask in self.masks.values())

    @property
    def latents(self) -> list[nn.Parameter]:
        """Auxiliary parameters of all layers."""
        return [mask.latent for mask in self.masks.values()]

    @property
    def latent_rate(self) -> float:
        """Of their optimiser."""
        return self.settings.latent_rate

    @property
    def momentum(self) -> float:
        """Of their optimiser."""
        return self.settings.momentum

    def flags(self) -> Tensor:
        """Of all weights, one after the other, whether they are kept."""
        return torch.cat([(p.detach() > THRESHOLD).flatten() for p in self.latents])

    def current_share(self) -> float:
        """Weights that are kept, of all."""
        return float(self.flags().float().mean())

    def loss(self) -> Tensor:
        """While too many weights are kept: `strength · mean of the steps`."""
        if self.current_share() <= self.settings.target_share:
            return torch.zeros(())
        kept = [
            indicated(torch.ones_like(p), p, estimator=self.settings.estimator).sum()
            for p in self.latents
        ]
        return self.settings.strength * torch.stack(kept).sum() / self._all

    def weights_loss(self) -> Tensor:
        """Weight decay of the weights that are kept."""
        squares = []
        for name in self.masks:
            weight = self.module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            squares.append(weight.square().sum())
        return 0.5 * self.settings.weight_decay * torch.stack(squares).sum()

    def after_step(self) -> None:
        """Nothing: a single weight is no layer that could collapse."""

    def facts(self) -> dict[str, object]:
        """Share of weights that are kept."""
        return {"kept_share": round(self.current_share(), 5)}

    def kept(self) -> Mapping[str, tuple[int, int]]:
        """Weights kept, and all weights, of each layer."""
        return {
            name: (int((mask.latent.detach() > THRESHOLD).sum()), mask.latent.numel())
            for name, mask in self.masks.items()
        }

    def remarks(self) -> tuple[str, ...]:
        """None."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """The target, to tell another search by."""
        share = torch.tensor(self.settings.target_share, dtype=torch.float64)
        return {"target_share": share}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Refuse another search."""
        if float(state.get("target_share", -1.0)) != self.settings.target_share:
            raise TrainingError(
                "the search that is to be continued had another target; name another "
                "folder"
            )

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep exactly the target's share: the weights with the largest parameters."""
        values = torch.cat([p.flatten() for p in self.latents])
        count = max(1, round(self.settings.target_share * self._all))
        least = values.kthvalue(self._all - count + 1).values
        for latent in self.latents:
            latent.copy_((latent >= least).to(latent.dtype) * INITIAL_LATENT)
            latent.requires_grad_(False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseNetwork:
    """A network most of whose weights are zero.

    Args:
        module: Ordinary layers, with the zeros in them.
        accuracy: On the held-out images, 0..1.
        weight_count: Weights of convolutions and linear layers.
        nonzero_count: Of these, not zero.
        compressed_bytes: What they take, stored by place and value; see
            `compressed_bytes`. It says nothing of speed.
    """

    module: nn.Module
    accuracy: float
    weight_count: int
    nonzero_count: int
    compressed_bytes: int


def prune_weights(
    model: nn.Module,
    *,
    resolution: int,
    images: TrainingImages,
    settings: SparsitySettings,
    search: Recipe,
    finetune: Recipe,
    folder: Path | None,
    told: Callable[[str, LoopProgress], None] = lambda stage, progress: None,
) -> SparseNetwork:
    """Search which weights stay, then train these alone.

    Args:
        model: Trained; not changed.
        resolution: Height and width of its inputs.
        images: To train on.
        settings: How many are to stay.
        search: Of one phase: weights and auxiliary parameters together.
        finetune: Of one phase: what is left.
        folder: Keeps both, which are continued; None to keep nothing.
        told: Of progress.

    Raises:
        TraceError: The network has no weights that could go.
        TrainingError: A loss is no number, or the folder holds another run.
    """
    network = copy.deepcopy(model)
    pull = SparsityPull(network, settings=settings)
    of_weights, of_masks = images.for_recipe(search).parted(settings.deciding_share)
    deciding = Deciding(
        images=of_masks,
        resolution=resolution,
        label_smoothing=search.label_smoothing,
        bf16=prefers_bf16(),
    )
    TrainingLoop(
        network,
        images=of_weights,
        recipe=search,
        resolution=resolution,
        folder=None if folder is None else folder / "search",
        bf16=prefers_bf16(),
        regulariser=AutoPrune(pull, deciding=deciding),
    ).run(lambda progress: told("searching weights", progress))
    pull.freeze()
    accuracy = TrainingLoop(
        network,
        images=images.for_recipe(finetune),
        recipe=finetune,
        resolution=resolution,
        folder=None if folder is None else folder / "finetune",
        bf16=prefers_bf16(),
        regulariser=_KeptDecay(pull),
    ).run(lambda progress: told("fine-tuning", progress))
    for name in pull.masks:
        layer = network.get_submodule(name)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    weights = [
        layer.weight.detach().float().numpy()
        for name in pull.masks
        if isinstance(layer := network.get_submodule(name), nn.Conv2d | nn.Linear)
    ]
    return SparseNetwork(
        module=network.eval(),
        accuracy=accuracy,
        weight_count=sum(weight.size for weight in weights),
        nonzero_count=sum(int(np.count_nonzero(weight)) for weight in weights),
        compressed_bytes=sum(compressed_bytes(weight) for weight in weights),
    )


class _KeptDecay(NoRegulariser):
    """Weight decay of the weights that are kept, and nothing else."""

    def __init__(self, pull: SparsityPull) -> None:
        self._pull = pull

    def loss(self) -> Tensor:
        """See `Regulariser`."""
        return self._pull.weights_loss()


def compressed_bytes(weight: np.ndarray[Any, np.dtype[np.float32]]) -> int:
    """Bytes of a layer's weights, stored by place and value.

    A bit for each place, compressed by LZMA, and the values that are not zero, in
    float32.
    """
    places = np.packbits(weight.ravel() != 0).tobytes()
    return len(lzma.compress(places)) + BYTES_PER_WEIGHT * int(np.count_nonzero(weight))
