"""Losses: hard labels with smoothing, and soft labels from the full network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def supernet_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    soft_targets: Tensor | None,
    label_smoothing: float,
    distillation_ratio: float,
) -> Tensor:
    """`CE_smooth(logits, targets) + ratio · CE(logits, softmax(teacher))`.

    The published form (Once-for-All code): temperature 1, and smoothing stays on.

    Args:
        logits: `(N, classes)`.
        targets: Class probabilities of the labels, `(N, classes)`.
        soft_targets: The teacher's class probabilities, `(N, classes)`; None for none.
        label_smoothing: Share of the label spread over all classes.
        distillation_ratio: Weight of the teacher's term.
    """
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if soft_targets is None:
        return loss
    return loss + distillation_ratio * F.cross_entropy(logits, soft_targets)
