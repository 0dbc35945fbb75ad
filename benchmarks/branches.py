"""A network of the RepVGG family with its branches, and fused: the same, and faster?

The dense network that `pas.py` trained, with the weights that it has, also on two
threads and on larger images; and two of random weights, to see what becomes of the
ratio where there is less to compute. The runtimes fold batch norms as they do by
themselves; on LiteRT they are folded beforehand. While networks are timed, nothing else
may run.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from branched_litert import emit_branched
from pas import dense_plan, scaled_plan, space
from report import Section
from trainings import RESOLUTION, Weights, kept, run_stage, time_on

from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME, emit_network
from ofa_deploy.export.runtime_format import model_suffix
from ofa_deploy.exporting import write_model
from ofa_deploy.fuse import fuse
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.plan import NetworkPlan, lower
from ofa_deploy.target import Target
from profilers.backends import get_backend

BACKENDS = ("openvino-cpu", "onnxruntime-cpu", "litert-cpu")
IMAGES = 64
TRAINED = "dense, trained"
MOST_ERROR, LEAST_RATIO = 1e-5, 1.5
# Whose sums no longer fit the caches that a core has to itself.
LARGE_RESOLUTION = 160


@dataclass(frozen=True)
class Compared:
    """What is timed in both forms."""

    plan: NetworkPlan
    weights: Weights
    threads: int = 1


def fuse_error(plan: NetworkPlan, weights: Weights) -> float:
    """Largest difference of the two forms' logits, over the largest logit."""
    rng = np.random.default_rng(0)
    shape = (IMAGES, 3, RESOLUTION, RESOLUTION)
    inputs = rng.standard_normal(shape, dtype=np.float32)
    branched, fused = (
        emit_network(plan, weights, form="unfused", batch=None),
        emit_network(plan, fuse(weights, plan), form="fused", batch=None),
    )
    outputs = []
    for model in (branched, fused):
        with get_backend("onnxruntime-cpu").load(model, threads=2) as session:
            outputs.append(session.run({INPUT_NAME: inputs})[OUTPUT_NAME])
    difference = np.abs(outputs[0] - outputs[1]).max()
    return float(difference / np.abs(outputs[0]).max())


def latencies_ms(compared: Compared, backend_name: str) -> tuple[float, float]:
    """With the branches, and fused, timed against each other."""
    plan, weights = compared.plan, compared.weights
    target = Target(backend=backend_name, threads=compared.threads)
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name:
        folder = Path(name)
        file = write_model(plan, fuse(weights, plan), target=target, folder=folder)
        if model_suffix(backend_name) == ".tflite":
            branched = emit_branched(plan, weights)
        else:
            branched = emit_network(plan, weights, form="unfused")
        models: dict[str, Path | bytes]
        models = {"fused": folder / file, "branched": branched}
        found = time_on(backend_name, models, threads=compared.threads)
    return found["branched"], found["fused"]


def networks_of(dense: Compared) -> dict[str, Compared]:
    """The trained network, and others to see what the ratio depends on."""
    large = replace(space(), resolutions=(LARGE_RESOLUTION,))
    half = scaled_plan((16, 40, 80, 72))
    smallest = lower(space(), space().smallest())
    return {
        TRAINED: dense,
        "the same": replace(dense, threads=2),
        f"the same, {LARGE_RESOLUTION}×{LARGE_RESOLUTION}": replace(
            dense, plan=lower(large, large.largest())
        ),
        "half of all widths": Compared(half, StaticNet(half).weights()),
        "the family's smallest": Compared(smallest, StaticNet(smallest).weights()),
    }


def compare(args: argparse.Namespace) -> None:
    """Compare, and publish."""
    section = Section(
        "branches",
        "Branches, and fused",
        results=args.results,
        packages=("ai-edge-litert",),
    )
    dense = Compared(dense_plan(), kept("pas-dense"))
    rows, ratios = [], {}
    for name, compared in networks_of(dense).items():
        told = []
        for backend in BACKENDS:
            branched_ms, fused_ms = latencies_ms(compared, backend)
            ratios[name, backend] = branched_ms / fused_ms
            told.append(
                f"{branched_ms:.3f} / {fused_ms:.3f} = {branched_ms / fused_ms:.2f}"
            )
        macs = f"{compared.plan.mac_count / 1e6:.1f}"
        rows.append([name, macs, f"{compared.threads}", *told])
    section.text("Milliseconds with the branches, and fused.")
    section.table(["network", "MMACs", "threads", *BACKENDS], rows)
    error = fuse_error(dense.plan, dense.weights)
    section.bar(
        f"relative error of the trained network's logits, on {IMAGES} images of noise: "
        f"{error:.1e} (at most {MOST_ERROR:g})",
        passed=error <= MOST_ERROR,
    )
    of_dense = [ratios[TRAINED, backend] for backend in BACKENDS]
    told = [
        f"{backend} {ratio:.2f}"
        for backend, ratio in zip(BACKENDS, of_dense, strict=True)
    ]
    section.bar(
        f"the trained network's ratio: {', '.join(told)} (at least {LEAST_RATIO:g})",
        passed=min(of_dense) >= LEAST_RATIO,
    )
    section.publish()


if __name__ == "__main__":
    run_stage(__doc__, {"compare": compare})
