"""Which number format to train in on this CPU."""

from __future__ import annotations

import torch


def prefers_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself, which trains about twice as fast.

    Where it does not, oneDNN converts back and forth and bfloat16 is slower.
    """
    # There is no public query; both names have been there since torch 2.4.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
