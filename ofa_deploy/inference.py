"""Running images through a loaded model, whatever layout it takes them in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME
from ofa_deploy.plan import IMAGE_CHANNELS
from profilers.backends.base import Session


def infer(session: Session, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits `(n, classes)` of network inputs `(n, 3, resolution, resolution)`.

    A model that takes channels last, as LiteRT's do, is given them so.
    """
    shape = session.input_shapes[INPUT_NAME]
    if shape[1] != IMAGE_CHANNELS and shape[-1] == IMAGE_CHANNELS:
        inputs = np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
    logits: NDArray[np.float32] = session.run({INPUT_NAME: inputs})[OUTPUT_NAME]
    return logits
