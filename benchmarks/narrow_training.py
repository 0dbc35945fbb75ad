"""Steps of training a pruned network, with torch's batch norms and with ours.

ResNet-20 of which every layer kept the same share of its channels, in channels-last
memory, on all threads; batches of 128 images of noise, SGD. Both ways take turns.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F
from inputs import console, new_parser
from report import Section
from rich.progress import track
from torch import Tensor, nn

from ofa_deploy.families.cifar_resnet import WIDTHS, ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.nn.supernet import store_channels_last
from ofa_deploy.train.allocator import keep_freed_memory
from ofa_deploy.train.batch_norm import SUMS_PER_LINE, LineAlignedBatchNorm
from ofa_deploy.train.precision import prefers_bf16

SHARES = (1.0, 0.875, 0.75, 0.7, 0.6, 0.5, 0.45)
WHOLE = ResNetShape.dense(20)
BATCH, RESOLUTION = 128, 32
WARMUP, TURNS = 3, 12
# Where a width is no whole lines; and where all are.
LEAST_GAIN, LEAST_ELSEWHERE = 1.5, 0.95
Mode = AbstractContextManager[object]


def main() -> None:
    """Time steps of each width both ways."""
    args = new_parser(__doc__).parse_args()
    section = Section(
        "narrow_training",
        "Training of pruned networks",
        results=args.results,
        packages=("torch",),
    )
    keep_freed_memory()
    rows: list[list[str]] = []
    gains: list[float] = []
    elsewhere: list[float] = []
    shares = track(SHARES, "timing steps", console=console, transient=True)
    for share in shares:
        plain_ms, aligned_ms = step_times_ms(share)
        widths = [narrowed(width, share) for width in WIDTHS]
        whole = all(width % SUMS_PER_LINE == 0 for width in widths)
        (elsewhere if whole else gains).append(plain_ms / aligned_ms)
        rows.append(
            [
                " / ".join(map(str, widths)),
                f"{plain_ms:.0f}",
                f"{aligned_ms:.0f}",
                f"{plain_ms / aligned_ms:.2f}",
            ]
        )
    number_format = "bfloat16" if prefers_bf16() else "float32"
    section.text(
        f"ResNet-20 with these channels, {torch.get_num_threads()} threads, "
        f"{number_format}: milliseconds of a step of {BATCH} images, the median of "
        f"{TURNS} that took turns."
    )
    section.table(["channels", "torch's batch norm", "ours", "times as long"], rows)
    section.bar(
        f"channels that are no whole cache lines: {min(gains):.2f} to "
        f"{max(gains):.2f} times as fast (at least {LEAST_GAIN:g})",
        passed=min(gains) >= LEAST_GAIN,
    )
    section.bar(
        f"whole cache lines: {min(elsewhere):.2f} times (at least {LEAST_ELSEWHERE:g})",
        passed=min(elsewhere) >= LEAST_ELSEWHERE,
    )
    section.publish()


def narrowed(width: int, share: float) -> int:
    """A share of a layer's channels."""
    return round(share * width)


def step_times_ms(share: float) -> tuple[float, float]:
    """Of a step with torch's batch norm, and with ours; at a share of all widths."""
    torch.manual_seed(0)
    widths = tuple(narrowed(width, share) for width in WHOLE.widths)
    shape = replace(WHOLE, widths=widths)
    network = CifarResNet(shape).train()
    store_channels_last(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, shape.class_count, (BATCH,))
    seconds: tuple[list[float], list[float]] = ([], [])
    modes: tuple[Mode, Mode] = (nullcontext(), LineAlignedBatchNorm())
    for turn in range(WARMUP + TURNS):
        # Neither way is always the first.
        for index in (0, 1) if turn % 2 else (1, 0):
            start_s = time.perf_counter()
            train_step(network, images, labels, optimizer, modes[index])
            seconds[index].append(time.perf_counter() - start_s)
    plain_s, aligned_s = (median(times[WARMUP:]) for times in seconds)
    return plain_s * 1e3, aligned_s * 1e3


def train_step(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    mode: Mode,
) -> None:
    """Forward, backward and update, as trainings of the library do."""
    optimizer.zero_grad()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=prefers_bf16())
    with mode, autocast:
        logits = network(images)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


if __name__ == "__main__":
    main()
