"""What of a graph's activations is alive at once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ofa_deploy.export.activations import peak_activation_count
from ofa_deploy.export.onnx import emit_network, random_weights
from ofa_deploy.families import mbv3, repvgg
from ofa_deploy.plan import BYTES_PER_FLOAT, lower
from ofa_deploy.space import SearchSpace

SHAPE = (1, 4, 8, 8)
MAP = 4 * 8 * 8


def graph(*nodes: tuple[str, str, str]) -> onnx.ModelProto:
    """Of operators, what each reads, and what it writes; `w` is a convolution's."""
    weight = np.zeros((4, 4, 1, 1), dtype=np.float32)
    made = helper.make_graph(
        [helper.make_node(kind, read.split(), [out]) for kind, read, out in nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize(
    ("maps", "nodes"),
    [
        # What is read and what is written.
        (2, [("Conv", "x w", "a")]),
        (2, [("Conv", "x w", "a"), ("Relu", "a", "b"), ("Conv", "b w", "c")]),
        # A shortcut waits for its sum, which takes the place of what is added.
        (3, [("Conv", "x w", "a"), ("Conv", "a w", "b"), ("Add", "b x", "c")]),
        # What is read before and after its activation is there twice.
        (3, [("Relu", "x", "a"), ("Conv", "a w", "b"), ("Add", "b x", "c")]),
        # A gate goes into what it is of.
        (2, [("Conv", "x w", "a"), ("Sigmoid", "a", "g"), ("Mul", "a g", "b")]),
        # Pieces wait until they are put together.
        (
            4,
            [
                ("Conv", "x w", "a"),
                ("Conv", "a w", "b"),
                ("Conv", "b w", "c"),
                ("Sum", "x a b c", "d"),
            ],
        ),
    ],
)
def test_as_many_maps_are_alive_as_somebody_is_to_read(
    maps: int, nodes: list[tuple[str, str, str]]
) -> None:
    assert peak_activation_count(graph(*nodes)) == maps * MAP


@pytest.mark.parametrize("space", [mbv3.small(), repvgg.small()], ids=lambda s: s.name)
def test_a_plans_graph_has_the_plans_peak(space: SearchSpace) -> None:
    for config in (space.smallest(), space.middle(), space.largest()):
        plan = lower(space, config)
        weights = random_weights(plan.layers, rng=np.random.default_rng(0))
        model = onnx.load_from_string(emit_network(plan, weights, form="fused"))
        found = peak_activation_count(model) * BYTES_PER_FLOAT
        assert found == plan.peak_activation_bytes
