"""The loader and the zoo on real photographs, where CIFAR-10 is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ofa_deploy.dataset import ImageSet, load_images, split_validation
from ofa_deploy.evaluation import Evaluator
from ofa_deploy.pipeline import DEFAULT_SUPERNET
from ofa_deploy.plan import lower
from ofa_deploy.preprocess import measure_normalisation
from ofa_deploy.zoo import open_zoo
from profilers.backends.openvino_cpu import OpenVinoCpu

pytestmark = [pytest.mark.needs_cifar, pytest.mark.slow]

CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# The first ones of each class: the first 1,000 images are all of the first class.
EVALUATED_PER_CLASS = 100
# Several standard errors below what the model card tells.
LEAST_ACCURACY = 0.87


Steps = list[tuple[int, int]]


@pytest.fixture(scope="module")
def loaded(cifar10_dir: Path) -> tuple[ImageSet, Steps]:
    """The training images, and the progress told while they were read."""
    steps: Steps = []
    data, left_out = load_images(
        cifar10_dir / "train.zip", progress=lambda *step: steps.append(step)
    )
    assert left_out == ()
    return data, steps


def assert_whole(data: ImageSet, *, per_class: int) -> None:
    count = per_class * len(CLASS_NAMES)
    assert data.class_names == CLASS_NAMES
    assert data.images.dtype == np.uint8
    assert data.images.shape == (count, 32, 32, 3)
    assert np.bincount(data.labels).tolist() == [per_class] * len(CLASS_NAMES)


def test_the_training_images_are_read_whole_and_are_what_the_zoo_was_trained_on(
    loaded: tuple[ImageSet, Steps],
) -> None:
    data, steps = loaded
    assert_whole(data, per_class=5_000)
    assert steps[-1] == (50_000, 50_000)
    trained_on, here = (
        open_zoo(DEFAULT_SUPERNET).normalisation,
        measure_normalisation(data.images),
    )
    # The zoo's is of the images that were not held out for validation.
    assert here.mean == pytest.approx(trained_on.mean, abs=1)
    assert here.std == pytest.approx(trained_on.std, abs=1)


def test_the_full_network_with_synthetic_calibration_recognises_photographs(
    loaded: tuple[ImageSet, Steps],
) -> None:
    supernet = open_zoo(DEFAULT_SUPERNET)
    assert supernet.calibration is not None
    # What the training held out; the test images are for reported figures alone.
    held_out = split_validation(loaded[0], fraction=0.1)[1]
    first = [
        np.flatnonzero(held_out.labels == label)[:EVALUATED_PER_CLASS]
        for label in range(len(CLASS_NAMES))
    ]
    evaluator = Evaluator(
        supernet,
        data=held_out.take(np.concatenate(first)),
        calibration=supernet.calibration,
        backend=OpenVinoCpu(),
        threads=1,
    )
    plan = lower(supernet.space, supernet.space.largest())
    assert evaluator.accuracy(plan) >= LEAST_ACCURACY
