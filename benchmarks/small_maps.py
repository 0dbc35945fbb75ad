"""Steps of training networks that end in small maps: torch's convolutions and ours.

In channels-last memory, on all threads and on one; batches of noise, SGD. Both ways
take turns. VGG-like networks on small images have layers of hundreds of channels over
maps of a few pixels; ResNet-20 has none, and is to lose nothing.
"""

from __future__ import annotations

import torch
from cifar_networks import Vgg
from inputs import console, new_parser
from report import Section
from rich.progress import track
from torch import nn
from training_steps import TURNS, number_format, step_times_ms

from ofa_deploy.families.cifar_resnet import ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.train.allocator import keep_freed_memory
from ofa_deploy.train.convolutions import ConvolutionsBy
from ofa_deploy.train.small_maps import as_product

BATCH = 256
NETWORKS = ("VGG-like", "ResNet-20")
# Of the network that has such layers; and of the one that has none.
LEAST_GAIN, LEAST_ELSEWHERE = 1.3, 0.95


def main() -> None:
    """Time steps of both networks both ways."""
    args = new_parser(__doc__).parse_args()
    section = Section(
        "small_maps",
        "Training over small maps",
        results=args.results,
        packages=("torch",),
    )
    keep_freed_memory()
    most = torch.get_num_threads()
    cases = [(name, threads) for name in NETWORKS for threads in sorted({1, most})]
    times_ms = {}
    for name, threads in track(cases, "timing steps", console=console, transient=True):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        times_ms[name, threads] = step_times_ms(
            network(name), ConvolutionsBy(as_product), batch=BATCH
        )
    section.text(
        f"{number_format()}: milliseconds of a step of {BATCH} images, the median of "
        f"{TURNS} that took turns."
    )
    section.table(
        ["network", "threads", "torch's convolutions", "ours", "times as long"],
        [
            [
                name,
                str(threads),
                f"{plain_ms:.0f}",
                f"{ours_ms:.0f}",
                f"{plain_ms / ours_ms:.2f}",
            ]
            for (name, threads), (plain_ms, ours_ms) in times_ms.items()
        ],
    )
    gains = {
        of: min(
            plain / ours for (name, _), (plain, ours) in times_ms.items() if name == of
        )
        for of in NETWORKS
    }
    section.bar(
        f"a network with such layers: at least {gains['VGG-like']:.2f} times as fast "
        f"(at least {LEAST_GAIN:g})",
        passed=gains["VGG-like"] >= LEAST_GAIN,
    )
    section.bar(
        f"one without: {gains['ResNet-20']:.2f} times (at least {LEAST_ELSEWHERE:g})",
        passed=gains["ResNet-20"] >= LEAST_ELSEWHERE,
    )
    section.publish()


def network(name: str) -> nn.Module:
    """New, of these."""
    return Vgg() if name == "VGG-like" else CifarResNet(ResNetShape.dense(20))


if __name__ == "__main__":
    main()
