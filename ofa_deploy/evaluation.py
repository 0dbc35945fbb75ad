"""Accuracy of sub-networks by running them: recalibrated, on a runtime, no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.batches import evaluation_batch
from ofa_deploy.dataset import ImageSet, Progress
from ofa_deploy.export.onnx import emit_network
from ofa_deploy.fuse import fuse
from ofa_deploy.inference import infer
from ofa_deploy.materialise import Weights, materialise
from ofa_deploy.plan import NetworkPlan
from ofa_deploy.preprocess import PreparedImages, prepare
from ofa_deploy.recalibrate import recalibrate
from ofa_deploy.stored import StoredSupernet
from profilers.backends.base import Backend, Session

# Of prepared inputs; one resolution may have more.
MOST_KEPT_BYTES = 2**31


class Evaluator:
    """Measures accuracies of a supernet's networks on one set of images.

    Prepared inputs are kept per resolution, as far as there is room for them, so that
    hundreds of networks can be evaluated without resizing the images again.

    Args:
        supernet: Whose networks.
        data: Images and labels to judge by.
        calibration: Images for the batch-norm statistics, `(n, H, W, 3)` uint8; None
            for the supernet's shared statistics as they are.
        backend: Runs everything.
        threads: Of the backend.
    """

    def __init__(
        self,
        supernet: StoredSupernet,
        *,
        data: ImageSet,
        calibration: NDArray[np.uint8] | None,
        backend: Backend,
        threads: int,
    ) -> None:
        self._supernet = supernet
        self._data = data
        self._calibration = calibration
        self._backend = backend
        self._threads = threads
        self._prepared: dict[tuple[str, int], NDArray[np.float32]] = {}

    def accuracy(self, plan: NetworkPlan) -> float:
        """Top-1 accuracy, 0..1, of the network with its own statistics."""
        weights: Weights = materialise(self._supernet.weights, plan)
        if self._calibration is not None:
            weights = recalibrate(
                weights,
                plan,
                self._inputs("calibration", self._calibration, plan.resolution),
                backend=self._backend,
                threads=self._threads,
            )
        model = emit_network(plan, fuse(weights, plan), form="fused", batch=None)
        inputs = self._inputs("data", self._data.images, plan.resolution)
        with self._backend.load(model, threads=self._threads) as session:
            return top1_accuracy(
                session,
                inputs,
                self._data.labels,
                batch_size=evaluation_batch(plan.resolution),
            )

    def _inputs(
        self, name: str, images: NDArray[np.uint8], resolution: int
    ) -> NDArray[np.float32]:
        key = (name, resolution)
        if key not in self._prepared:
            self._make_room(4 * len(images) * 3 * resolution**2, keep=resolution)
            self._prepared[key] = prepare(
                images,
                resolution=resolution,
                normalisation=self._supernet.normalisation,
            )
        self._prepared[key] = self._prepared.pop(key)  # used last
        return self._prepared[key]

    def _make_room(self, wanted_bytes: int, *, keep: int) -> None:
        """Forget what was used longest ago, until so much more may be kept.

        Args:
            wanted_bytes: How much.
            keep: The resolution that is at hand.
        """
        kept = sum(inputs.nbytes for inputs in self._prepared.values())
        for key in [one for one in self._prepared if one[1] != keep]:
            if kept + wanted_bytes > MOST_KEPT_BYTES:
                kept -= self._prepared.pop(key).nbytes


def top1_accuracy(
    session: Session,
    inputs: NDArray[np.float32] | PreparedImages,
    labels: NDArray[np.int64],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> float:
    """Share of right top-1 predictions, 0..1.

    Args:
        session: A model of one input and one output, loaded.
        inputs: Network inputs `(n, 3, resolution, resolution)`.
        labels: `(n,)`.
        batch_size: Images per run; 1 for a model of static batch 1.
        progress: Called with images done and all of them.
    """
    correct = 0
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        logits = infer(session, batch)
        correct += int((logits.argmax(1) == labels[start : start + batch_size]).sum())
        if progress is not None:
            progress(start + len(batch), len(inputs))
    return correct / len(inputs)
