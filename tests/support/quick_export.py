"""Many exports by torch in one process, each as fast as the second could be."""

from __future__ import annotations

import functools

import pytest


def keep_signatures(patch: pytest.MonkeyPatch) -> None:
    """Have the exporter parse each of its operators once.

    It parses the sources of five hundred anew at each call, which is a third of the
    time that a small network takes, and finds the same.

    Args:
        patch: Undone when the tests are over.
    """
    from onnxscript.values import TracedOnnxFunction

    parsed = functools.cache(vars(TracedOnnxFunction)["function_ir"].fget)
    patch.setattr(TracedOnnxFunction, "function_ir", property(parsed))
