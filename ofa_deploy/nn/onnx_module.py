"""A user's torch module as ONNX, through torch's own exporter, and as IR or .tflite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from torch import nn

from ofa_deploy.errors import DeviceError, MissingDependency, ModelRejected
from ofa_deploy.export.model_files import (
    IR_FILE,
    LITERT_FILE,
    ONNX_FILE,
    model_file_of,
)
from ofa_deploy.export.onnx import INPUT_NAME, OPSET, OUTPUT_NAME
from ofa_deploy.export.onnx_to_litert import UnwrittenOperator, convert_onnx
from ofa_deploy.export.openvino import write_ir
from ofa_deploy.nn.litert_module import convert_module
from ofa_deploy.nn.silence import silence
from ofa_deploy.plan import IMAGE_CHANNELS
from ofa_deploy.target import Target

if TYPE_CHECKING:
    import onnx_ir


def write_module(
    module: nn.Module, *, resolution: int, target: Target, folder: Path
) -> str:
    """Write a module as ONNX, and as what the target's runtime loads.

    Args:
        module: In eval mode.
        resolution: Height and width of its input.
        target: What the file is for.
        folder: Gets the files.

    Returns:
        Name of the file to load.

    Raises:
        MissingDependency: torch's exporter lacks a package.
        ModelRejected: It, or what the runtime needs, does not take this network.
    """
    path = folder / ONNX_FILE
    _export(module, resolution, path)
    if target.backend == "openvino-cpu":
        write_ir(path.read_bytes(), folder / IR_FILE)
    if target.backend == "litert-cpu":
        model = _as_tflite(module, onnx.load(path), resolution)
        (folder / LITERT_FILE).write_bytes(model)
    return model_file_of(target.backend)


def _as_tflite(module: nn.Module, exported: onnx.ModelProto, resolution: int) -> bytes:
    """By our own writer, and what that has no operators for by the converter."""
    try:
        return convert_onnx(exported)
    except UnwrittenOperator as unwritten:
        shape = (1, IMAGE_CHANNELS, resolution, resolution)
        try:
            return convert_module(module, input_shape=shape)
        except (DeviceError, MissingDependency) as error:
            raise ModelRejected(
                f"{type(module).__name__} cannot be written as .tflite without "
                f"litert-torch: {unwritten}. {error}"
            ) from error


def _export(module: nn.Module, resolution: int, path: Path) -> None:
    image = torch.zeros(1, IMAGE_CHANNELS, resolution, resolution)
    try:
        with silence():
            program = torch.onnx.export(
                module,
                (image,),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                opset_version=OPSET + 1,  # the least that the exporter writes itself
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:
        raise MissingDependency("onnxscript", extra="shrink") from error
    except Exception as error:  # whatever its operators are not ready for
        told = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ModelRejected(
            f"torch's exporter cannot write {type(module).__name__} as ONNX: {told}. "
            "Write that part of its forward in other operators"
        ) from error
    assert program is not None  # as it is where no path is given
    _forget_sources(program.model)
    program.save(path, external_data=False)


def _forget_sources(model: onnx_ir.Model) -> None:
    """Take out which lines of whose files each operator comes from.

    Whoever gets a bundle is not to read them, and a file that is to be small need not
    hold them.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graph = model.graph
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
