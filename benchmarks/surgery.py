"""Removing channels from networks as people bring them, against masking them.

Each network at its published size gets random weights and running statistics, as a
trained one has; half of the channels of every group are masked, and removed. What the
two compute on noise is compared, in float32 as it is deployed and in float64, where
rounding has no say.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from cifar_networks import ALL
from inputs import new_parser
from report import Section
from torch import Tensor, nn

from ofa_deploy.preprocess import Normalisation
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.extract import extract_module
from ofa_deploy.shrink.own_network import OwnNetwork

RESOLUTION, IMAGES = 32, 16
KEPT_SHARE = 0.5
MOST_ERROR = 1e-6


def randomised(network: nn.Module) -> nn.Module:
    """With statistics and scales that no two channels share."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if not isinstance(module, nn.BatchNorm2d):
            continue
        state = module.state_dict()
        for name in ("running_mean", "bias"):
            drawn = torch.randn(state[name].shape, generator=generator)
            state[name].copy_(0.2 * drawn)
        for name in ("running_var", "weight"):
            drawn = torch.rand(state[name].shape, generator=generator)
            state[name].copy_(0.5 + drawn)
    return network.eval()


def row(name: str) -> tuple[list[str], float]:
    """A network's line, and its error in float32."""
    torch.manual_seed(0)
    network = randomised(ALL[name]())
    began_s = time.perf_counter()
    own = OwnNetwork.of(
        network,
        resolution=RESOLUTION,
        normalisation=Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3),
        class_names=tuple("0123456789"),
    )
    seconds = time.perf_counter() - began_s
    generator = torch.Generator().manual_seed(1)
    kept = tuple(
        torch.randperm(group.channels, generator=generator)[
            : max(1, int(KEPT_SHARE * group.channels))
        ]
        .sort()
        .values
        for group in own.graph.groups
    )
    single, double = (
        error(own, kept, dtype) for dtype in (torch.float32, torch.float64)
    )
    price = MacPrice(own.graph)
    left = float(price(torch.tensor([float(len(one)) for one in kept]).double()))
    full = float(price(full_counts(own.graph)))
    parameters = sum(p.numel() for p in network.parameters())
    cells = [
        name,
        f"{parameters / 1e6:.2f} M",
        f"{full:.0f}",
        f"{len(own.graph.groups)}",
        f"{left / full:.1%}",
        f"{single:.1e}",
        f"{double:.1e}",
        f"{seconds:.1f}",
    ]
    return cells, single


@torch.no_grad()
def error(own: OwnNetwork, kept: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """Largest difference of logits, over the largest logit."""
    masked = own.masked()
    for mask, indices in zip(masked.masks, kept, strict=True):
        mask.keep_only(indices)
    narrow = extract_module(own.module, own.graph, kept)
    shape = (IMAGES, 3, RESOLUTION, RESOLUTION)
    noise = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    inputs = torch.from_numpy(noise).to(dtype)
    expected = masked.module.eval().to(dtype)(inputs)
    found = narrow.eval().to(dtype)(inputs)
    own.module.float()  # the masked form shares its weights
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    """All networks, and the section of RESULTS.md."""
    args = new_parser(__doc__).parse_args()
    rows = [row(name) for name in ALL]
    section = Section(
        "surgery", "Removed against masked channels", results=args.results
    )
    section.text(
        f"{KEPT_SHARE:.0%} of the channels of every group stay. Error: the largest "
        "difference of logits over the largest logit."
    )
    section.table(
        [
            "network",
            "parameters",
            "MMACs",
            "groups",
            "MACs left",
            "error, float32",
            "error, float64",
            "s to trace and try",
        ],
        [cells for cells, _ in rows],
    )
    worst = max(single for _, single in rows)
    section.bar(
        f"removed against masked: at most {worst:.1e} (at most {MOST_ERROR:g})",
        passed=worst <= MOST_ERROR,
    )
    section.publish()


if __name__ == "__main__":
    main()
