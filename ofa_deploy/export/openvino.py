"""ONNX to OpenVINO IR."""

from __future__ import annotations

from pathlib import Path

from ofa_deploy.errors import ModelRejected
from profilers.backends.openvino_cpu import import_openvino


def write_ir(model: bytes, xml_path: Path) -> None:
    """Write an ONNX model as IR: `xml_path` and a .bin beside it, weights in float32.

    Raises:
        MissingDependency: OpenVINO is not installed.
        ModelRejected: OpenVINO does not read the model.
    """
    openvino = import_openvino()
    try:
        converted = openvino.Core().read_model(model=model, weights=b"")
        # The default halves the weights' precision, and parity with it.
        openvino.save_model(converted, str(xml_path), compress_to_fp16=False)
    except Exception as error:  # the runtime's classes differ by version
        raise ModelRejected(f"OpenVINO cannot convert the model: {error}") from error
