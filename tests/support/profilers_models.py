"""A small ONNX model that every runtime takes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

# The shape that a FakeSession takes, so that contract tests can feed all alike.
INPUT_SHAPE = (1, 3, 8, 8)
OUT_CHANNELS = 4


def conv_model(batch: int | str = 1) -> bytes:
    """One 3x3 convolution from `x` to `y`; a text as batch makes it dynamic."""
    weight = np.random.default_rng(0).standard_normal(
        (OUT_CHANNELS, INPUT_SHAPE[1], 3, 3), dtype=np.float32
    )
    tail = INPUT_SHAPE[2:]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"], pads=[1, 1, 1, 1])],
        "tiny",
        [
            helper.make_tensor_value_info(
                "x", TensorProto.FLOAT, [batch, INPUT_SHAPE[1], *tail]
            )
        ],
        [
            helper.make_tensor_value_info(
                "y", TensorProto.FLOAT, [batch, OUT_CHANNELS, *tail]
            )
        ],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    return bytes(model.SerializeToString())
