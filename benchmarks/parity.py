"""Whether every runner of a network computes the same: ONNX, OpenVINO IR, torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from inputs import (
    add_supernet,
    console,
    new_parser,
    random_plans,
    synthetic_calibration,
)
from numpy.typing import NDArray
from report import Section
from rich.progress import track

from ofa_deploy.export.onnx import INPUT_NAME, OUTPUT_NAME, emit_network
from ofa_deploy.export.openvino import write_ir
from ofa_deploy.exporting import PARITY_IMAGES
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import Weights, materialise
from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.plan import NetworkPlan, lower
from ofa_deploy.preprocess import prepare
from ofa_deploy.recalibrate import recalibrate
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.train.finish import load_supernet_module
from ofa_deploy.verify import (
    MAX_RELATIVE_ERROR,
    ParityReport,
    compare_outputs,
    run_one_by_one,
)
from ofa_deploy.zoo import open_supernet
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.backends.openvino_cpu import OpenVinoCpu

SEED = 7
RUNNERS = ("fused ONNX, ONNX Runtime", "fused IR, OpenVINO")
REFERENCES = ("unfused ONNX, ONNX Runtime without optimisation", "supernet, torch")

Floats = NDArray[np.float32]
Reports = dict[tuple[str, str], ParityReport]


def main() -> None:
    """Compare every pair on every network."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    parser.add_argument("--count", type=int, default=20, help="random sub-networks")
    args = parser.parse_args()
    section = Section(
        "parity", "Numerical parity", results=args.results, packages=("torch",)
    )
    supernet = open_supernet(args.supernet)
    images = synthetic_calibration(supernet)
    space = supernet.space
    plans = [
        lower(space, space.largest()),
        lower(space, space.smallest()),
        *random_plans(space, count=args.count, seed=SEED),
    ]
    module = load_supernet_module(supernet)
    found = [
        compare(supernet, module, plan, images)
        for plan in track(plans, "comparing", console=console, transient=True)
    ]
    publish(section, found, image_count=min(PARITY_IMAGES, len(images)))


def compare(
    supernet: StoredSupernet,
    module: Supernet,
    plan: NetworkPlan,
    images: NDArray[np.uint8],
) -> Reports:
    """Reports of one network, by runner and reference."""
    inputs = prepare(
        images, resolution=plan.resolution, normalisation=supernet.normalisation
    )
    plain = OnnxRuntimeCpu(optimize=False)
    cut = materialise(supernet.weights, plan)
    weights = recalibrate(cut, plan, inputs, backend=plain, threads=1)
    inputs = inputs[:PARITY_IMAGES]
    unfused = emit_network(plan, weights, form="unfused", batch=None)
    with plain.load(unfused, threads=1) as session:
        expected = session.run({INPUT_NAME: inputs})[OUTPUT_NAME]
    from_torch = run_torch(module, plan, weights, inputs)
    references = dict(zip(REFERENCES, (expected, from_torch), strict=True))
    from_files = run_exported(plan, weights, inputs)
    outputs = dict(zip(RUNNERS, from_files, strict=True))
    pairs = [(runner, name) for runner in RUNNERS for name in REFERENCES]
    reports = {
        (runner, name): compare_outputs(outputs[runner], references[name])
        for runner, name in pairs
    }
    first, second = REFERENCES
    reports[second, first] = compare_outputs(references[second], references[first])
    return reports


def run_exported(
    plan: NetworkPlan, weights: Weights, inputs: Floats
) -> tuple[Floats, Floats]:
    """Logits of the files that a bundle would hold, in the order of `RUNNERS`."""
    model = emit_network(plan, fuse(weights, plan), form="fused")
    with OnnxRuntimeCpu().load(model, threads=1) as session:
        from_onnx = run_one_by_one(session, inputs)
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
        path = Path(folder) / "model.xml"
        write_ir(model, path)
        with OpenVinoCpu().load(path, threads=1) as session:
            from_ir = run_one_by_one(session, inputs)
    return from_onnx, from_ir


@torch.no_grad()
def run_torch(
    module: Supernet, plan: NetworkPlan, weights: Weights, inputs: Floats
) -> Floats:
    """Logits of the elastic supernet with this network's statistics."""
    tensors = module.state_dict()  # shares its memory with the module
    for name, array in weights.items():
        if name.endswith((".norm.mean", ".norm.variance")):
            tensors[name][: len(array)] = torch.from_numpy(array)
    module.eval()
    logits: Floats = module(torch.from_numpy(inputs), plan).numpy()
    return logits


def publish(section: Section, found: list[Reports], *, image_count: int) -> None:
    """The worst of all networks, for each pair."""
    section.text(
        f"{len(found)} networks (the largest, the smallest, random ones) of the "
        f"supernet, recalibrated, on {image_count} of its own images. The relative "
        "error is the largest difference of a logit over the largest reference logit."
    )
    rows = []
    for pair in found[0]:
        reports = [network[pair] for network in found]
        errors = np.array([report.max_relative_error for report in reports])
        agreement = min(report.top1_agreement for report in reports)
        rows.append(
            [
                f"{pair[0]} against {pair[1]}",
                f"{np.median(errors):.1e}",
                f"{errors.max():.1e}",
                f"{agreement:.2%}",
            ]
        )
    headers = ["pair", "median error", "largest error", "least top-1 agreement"]
    section.table(headers, rows)
    everything = [report for network in found for report in network.values()]
    error = max(report.max_relative_error for report in everything)
    agreement = min(report.top1_agreement for report in everything)
    section.bar(
        f"relative error at most {MAX_RELATIVE_ERROR:g} everywhere: {error:.1e}",
        passed=error <= MAX_RELATIVE_ERROR,
    )
    section.bar(
        f"the same top class on every image: {agreement:.2%}", passed=agreement == 1
    )
    section.publish()


if __name__ == "__main__":
    main()
