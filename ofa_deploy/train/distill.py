"""Losses: hard labels with smoothing, and soft labels from the full network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def supernet_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    teacher_logits: Tensor | None,
    label_smoothing: float,
    distillation_ratio: float,
) -> Tensor:
    """`CE_smooth(logits, targets) + ratio · CE(logits, softmax(teacher))`.

    The published form (Once-for-All code): temperature 1, and smoothing stays on.

    Args:
        logits: `(N, classes)`.
        targets: Class probabilities of the labels, `(N, classes)`.
        teacher_logits: `(N, classes)` or None for no teacher.
        label_smoothing: Share of the label spread over all classes.
        distillation_ratio: Weight of the teacher's term.
    """
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if teacher_logits is None:
        return loss
    soft = F.softmax(teacher_logits, dim=1)
    return loss + distillation_ratio * F.cross_entropy(logits, soft)
