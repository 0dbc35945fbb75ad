"""How good a narrowed network is, before anybody has fine-tuned it.

Two cores cannot fine-tune hundreds of candidates. LeGR's own table for CIFAR-10 ranks
them without a step of it; re-estimating batch norms' statistics, which the missing
channels have shifted, costs one pass over some images.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ofa_deploy.batches import evaluation_batch
from ofa_deploy.dataset import ImageSet
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.train.augment import network_input
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.logits import called_as_in_training
from ofa_deploy.train.views import ViewsInAnyOrder
from profilers.files import write_atomically

# Of the steps that tune a candidate.
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
# Candidates of one budget differ by some percent of their loss; below this many images
# a loss is not known much better.
FEW_IMAGES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateImages:
    """Images for candidates, as files that every process can map.

    Args:
        folder: Of the arrays.
        resolution: Height and width of the inputs.
        normalisation: Of the inputs.
    """

    folder: Path
    resolution: int
    normalisation: Normalisation

    @classmethod
    def written(
        cls,
        images: TrainingImages,
        *,
        held_out: ImageSet,
        resolution: int,
        training_count: int,
        validation_count: int,
        folder: Path,
        tuning_count: int = 0,
    ) -> CandidateImages:
        """Some training images and some others, evenly over the classes.

        Args:
            images: To take them from.
            held_out: To measure the loss on.
            resolution: Height and width of the inputs.
            training_count: To re-estimate statistics on; at most.
            validation_count: Of those that are held out; at most.
            folder: Gets the files.
            tuning_count: To tune on, where that is done; at most.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            "training": (images.training, training_count),
            "validation": (held_out, validation_count),
        }
        if tuning_count:
            parts["tuning"] = (images.training, tuning_count)
        for name, (part, count) in parts.items():
            picked = np.linspace(0, len(part) - 1, min(count, len(part)))
            index = np.random.default_rng(0).permutation(picked.astype(np.int64))
            pixels = np.ascontiguousarray(part.images[index].transpose(0, 3, 1, 2))
            _save(_images_file(folder, name), pixels)
            _save(folder / f"{name}_labels.npy", part.labels[index])
        return cls(
            folder=folder, resolution=resolution, normalisation=images.normalisation
        )

    @property
    def sha256(self) -> str:
        """Of all images and labels, and of how networks see them."""
        digest = hashlib.sha256(f"{self.resolution} {self.normalisation}".encode())
        for part in ("training", "validation", "tuning"):
            if _images_file(self.folder, part).exists():
                for array in _loaded(self.folder, part):
                    digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def count(self, part: str) -> int:
        """Images of `training`, `validation` or `tuning`."""
        return len(_loaded(self.folder, part)[1])

    def batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of a part, one batch at a time."""
        images, labels = _loaded(self.folder, part)
        # Of equal size: statistics are the mean of batches'.
        count = -(-len(labels) // evaluation_batch(self.resolution))
        places = np.linspace(0, len(labels), count + 1).astype(int)
        for start, end in itertools.pairwise(places):
            inputs = network_input(
                torch.from_numpy(images[start:end].copy()),
                resolution=self.resolution,
                normalisation=self.normalisation,
            )
            yield inputs, torch.from_numpy(labels[start:end].copy())


def _save(path: Path, array: NDArray[Any]) -> None:
    content = BytesIO()
    np.save(content, array, allow_pickle=False)
    write_atomically(path, content.getvalue())


def _images_file(folder: Path, part: str) -> Path:
    return folder / f"{part}_images.npy"


@lru_cache(maxsize=4)
def _loaded(folder: Path, part: str) -> tuple[NDArray[Any], NDArray[Any]]:
    images = np.load(_images_file(folder, part), mmap_mode="r", allow_pickle=False)
    labels = np.load(folder / f"{part}_labels.npy", mmap_mode="r", allow_pickle=False)
    return images, labels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateJob:
    """A narrowed network to be judged; all that another process needs.

    Args:
        module: Without the removed channels; belongs to whoever runs the job.
        images: To judge it on.
        tuning_steps: Of SGD before it is judged, each of `evaluation_batch` images at
            most, which are not augmented; 0 for none.
        learning_rate: Of these.
        seed: Of what is random in the network itself, such as dropout.
    """

    module: nn.Module
    images: CandidateImages
    tuning_steps: int = 0
    learning_rate: float = 0.01
    seed: int = 0


def validation_loss(job: CandidateJob) -> float:
    """Mean cross-entropy on the held-out images; lower is better."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the others have the other cores
    torch.manual_seed(job.seed)
    module = job.module
    with called_as_in_training(bf16=False):
        _tune(module, job.images, steps=job.tuning_steps, rate=job.learning_rate)
        inputs = (inputs for inputs, _ in job.images.batches("training"))
        update_bn(inputs, _OnlyNormsTrain(module))
        return float(_losses(module, job.images).mean())


class _OnlyNormsTrain(nn.Module):
    """A network whose batch norms alone are trained with it.

    Statistics are of what is deployed: dropout, which all threads of a process would
    draw from one generator, has no say in them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> _OnlyNormsTrain:
        """See `torch.nn.Module`."""
        self.training = mode
        self.network.eval()
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    def forward(self, x: Tensor) -> Any:
        """What the network makes of a batch."""
        return self.network(x)


@torch.no_grad()
def _losses(module: nn.Module, images: CandidateImages) -> Tensor:
    """Cross-entropy of each held-out image."""
    module.eval()
    return torch.cat(
        [
            F.cross_entropy(module(inputs), labels, reduction="none")
            for inputs, labels in images.batches("validation")
        ]
    )


def warn_if_few(network: nn.Module, images: CandidateImages) -> None:
    """Warn where candidates cannot be told apart by so few held-out images.

    Args:
        network: Whole.
        images: To judge candidates on.
    """
    if images.count("validation") >= FEW_IMAGES:
        return
    with ViewsInAnyOrder():
        losses = _losses(copy.deepcopy(network), images)
    error = float(losses.std() / len(losses) ** 0.5)
    warnings.warn(
        f"candidates are ranked on {len(losses)} held-out images, on which the whole "
        f"network's loss of {float(losses.mean()):.4f} has a standard error of "
        f"{error:.4f}: which of two is better is a matter of chance where they differ "
        f"by less. Give {FEW_IMAGES} to rank on: as eval_data=, or more images, as "
        "half of those that are held out rank; recipe.legr.validation_count is the "
        "most",
        stacklevel=2,
    )


def _tune(
    module: nn.Module, images: CandidateImages, *, steps: int, rate: float
) -> None:
    if steps == 0:
        return
    module.train()
    optimizer = torch.optim.SGD(
        module.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    epochs = map(images.batches, itertools.repeat("tuning"))
    batches = itertools.chain.from_iterable(epochs)
    for inputs, labels in itertools.islice(batches, steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(module(inputs), labels))
        optimizer.step()
