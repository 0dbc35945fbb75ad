"""Running images through a loaded model, whatever layout it takes them in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import FormatError
from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME
from ofa_deploy.plan import IMAGE_CHANNELS
from profilers.backends.base import Session


def infer(session: Session, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits `(n, classes)` of network inputs `(n, 3, resolution, resolution)`.

    A model that takes channels last, as LiteRT's do, is given them so.

    Raises:
        FormatError: The model has other inputs or outputs than an exported network.
    """
    shape = session.input_shapes.get(INPUT_NAME, ())
    if len(shape) != 4:
        raise FormatError(
            f"the model takes {dict(session.input_shapes)}; {INPUT_NAME!r} of 4 axes "
            "belongs there. Give a model that `ofa-deploy specialize` exported",
            path="",
        )
    if shape[1] != IMAGE_CHANNELS and shape[-1] == IMAGE_CHANNELS:
        inputs = np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
    outputs = session.run({INPUT_NAME: inputs})
    logits = outputs.get(OUTPUT_NAME)
    if logits is None or logits.dtype.kind != "f" or logits.ndim != 2:
        found = {
            name: f"{array.dtype} {array.shape}" for name, array in outputs.items()
        }
        raise FormatError(
            f"the model gives {found}; {OUTPUT_NAME!r}, numbers of shape (n, classes), "
            "belongs there. Give a model that `ofa-deploy specialize` exported",
            path="",
        )
    return logits
