"""Images of a training: what they hold in memory, and what their batches are."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ofa_deploy.dataset import ImageSet
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.recipe import Phase, Recipe

CLASSES, SIDE = 10, 20
RECIPE = Recipe(
    phases=(Phase(name="only", epochs=1, peak_learning_rate=0.1, distill=False),),
    batch_size=64,
    crop_padding=0,
)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(
        images=rng.integers(0, 256, (4000, SIDE, SIDE, 3), dtype=np.uint8),
        labels=np.arange(4000) % CLASSES,
        class_names=tuple(map(str, range(CLASSES))),
    )


def test_parts_hold_their_images_once(data: ImageSet) -> None:
    whole = data.images.nbytes
    tracemalloc.start()
    images = TrainingImages(data, RECIPE)
    split = tracemalloc.get_traced_memory()[0]
    parts = images.parted(0.5)
    parted = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sum(map(len, (part.training for part in parts))) == len(images.training)
    assert split < 1.1 * whole
    assert parted < 2.1 * whole


def test_parts_of_sorted_images_show_classes_drawn_apart(data: ImageSet) -> None:
    """As folders are sorted; by one order, both would show the same at every step."""
    order = np.argsort(data.labels, kind="stable")
    images = TrainingImages(data.take(order), RECIPE)
    shown = [
        [
            part.batch(0, step, resolution=SIDE, rng=np.random.default_rng(0))[1]
            for step in range(4)
        ]
        for part in images.parted(0.5)
    ]
    for first, second in zip(*shown, strict=True):
        # By chance one in ten is of the same class.
        assert float((first * second).sum(1).mean()) < 0.4


@pytest.mark.parametrize("step", [0, 7])
def test_a_batch_has_its_images_labels_mirrored_or_not(
    data: ImageSet, step: int
) -> None:
    images = TrainingImages(data, RECIPE)
    known = {
        image.tobytes(): int(label)
        for image, label in zip(data.images, data.labels, strict=True)
    }
    inputs, targets = images.batch(
        0, step, resolution=SIDE, rng=np.random.default_rng(0)
    )
    shown = inputs.numpy().transpose(0, 2, 3, 1) * images.normalisation.std
    shown = (shown + images.normalisation.mean).round().astype(np.uint8)
    found = [
        known.get(image.tobytes(), known.get(image[:, ::-1].tobytes()))
        for image in shown
    ]
    assert found == targets.argmax(1).tolist()
    assert set(targets.flatten().tolist()) == {0.0, 1.0}
