"""Many exports by torch in one process, each as fast as the second could be."""

from __future__ import annotations

import functools

import pytest


def export_quickly(patch: pytest.MonkeyPatch) -> None:
    """Have the exporter look at each operator that it knows once.

    At each call it asks torch's dispatcher for all operators, and parses the sources of
    five hundred of its own, which is more than half of the time that a small network
    takes, and finds the same.

    Args:
        patch: Undone when the tests are over.
    """
    import torch._export.utils
    from onnxscript.values import TracedOnnxFunction
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parsed = functools.cache(vars(TracedOnnxFunction)["function_ir"].fget)
    patch.setattr(TracedOnnxFunction, "function_ir", property(parsed))
    of_version = functools.cache(ONNXRegistry.from_torchlib)
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(of_version))
    asked_for = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
    patch.setattr(torch._export.utils, "_materialize_cpp_cia_ops", asked_for)
