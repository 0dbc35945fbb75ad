"""Blocks in int8 compute what the same blocks compute in float32, roughly."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ofa_deploy.export.runtime_format import Precision
from ofa_deploy.probe import OperatorProbe, TimedBlock, operator_probes
from profilers.backends import get_backend
from profilers.backends.base import random_inputs
from tests.support.gpu import every_backend

PROBES = {p.name: p for p in operator_probes() if p.precision == "float32"}
ACTIVATION_SCALE = 1 / 16


def output(
    probe: OperatorProbe, precision: Precision, backend_name: str
) -> NDArray[np.float32]:
    model = TimedBlock(block=probe.block, precision=precision)
    backend = get_backend(backend_name)
    with backend.load(model.emit(backend_name), threads=1) as session:
        inputs = random_inputs(session, np.random.default_rng(1))
        values = np.random.default_rng(2).standard_normal(inputs["image"].shape)
        steps = np.rint(values / ACTIVATION_SCALE)
        integers = inputs["image"].dtype == np.int8
        given = steps if integers else steps * ACTIVATION_SCALE
        given = given.astype(inputs["image"].dtype)
        (result,) = session.run({"image": given}).values()
        scale = ACTIVATION_SCALE if result.dtype == np.int8 else 1.0
        return (result * scale).astype(np.float32).reshape(-1)


# XNNPACK has no hard-swish in int8; what is computed is right all the same.
@pytest.mark.filterwarnings("ignore:.*last operators outside of the XNNPACK delegate")
@pytest.mark.parametrize("name", sorted(PROBES))
@pytest.mark.parametrize("backend_name", every_backend())
def test_int8_blocks_are_the_float_blocks_with_rounding(
    backend_name: str, name: str
) -> None:
    expected = output(PROBES[name], "float32", backend_name)
    found = output(PROBES[name], "int8", backend_name)
    assert not np.array_equal(found, expected)
    assert np.corrcoef(found, expected)[0, 1] > 0.98
