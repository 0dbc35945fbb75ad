"""Steps of Muon: torch's, which rounds to bfloat16, and ours in float32.

Of all convolutions' weights of a network, on all threads and on one, without the
gradients. Both take turns. Trainings take the one in bfloat16 only where the CPU has
instructions for it; whichever they take here is to be the faster one.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from cifar_networks import Vgg
from inputs import console, new_parser
from report import Section
from rich.progress import track
from torch import nn
from training_steps import number_format

from ofa_deploy.families.cifar_resnet import ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.nn.memory_format import as_matrix, store_channels_last
from ofa_deploy.train.muon import Float32Muon, new_muon

NETWORKS = ("VGG-like", "ResNet-20")
WARMUP, TURNS = 1, 4
# Of the other one's time over that of the one that is taken.
LEAST_GAIN = 1.0


def main() -> None:
    """Time steps of both networks by both."""
    args = new_parser(__doc__).parse_args()
    section = Section("muon", "Muon", results=args.results, packages=("torch",))
    most = torch.get_num_threads()
    cases = [(name, threads) for name in NETWORKS for threads in sorted({1, most})]
    times_ms = {}
    for name, threads in track(cases, "timing steps", console=console, transient=True):
        torch.set_num_threads(threads)
        times_ms[name, threads] = step_times_ms(matrices_of(network(name)))
    taken = type(
        new_muon(matrices_of(network(NETWORKS[0])), momentum=0, weight_decay=0)
    )
    section.text(
        f"Trainings take `{taken.__name__}` here, and {number_format()} for the rest: "
        f"milliseconds of a step, the median of {TURNS} that took turns."
    )
    section.table(
        ["network", "threads", "torch.optim.Muon", "Float32Muon", "times as long"],
        [
            [
                name,
                str(threads),
                f"{theirs_ms:.1f}",
                f"{ours_ms:.1f}",
                f"{theirs_ms / ours_ms:.2f}",
            ]
            for (name, threads), (theirs_ms, ours_ms) in times_ms.items()
        ],
    )
    gain = min(
        theirs / ours if taken is Float32Muon else ours / theirs
        for theirs, ours in times_ms.values()
    )
    section.bar(
        f"the one that is taken: at least {gain:.2f} times as fast as the other (at "
        f"least {LEAST_GAIN:g})",
        passed=gain >= LEAST_GAIN,
    )
    section.publish()


def network(name: str) -> nn.Module:
    """Untrained."""
    return Vgg() if name == "VGG-like" else CifarResNet(ResNetShape.dense(20))


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """Its convolutions' weights, with gradients of noise."""
    store_channels_last(module)
    matrices = [
        nn.Parameter(as_matrix(layer.weight.data))
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return matrices


def step_times_ms(matrices: list[nn.Parameter]) -> tuple[float, float]:
    """Of a step by torch's, and by ours."""
    optimizers = [
        kind(matrices, lr=0.01, momentum=0.95, weight_decay=0.05)
        for kind in (torch.optim.Muon, Float32Muon)
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARMUP + TURNS):
        # Neither is always the first.
        for index in (0, 1) if turn % 2 else (1, 0):
            start_s = time.perf_counter()
            optimizers[index].step()  # type: ignore[no-untyped-call]
            seconds[index].append(time.perf_counter() - start_s)
    theirs_s, ours_s = (median(times[WARMUP:]) for times in seconds)
    return theirs_s * 1e3, ours_s * 1e3


if __name__ == "__main__":
    main()
