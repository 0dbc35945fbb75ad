"""Shrink a network of your own to a latency budget on this machine (needs torch).

    python examples/shrink_your_own.py --out build/shrunk

The network below stands for yours. The command line does the same for one in a file:

    ofa-deploy shrink --model net.py:build --weights net.safetensors --data images/ \
        --latency-ms 0.5 --out bundle
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

import ofa_deploy
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import DeployError
from ofa_deploy.families import repvgg
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.plan import lower
from ofa_deploy.shrink.recipe import default_shrink_recipe
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import TrainingLoop
from ofa_deploy.train.recipe import Phase, Recipe

COLOURS = np.array([(60, 90, 200), (60, 180, 70), (200, 60, 50)])


def coloured_images(count: int = 600, size: int = 16) -> ImageSet:
    """Noisy patches of three colours."""
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % len(COLOURS)
    pixels = COLOURS[labels][:, None, None] + rng.normal(0, 60, (count, size, size, 3))
    images = pixels.clip(0, 255).astype(np.uint8)
    return ImageSet(images=images, labels=labels, class_names=("blue", "green", "red"))


def trained_network(data: ImageSet) -> StaticNet:
    """A small network of branched convolutions."""
    space = replace(repvgg.small(class_count=3), resolutions=(16,))
    network = StaticNet(lower(space, space.smallest()))
    phase = Phase(name="dense", epochs=3, peak_learning_rate=0.05, distill=False)
    recipe = Recipe(phases=(phase,), batch_size=60)
    images = TrainingImages(data, recipe)
    TrainingLoop(
        network, images=images, recipe=recipe, resolution=16, folder=None, bf16=False
    ).run()
    return network


def main() -> None:
    """Train, measure, shrink."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/shrunk"))
    parser.add_argument("--latency-ms", type=float, default=0.1)
    args = parser.parse_args()
    data = coloured_images()
    bundle = ofa_deploy.specialize(
        "onnxruntime-cpu",
        model=trained_network(data),
        method="pas",
        data=data,
        latency_ms=args.latency_ms,
        out=args.out,
        recipe=default_shrink_recipe(search_epochs=4, finetune_epochs=4, batch_size=60),
    )
    measured, accuracy = bundle.manifest.measured, bundle.manifest.accuracy
    print(f"{bundle.path}: {measured.quiet_ms:.3f} ms, accuracy {accuracy.value:.2%}")


if __name__ == "__main__":
    try:
        main()
    except DeployError as error:
        raise SystemExit(str(error)) from error
