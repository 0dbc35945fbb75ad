"""Steps of a network's training, with and without what is to make them faster."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_deploy.nn.memory_format import store_channels_last
from ofa_deploy.train.precision import prefers_bf16

RESOLUTION, CLASSES = 32, 10
WARMUP, TURNS = 3, 12
Mode = AbstractContextManager[object]


def number_format() -> str:
    """That trainings use here."""
    return "bfloat16" if prefers_bf16() else "float32"


def step_times_ms(network: nn.Module, mode: Mode, *, batch: int) -> tuple[float, float]:
    """Of a step as torch makes it, and of one while a mode is entered.

    Both take turns, on noise in channels-last memory.
    """
    store_channels_last(network.train())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,))
    seconds: tuple[list[float], list[float]] = ([], [])
    modes: tuple[Mode, Mode] = (nullcontext(), mode)
    for turn in range(WARMUP + TURNS):
        # Neither way is always the first.
        for index in (0, 1) if turn % 2 else (1, 0):
            start_s = time.perf_counter()
            _step(network, images, labels, optimizer, modes[index])
            seconds[index].append(time.perf_counter() - start_s)
    plain_s, other_s = (median(times[WARMUP:]) for times in seconds)
    return plain_s * 1e3, other_s * 1e3


def _step(
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
