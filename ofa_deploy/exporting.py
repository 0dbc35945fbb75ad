"""One network as files, and what these compute beside what they should."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ofa_deploy.batches import evaluation_batch, in_batches
from ofa_deploy.export import litert
from ofa_deploy.export.model_files import (
    IR_FILE,
    LITERT_FILE,
    ONNX_FILE,
    loaded_files,
    model_file_of,
)
from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME, emit_network
from ofa_deploy.export.openvino import write_ir
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import Weights, materialise
from ofa_deploy.plan import NetworkCost, NetworkPlan
from ofa_deploy.preprocess import Normalisation, prepare
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

Floats = NDArray[np.float32]

REFERENCE_FILE = "reference.safetensors"
PARITY_IMAGES = 256
REFERENCE_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """What is known of a network besides its weights.

    Args:
        name: Id of the sub-network; or how a network was made.
        family: The space that it is of, or its kind.
        resolution: Height and width of its input.
        cost: Its sizes.
    """

    name: str
    family: str
    resolution: int
    cost: NetworkCost

    @classmethod
    def of(cls, plan: NetworkPlan) -> NetworkFacts:
        """Those of a plan."""
        return cls(
            name=plan.name,
            family=plan.space_name,
            resolution=plan.resolution,
            cost=plan.cost,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportedNetwork:
    """Files of a network in a folder.

    Args:
        facts: Which network.
        reference: What the files must compute: logits `(n, classes)` of inputs
            `(n, 3, resolution, resolution)`, found in another way.
        target: What the files are for.
        folder: Where the files are.
        model_file: The one that the target's runtime loads.
    """

    facts: NetworkFacts
    reference: Callable[[Floats], Floats]
    target: Target
    folder: Path
    model_file: str

    @property
    def loaded_bytes(self) -> int:
        """Size of what the runtime loads."""
        return sum(file.stat().st_size for file in self._loaded)

    @property
    def compressed_bytes(self) -> int:
        """Size of the same, compressed by xz as its command line does by default."""
        return sum(len(lzma.compress(file.read_bytes())) for file in self._loaded)

    @property
    def _loaded(self) -> list[Path]:
        return loaded_files(self.folder / self.model_file)


def export_network(
    supernet: StoredSupernet,
    plan: NetworkPlan,
    *,
    calibration: NDArray[np.uint8],
    target: Target,
    folder: Path,
    begin: Callable[[str], None] = lambda stage: None,
) -> ExportedNetwork:
    """Materialise, recalibrate, fuse, write.

    Args:
        supernet: Where the weights come from.
        plan: The network.
        calibration: Images for the batch-norm statistics, `(n, H, W, 3)` uint8.
        target: What the file is for.
        folder: Gets the files.
        begin: Told of stages.
    """
    begin("recalibrating")
    weights = recalibrate(
        materialise(supernet.weights, plan),
        plan,
        prepare(
            calibration,
            resolution=plan.resolution,
            normalisation=supernet.normalisation,
        ),
        backend=OnnxRuntimeCpu(optimize=False),
        threads=target.threads,
    )
    begin("exporting")
    model_file = write_model(plan, fuse(weights, plan), target=target, folder=folder)
    return ExportedNetwork(
        facts=NetworkFacts.of(plan),
        reference=partial(_unfused_outputs, plan, weights, target.threads),
        target=target,
        folder=folder,
        model_file=model_file,
    )


def _unfused_outputs(
    plan: NetworkPlan, weights: Weights, threads: int, inputs: Floats
) -> Floats:
    """Logits of the graph as it was trained, run as it is written."""
    unfused = emit_network(plan, weights, form="unfused", batch=None)
    parts = in_batches(len(inputs), evaluation_batch(plan.resolution))
    with OnnxRuntimeCpu(optimize=False).load(unfused, threads=threads) as session:
        outputs = [session.run({INPUT_NAME: inputs[part]}) for part in parts]
    return np.concatenate([one[OUTPUT_NAME] for one in outputs])


def compare_exported(
    exported: ExportedNetwork,
    images: NDArray[np.uint8],
    *,
    normalisation: Normalisation,
) -> ParityReport:
    """Hold a network's file against what it must compute.

    The folder gets the reference outputs on a few images, so that the file can be
    checked again anywhere. It takes as long as timing does, and says nothing of speed:
    only what is about to be handed out needs it.

    Args:
        exported: The files.
        images: `(n, H, W, 3)` uint8; noise makes up for what is missing to
            `PARITY_IMAGES`.
        normalisation: Of the network's inputs.

    Raises:
        ParityError: The file computes something else.
    """
    target, folder = exported.target, exported.folder
    inputs = _parity_inputs(
        prepare(
            images[:PARITY_IMAGES],
            resolution=exported.facts.resolution,
            normalisation=normalisation,
        )
    )
    expected = exported.reference(inputs)
    with get_backend(target.backend).load(
        folder / exported.model_file, threads=target.threads
    ) as session:
        found = run_one_by_one(session, inputs)
    parity = compare_outputs(found, expected)
    require_parity(parity, what=f"the exported {exported.model_file}")
    kept = slice(0, REFERENCE_IMAGES)
    reference = {INPUT_NAME: inputs[kept], OUTPUT_NAME: expected[kept]}
    (folder / REFERENCE_FILE).write_bytes(save(reference))
    return parity


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
    if target.backend == "litert-cpu":
        (folder / LITERT_FILE).write_bytes(litert.emit_network(plan, fused))
    return model_file_of(target.backend)


def _parity_inputs(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """`PARITY_IMAGES` network inputs: the given ones, then noise if they are few."""
    missing = PARITY_IMAGES - len(inputs)
    if missing <= 0:
        return np.ascontiguousarray(inputs[:PARITY_IMAGES])
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((missing, *inputs.shape[1:]), dtype=np.float32)
    return np.concatenate([inputs, noise])
