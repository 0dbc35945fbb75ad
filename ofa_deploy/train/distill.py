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


def knowledge_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    teacher_share: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`(1 - share) · CE + share · T² · KL(softmax(teacher / T), softmax(logits / T))`.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural
    Network", 2015; with a share of 0.9 and a temperature of 4 in Transformable
    Architecture Search (NeurIPS 2019).

    Args:
        logits: `(N, classes)`.
        targets: Class probabilities of the labels, `(N, classes)`.
        teacher_logits: `(N, classes)`.
        temperature: Above 0.
        teacher_share: 0..1.
        label_smoothing: Share of the label spread over all classes.
    """
    hard = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    soft = F.kl_div(
        (logits / temperature).log_softmax(1),
        (teacher_logits / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - teacher_share) * hard + teacher_share * temperature**2 * soft
