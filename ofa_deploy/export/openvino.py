"""ONNX to OpenVINO IR."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ofa_deploy.errors import ModelRejected
from profilers.backends.openvino_cpu import import_openvino


def write_ir(model: bytes, xml_path: Path) -> None:
    """Write an ONNX model as IR: `xml_path` and a .bin beside it, weights in float32.

    Raises:
        MissingDependency: OpenVINO is not installed.
        ModelRejected: OpenVINO does not read the model.
        OSError: The files cannot be written.
    """
    openvino = import_openvino()
    try:
        converted = openvino.Core().read_model(model=model, weights=b"")
        _name_by_place(converted)
    except Exception as error:  # the runtime's classes differ by version
        raise ModelRejected(
            f"OpenVINO cannot convert the model: {error}. Take another runtime, such "
            "as onnxruntime-cpu"
        ) from error
    try:
        # The default halves the weights' precision, and parity with it.
        openvino.save_model(converted, str(xml_path), compress_to_fp16=False)
        # A write that fails is not told, as on a disk that is full.
        openvino.Core().read_model(str(xml_path))
    except Exception as error:
        raise OSError(f"OpenVINO cannot write {xml_path}: {error}") from error


def _name_by_place(model: Any) -> None:
    """Name the nodes that have no name of ours by their place in the model.

    OpenVINO numbers them through the whole process, so that a second export of the same
    network would be another file.
    """
    for place, node in enumerate(model.get_ordered_ops()):
        kind = node.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{kind}_{place}")
