"""The schedule of progressive shrinking, as values.

Source: Once-for-All (ICLR 2020), section 3.3 and appendix; the published run uses the
same phases with far more epochs on ImageNet.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ofa_deploy.errors import TrainingError
from ofa_deploy.ranges import (
    COUNT,
    DECAY,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SHARE,
    WHOLE,
    Range,
    require_in_range,
)
from ofa_deploy.space import SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stage of progressive shrinking.

    Args:
        name: For people, and for the file that keeps its result.
        epochs: Passes over the training images; 0 leaves the phase out.
        warmup_epochs: Of those, with a rising learning rate.
        peak_learning_rate: Of SGD, after the warm-up; it then falls along a cosine
            to 0. Muon's rate follows it in a fixed ratio.
        subnet_count: Sub-networks trained per step; their gradients are summed.
        sandwich: Whether the largest and the smallest are always among them, the rest
            sampled: the ends of the space gain most, and lift what is between (Yu and
            Huang, "Universally Slimmable Networks", ICCV 2019, section 3.2).
        kernel_choices: How many of the largest kernel sizes are sampled; None for all.
        depth_choices: How many of the largest depths are sampled; likewise.
        expand_choices: How many of the largest expand ratios are sampled; likewise.
        distill: Whether full networks of earlier phases teach.
        teachers: Names of the phases whose full networks teach, by the mean of their
            class probabilities; empty for the first phase's alone.
        cutmix_share: Share of the batches whose images are mixed, 0..1.
        distortion: Strength of random changes of shape and colour, 0..1; for long
            trainings, that would learn the images by heart.
        sorted_expands: Sort channels before the phase, keeping the prefixes of this
            many of the largest expand ratios; None for no sorting.
    """

    name: str
    epochs: int
    warmup_epochs: float = 0.0
    peak_learning_rate: float
    subnet_count: int = 1
    sandwich: bool = False
    kernel_choices: int | None = 1
    depth_choices: int | None = 1
    expand_choices: int | None = 1
    distill: bool = True
    teachers: tuple[str, ...] = ()
    cutmix_share: float = 0.0
    distortion: float = 0.0
    sorted_expands: int | None = None

    def __post_init__(self) -> None:
        def require(allowed: Range, *names: str, optional: bool = False) -> None:
            require_in_range(
                self,
                allowed,
                *names,
                optional=optional,
                what=f"phase {self.name}",
                error=TrainingError,
            )

        choices = ("kernel_choices", "depth_choices", "expand_choices")
        require(WHOLE, "epochs")
        require(COUNT, *choices, "sorted_expands", optional=True)
        require(COUNT, "subnet_count")
        require(NOT_NEGATIVE, "warmup_epochs")
        if 0 < self.epochs <= self.warmup_epochs:
            raise TrainingError(
                f"phase {self.name}: warmup_epochs={self.warmup_epochs:g} of "
                f"epochs={self.epochs}; its rate would never fall. Give fewer"
            )
        require(POSITIVE, "peak_learning_rate")
        require(SHARE, "cutmix_share", "distortion")
        if self.sandwich and self.subnet_count < 2:
            raise TrainingError(
                f"phase {self.name}: subnet_count={self.subnet_count}; a sandwich has "
                "at least 2"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a training run besides the data and the space.

    Args:
        phases: In order.
        batch_size: Images per step.
        momentum: Of SGD, which steps what Muon does not.
        weight_decay: Of SGD.
        muon_rate_ratio: Muon's learning rate over SGD's.
        muon_momentum: Of Muon.
        muon_weight_decay: Of Muon; decoupled, so times its learning rate.
        label_smoothing: Of the hard loss.
        distillation_ratio: Weight of the teacher's loss against the hard one.
        temperature: At which a teacher's knowledge is learned by `knowledge_loss`;
            None for its class probabilities, by `supernet_loss`.
        teacher_share: Of that loss, 0..1.
        crop_padding: Pixels by which training images are shifted at most.
        validation_fraction: Share of the images held out, 0..1.
        seed: Of everything random.
    """

    phases: tuple[Phase, ...]
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    muon_rate_ratio: float = 0.2
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.05
    label_smoothing: float = 0.1
    distillation_ratio: float = 1.0
    temperature: float | None = None
    teacher_share: float = 0.9
    crop_padding: int = 4
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size not in Range(least=2, whole=True):
            raise TrainingError(
                f"batch_size={self.batch_size} must be at least 2: batch norm needs "
                "more than one image"
            )

        def require(allowed: Range, *names: str) -> None:
            require_in_range(self, allowed, *names, error=TrainingError)

        require(DECAY, "momentum", "muon_momentum", "label_smoothing")
        require(
            NOT_NEGATIVE,
            "weight_decay",
            "muon_weight_decay",
            "muon_rate_ratio",
            "distillation_ratio",
        )
        require(SHARE, "teacher_share")
        require(PART, "validation_fraction")
        require(WHOLE, "crop_padding", "seed")
        require_in_range(
            self, POSITIVE, "temperature", optional=True, error=TrainingError
        )
        if not self.phases or self.phases[0].distill:
            raise TrainingError(
                "the first phase trains the teacher and cannot have one itself"
            )
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise TrainingError(
                f"phases {', '.join(names)}: two have one name, by which their results "
                "are kept; give each its own"
            )
        for index, phase in enumerate(self.phases):
            earlier = [other.name for other in self.phases[:index]]
            unknown = [name for name in phase.teachers if name not in earlier]
            if unknown:
                raise TrainingError(
                    f"phase {phase.name}: teachers {', '.join(unknown)} are no earlier "
                    f"phases; there are {', '.join(earlier) or 'none'}"
                )

    def sha256(self, phase_index: int) -> str:
        """Digest of what decides a run up to the end of a phase.

        Later phases are no part of it: they may still change.
        """
        past = replace(self, phases=self.phases[: phase_index + 1])
        content = asdict(past)
        if self.temperature is None:  # nor had they such a loss
            del content["temperature"], content["teacher_share"]
        for phase in content["phases"]:
            # Runs from before there were any stay the same.
            for added in ("teachers", "distortion"):
                if not phase[added]:
                    del phase[added]
            # So do those of when three choices were all that were ever sampled.
            for kind in ("kernel_choices", "depth_choices", "expand_choices"):
                if phase[kind] is None:
                    phase[kind] = 3
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times the epochs, at least 1 a phase."""
        if not 0 < factor < math.inf:
            raise TrainingError(
                f"epochs scale {factor} must be a finite number above 0; 1 is the "
                "recipe's own length"
            )
        phases = tuple(
            replace(
                phase,
                epochs=max(1, round(phase.epochs * factor)) if phase.epochs else 0,
                warmup_epochs=phase.warmup_epochs * factor,
            )
            for phase in self.phases
        )
        return replace(self, phases=phases)


def default_recipe() -> Recipe:
    """Progressive shrinking in 76 epochs, 42 of them on the full network alone.

    The last phase has two teachers: the full network has long come past the first one.
    """
    return Recipe(
        phases=(
            Phase(
                name="full",
                epochs=42,
                warmup_epochs=3.0,
                peak_learning_rate=0.1,
                distill=False,
                cutmix_share=0.5,
            ),
            Phase(
                name="kernel",
                epochs=4,
                warmup_epochs=0.5,
                peak_learning_rate=0.02,
                kernel_choices=None,
                cutmix_share=0.25,
            ),
            Phase(
                name="depth1",
                epochs=1,
                peak_learning_rate=0.01,
                subnet_count=2,
                kernel_choices=None,
                depth_choices=2,
                cutmix_share=0.25,
            ),
            Phase(
                name="depth2",
                epochs=5,
                warmup_epochs=0.5,
                peak_learning_rate=0.02,
                subnet_count=2,
                kernel_choices=None,
                depth_choices=None,
                cutmix_share=0.25,
            ),
            Phase(
                name="width1",
                epochs=2,
                peak_learning_rate=0.01,
                subnet_count=4,
                sandwich=True,
                kernel_choices=None,
                depth_choices=None,
                expand_choices=2,
                sorted_expands=1,
                cutmix_share=0.25,
            ),
            Phase(
                name="width2",
                epochs=14,
                warmup_epochs=0.5,
                peak_learning_rate=0.02,
                subnet_count=4,
                sandwich=True,
                kernel_choices=None,
                depth_choices=None,
                expand_choices=None,
                sorted_expands=2,
                cutmix_share=0.25,
            ),
            Phase(
                name="width3",
                epochs=8,
                warmup_epochs=0.5,
                peak_learning_rate=0.012,
                subnet_count=3,
                sandwich=True,
                kernel_choices=None,
                depth_choices=None,
                expand_choices=None,
                teachers=("full", "width2"),
                cutmix_share=0.25,
            ),
        )
    )


def restrict(space: SearchSpace, phase: Phase) -> SearchSpace:
    """The part of a space that a phase samples: the largest choices of each kind."""
    stages = tuple(
        replace(
            stage,
            kernels=_largest(stage.kernels, phase.kernel_choices),
            depths=_largest(stage.depths, phase.depth_choices),
            expands=_largest(stage.expands, phase.expand_choices),
        )
        for stage in space.stages
    )
    return replace(space, stages=stages)


def _largest(choices: tuple[Any, ...], count: int | None) -> tuple[Any, ...]:
    return choices if count is None else choices[-count:]


def learning_rate(phase: Phase, epoch: float) -> float:
    """Linear warm-up from a fifth of the peak, then a cosine to zero.

    Args:
        phase: Whose rate.
        epoch: Of the phase, from 0.
    """
    peak, warmup = phase.peak_learning_rate, phase.warmup_epochs
    if epoch < warmup:
        return peak * (0.2 + 0.8 * epoch / warmup)
    share = (epoch - warmup) / (phase.epochs - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))
