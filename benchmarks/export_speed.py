"""From a plan to an ONNX file on disk, for networks of ImageNet size."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from inputs import console, new_parser, random_plans
from numpy.typing import NDArray
from random_supernet import random_supernet_weights
from report import Section
from rich.progress import track

from ofa_deploy.export.onnx import emit_network
from ofa_deploy.families import mbv3
from ofa_deploy.fuse import fuse
from ofa_deploy.materialise import materialise
from ofa_deploy.plan import NetworkPlan

SEED = 4
REPEATS = 20
MAX_EXPORT_MS = 50.0
STEPS = ("materialise", "fuse", "emit", "write")
TORCH_EXPORT_NEEDS = ("torch", "onnxscript")

Weights = Mapping[str, NDArray[np.float32]]


def main() -> None:
    """Time each step, and torch's exporter where it is installed."""
    args = new_parser(__doc__).parse_args()
    section = Section(
        "export_speed",
        "Export speed",
        results=args.results,
        packages=("onnx", *TORCH_EXPORT_NEEDS),
    )
    space = mbv3.imagenet(width=1.0)
    stored = random_supernet_weights(space, np.random.default_rng(SEED))
    (plan,) = random_plans(space, count=1, seed=SEED)
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
        path = Path(folder) / "model.onnx"
        repeats = track(range(REPEATS), "exporting", console=console, transient=True)
        runs = [time_export(plan, stored, path) for _ in repeats]
        size_mb = path.stat().st_size / 1e6
        torch_ms = time_torch(plan, stored, Path(folder) / "torch.onnx")
    medians = {step: statistics.median(run[step] for run in runs) for step in STEPS}
    export_ms = statistics.median(run["emit"] + run["write"] for run in runs)
    whole_ms = statistics.median(sum(run.values()) for run in runs)
    section.text(
        f"One random sub-network of `{space.name}` (`{plan.name}`, "
        f"{plan.parameter_count / 1e6:.1f} M parameters, a file of {size_mb:.1f} MB) "
        f"with random weights; median of {REPEATS}. The file is written as usual, "
        "without waiting for the disk."
    )
    rows = [[step, f"{ms:.1f}"] for step, ms in medians.items()]
    rows += [["emit and write", f"{export_ms:.1f}"], ["all four", f"{whole_ms:.1f}"]]
    if torch_ms is not None:
        label = "`torch.onnx.export(dynamo=True)` of the same network, once"
        rows.append([label, f"{torch_ms:.0f}"])
    section.table(["step", "ms"], rows)
    if torch_ms is None:
        needed = " and ".join(TORCH_EXPORT_NEEDS)
        section.text(f"Not compared with torch's exporter: it needs {needed}.")
    else:
        section.text(
            f"torch's exporter takes {torch_ms / export_ms:.0f} times as long as emit "
            f"and write, and {torch_ms / whole_ms:.0f} times as long as all four."
        )
    section.bar(
        f"emit and write in at most {MAX_EXPORT_MS:g} ms: {export_ms:.1f} ms",
        passed=export_ms <= MAX_EXPORT_MS,
    )
    section.publish()


def time_export(plan: NetworkPlan, stored: Weights, path: Path) -> dict[str, float]:
    """Milliseconds of each of `STEPS`."""
    times = [time.perf_counter()]
    unfused = materialise(stored, plan)
    times.append(time.perf_counter())
    fused = fuse(unfused, plan)
    times.append(time.perf_counter())
    model = emit_network(plan, fused, form="fused")
    times.append(time.perf_counter())
    path.write_bytes(model)
    times.append(time.perf_counter())
    return dict(zip(STEPS, 1e3 * np.diff(times), strict=True))


def time_torch(plan: NetworkPlan, stored: Weights, path: Path) -> float | None:
    """Milliseconds that torch takes for the same; None where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in TORCH_EXPORT_NEEDS):
        return None
    import torch

    from ofa_deploy.nn.static import StaticNet

    network = StaticNet(plan, materialise(stored, plan)).eval()
    image = torch.zeros(1, 3, plan.resolution, plan.resolution)
    with console.status("exporting with torch"):
        start_s = time.perf_counter()
        torch.onnx.export(network, (image,), path, dynamo=True, verbose=False)
        return 1e3 * (time.perf_counter() - start_s)


if __name__ == "__main__":
    main()
