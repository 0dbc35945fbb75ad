"""Names of the files that runtimes load."""

from __future__ import annotations

from pathlib import Path

ONNX_FILE = "model.onnx"
IR_FILE = "model.xml"
LITERT_FILE = "model.tflite"


def model_file_of(backend: str) -> str:
    """The file that a runtime loads.

    Args:
        backend: As `profilers.backends.get_backend` takes it.
    """
    return {"openvino-cpu": IR_FILE, "litert-cpu": LITERT_FILE}.get(backend, ONNX_FILE)


def loaded_files(model_path: Path) -> list[Path]:
    """What a runtime loads: the model file, and weights beside it."""
    files = [model_path, model_path.with_suffix(".bin")]
    return [file for file in files if file.is_file()]
