"""Steps of training a pruned network, with torch's batch norms and with ours.

ResNet-20 of which every layer kept the same share of its channels, in channels-last
memory, on all threads; batches of 128 images of noise, SGD. Both ways take turns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from inputs import console, new_parser
from report import Section
from rich.progress import track
from torch import nn
from training_steps import TURNS, number_format, step_times_ms

from ofa_deploy.families.cifar_resnet import WIDTHS, ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.train.allocator import keep_freed_memory
from ofa_deploy.train.batch_norm import SUMS_PER_LINE, LineAlignedBatchNorm

SHARES = (1.0, 0.875, 0.75, 0.7, 0.6, 0.5, 0.45)
WHOLE = ResNetShape.dense(20)
BATCH = 128
# Where a width is no whole lines; and where all are.
LEAST_GAIN, LEAST_ELSEWHERE = 1.5, 0.95


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
        torch.manual_seed(0)
        plain_ms, aligned_ms = step_times_ms(
            pruned(share), LineAlignedBatchNorm(), batch=BATCH
        )
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
    section.text(
        f"ResNet-20 with these channels, {torch.get_num_threads()} threads, "
        f"{number_format()}: milliseconds of a step of {BATCH} images, the median of "
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


def pruned(share: float) -> nn.Module:
    """The network of which every layer kept this share."""
    widths = tuple(narrowed(width, share) for width in WHOLE.widths)
    return CifarResNet(replace(WHOLE, widths=widths))


if __name__ == "__main__":
    main()
