"""One network of a supernet as files, checked against the unfused reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ofa_deploy.export import litert
from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME, emit_network
from ofa_deploy.export.openvino import write_ir
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import materialise
from ofa_deploy.plan import NetworkPlan
from ofa_deploy.preprocess import prepare
from ofa_deploy.recalibrate import recalibrate
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.target import Target
from ofa_deploy.verify import (
    ParityReport,
    compare_outputs,
    require_parity,
    run_one_by_one,
)
from profilers.backends import get_backend
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu

ONNX_FILE = "model.onnx"
IR_FILE = "model.xml"
LITERT_FILE = "model.tflite"
REFERENCE_FILE = "reference.safetensors"
PARITY_IMAGES = 256
REFERENCE_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedNetwork:
    """Files of a network in a folder.

    Args:
        plan: The network.
        folder: Where the files are.
        model_file: The one that the target's runtime loads.
        parity: Of that file.
    """

    plan: NetworkPlan
    folder: Path
    model_file: str
    parity: ParityReport

    @property
    def loaded_bytes(self) -> int:
        """Size of what the runtime loads."""
        return loaded_bytes(self.folder / self.model_file)


def export_network(
    supernet: StoredSupernet,
    plan: NetworkPlan,
    *,
    calibration: NDArray[np.uint8],
    target: Target,
    folder: Path,
    begin: Callable[[str], None] = lambda stage: None,
) -> ExportedNetwork:
    """Materialise, recalibrate, fuse, write, and compare with the unfused graph.

    Besides the model the folder gets the reference outputs on a few images, so that
    the model can be checked again anywhere.

    Args:
        supernet: Where the weights come from.
        plan: The network.
        calibration: Images for the batch-norm statistics, `(n, H, W, 3)` uint8.
        target: What the file is for.
        folder: Gets the files.
        begin: Told of stages.

    Raises:
        ParityError: The file computes something else.
    """
    begin("recalibrating")
    inputs = prepare(
        calibration, resolution=plan.resolution, normalisation=supernet.normalisation
    )
    reference_backend = OnnxRuntimeCpu(optimize=False)
    weights = recalibrate(
        materialise(supernet.weights, plan),
        plan,
        inputs,
        backend=reference_backend,
        threads=target.threads,
    )
    begin("exporting")
    model_file = write_model(plan, fuse(weights, plan), target=target, folder=folder)
    begin("comparing with the unfused graph")
    images = _parity_inputs(inputs)
    unfused = emit_network(plan, weights, form="unfused", batch=None)
    with reference_backend.load(unfused, threads=target.threads) as session:
        expected = session.run({INPUT_NAME: images})[OUTPUT_NAME]
    with get_backend(target.backend).load(
        folder / model_file, threads=target.threads
    ) as session:
        found = run_one_by_one(session, images)
    parity = compare_outputs(found, expected)
    require_parity(parity, what=f"the exported {model_file}")
    kept = slice(0, REFERENCE_IMAGES)
    reference = {INPUT_NAME: images[kept], OUTPUT_NAME: expected[kept]}
    (folder / REFERENCE_FILE).write_bytes(save(reference))
    return ExportedNetwork(
        plan=plan, folder=folder, model_file=model_file, parity=parity
    )


def write_model(
    plan: NetworkPlan,
    fused: Mapping[str, NDArray[np.float32]],
    *,
    target: Target,
    folder: Path,
) -> str:
    """Write a network as ONNX, and as what the target's runtime loads.

    Args:
        plan: The network.
        fused: Its weights, batch norms folded.
        target: What the file is for.
        folder: Gets the files.

    Returns:
        Name of the file to load.
    """
    model = emit_network(plan, fused, form="fused")
    (folder / ONNX_FILE).write_bytes(model)
    if target.backend == "openvino-cpu":
        write_ir(model, folder / IR_FILE)
        return IR_FILE
    if target.backend == "litert-cpu":
        (folder / LITERT_FILE).write_bytes(litert.emit_network(plan, fused))
        return LITERT_FILE
    return ONNX_FILE


def loaded_bytes(model_path: Path) -> int:
    """Size of what a runtime loads: the model file, and weights beside it."""
    files = [model_path, model_path.with_suffix(".bin")]
    return sum(file.stat().st_size for file in files if file.is_file())


def _parity_inputs(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """`PARITY_IMAGES` network inputs: the given ones, then noise if they are few."""
    missing = PARITY_IMAGES - len(inputs)
    if missing <= 0:
        return np.ascontiguousarray(inputs[:PARITY_IMAGES])
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((missing, *inputs.shape[1:]), dtype=np.float32)
    return np.concatenate([inputs, noise])
