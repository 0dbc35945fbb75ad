"""Training and validation images as torch batches; every batch depends on its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ofa_deploy.batches import evaluation_batch, in_batches
from ofa_deploy.dataset import ImageSet, split_validation
from ofa_deploy.errors import TrainingError
from ofa_deploy.preprocess import Normalisation, measure_normalisation
from ofa_deploy.train.augment import crop_and_flip, cut_and_mix, distort, network_input
from ofa_deploy.train.recipe import Recipe


class TrainingImages:
    """A data set, split as a recipe says.

    Args:
        data: All images; the recipe's share of them is held out.
        recipe: Batch size, padding, validation share and seed.
        normalisation: Of the network's inputs; None measures the training images.
    """

    def __init__(
        self,
        data: ImageSet,
        recipe: Recipe,
        *,
        normalisation: Normalisation | None = None,
    ) -> None:
        self.training, self.validation = split_validation(
            data, fraction=recipe.validation_fraction
        )
        height, width = self.training.images.shape[1:3]
        if min(height, width) <= recipe.crop_padding:
            raise TrainingError(
                f"images of {width}×{height} pixels cannot be shifted by "
                f"{recipe.crop_padding}; give larger ones"
            )
        self._require_batch(recipe)
        self.normalisation: Normalisation = normalisation or measure_normalisation(
            self.training.images
        )
        self.sha256 = data.sha256
        self._recipe = recipe
        # Of parts whose order is to be another one: what their seeds end with.
        self._stream: tuple[int, ...] = ()

    def for_recipe(self, recipe: Recipe) -> TrainingImages:
        """The same images, augmented and batched as another recipe says.

        Raises:
            TrainingError: It holds out another share of them, or its batches are larger
                than what is left.
        """
        self._require_batch(recipe)
        if recipe.validation_fraction != self._recipe.validation_fraction:
            raise TrainingError(
                f"validation_fraction={recipe.validation_fraction} after "
                f"{self._recipe.validation_fraction}; trainings of one network hold "
                "out the same images"
            )
        other = copy.copy(self)
        other._recipe = recipe
        return other

    def _require_batch(self, recipe: Recipe) -> None:
        side = min(self.training.images.shape[1:3])
        if recipe.crop_padding >= side:
            raise TrainingError(
                f"crop_padding={recipe.crop_padding} for images of {side} pixels; give "
                "less than that"
            )
        if len(self.training) < recipe.batch_size:
            raise TrainingError(
                f"{len(self.training)} images to train on are fewer than one batch of "
                f"{recipe.batch_size}; give more images, a smaller batch_size, or "
                "another share where they are parted"
            )

    @property
    def seed(self) -> int:
        """Of everything random about their order."""
        return self._recipe.seed

    def parted(
        self, share: float, *, setting: str = "recipe.deciding_share"
    ) -> tuple[TrainingImages, TrainingImages]:
        """The training images in two parts; both keep those that are held out.

        Their batches are drawn apart: parts of equal size, whose images are sorted by
        class, would show the same classes at every step. Others have orders of their
        own by their size.

        Args:
            share: Of the second part, of each class; 0..1.
            setting: That says so, for people.

        Raises:
            DataError: A class has too few images to be in both.
            TrainingError: A part has less than one batch.
        """
        first, second = split_validation(
            self.training, fraction=share, purpose=f"by {setting}"
        )
        stream = (1,) if len(first) == len(second) else ()
        return self._with(first), self._with(second, stream=stream)

    def _with(
        self, training: ImageSet, *, stream: tuple[int, ...] = ()
    ) -> TrainingImages:
        other = copy.copy(self)
        other.training = training
        other._stream = stream
        other._require_batch(self._recipe)
        return other

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass."""
        return len(self.training) // self._recipe.batch_size

    def batch(
        self, phase: int, step: int, *, resolution: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """The augmented inputs of a step, and their class probabilities.

        Args:
            phase: Index of the phase; it and the epoch fix the order of the images.
            step: Of the phase.
            resolution: Height and width of the inputs.
            rng: Source of crops, flips and mixtures.
        """
        epoch, place = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng(
            [self._recipe.seed, phase, epoch, len(self.training), *self._stream]
        ).permutation(len(self.training))
        size = self._recipe.batch_size
        images, labels = _tensors(
            self.training, order[place * size : (place + 1) * size]
        )
        images = crop_and_flip(images, padding=self._recipe.crop_padding, rng=rng)
        targets = F.one_hot(labels, len(self.training.class_names)).float()
        changes = self._recipe.phases[phase]
        if changes.distortion:
            images = distort(images, strength=changes.distortion, rng=rng)
        if rng.random() < changes.cutmix_share:
            images, targets = cut_and_mix(images, targets, rng=rng)
        inputs = network_input(
            images, resolution=resolution, normalisation=self.normalisation
        )
        return inputs, targets

    def plain_batches(
        self, data: ImageSet, *, resolution: int, most: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `most` images of a part, not augmented, with their labels."""
        # Evenly spaced, so that every class is in it however the set is ordered.
        picked = np.linspace(0, len(data) - 1, min(most, len(data))).astype(np.int64)
        picked = np.random.default_rng(0).permutation(picked)
        for part in in_batches(len(picked), evaluation_batch(resolution)):
            images, labels = _tensors(data, picked[part])
            inputs = network_input(
                images, resolution=resolution, normalisation=self.normalisation
            )
            yield inputs, labels


def _tensors(data: ImageSet, index: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Images `(N, 3, H, W)` and labels of these; the whole set is not held twice."""
    pixels = np.ascontiguousarray(data.images[index].transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels), torch.from_numpy(data.labels[index])
