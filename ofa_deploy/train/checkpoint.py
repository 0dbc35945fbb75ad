"""A training run's state on disk: one safetensors file, replaced atomically.

All randomness of a step is derived from (seed, phase, step), so weights, momentum and
the position are the whole state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ofa_deploy.errors import TrainingError
from profilers.files import write_atomically

FORMAT_VERSION = "1"
_MOMENTUM, _EXTRA = "momentum/", "extra/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run stands, and what it belongs to.

    Args:
        phase: Index of the phase.
        step: Steps done in it.
        recipe_sha256: Of the recipe up to the phase's end.
        data_sha256: Of the training images and labels.
        elapsed_s: Time spent so far, over all sittings.
        space_sha256: Of the supernet's space; empty of other networks, and of what an
            earlier version wrote.
    """

    phase: int
    step: int
    recipe_sha256: str
    data_sha256: str
    elapsed_s: float
    space_sha256: str = ""

    def require(
        self,
        *,
        recipe_sha256: str,
        data_sha256: str,
        space_sha256: str = "",
        folder: Path | None,
        cure: str,
    ) -> None:
        """Refuse to go on with another recipe, other data or another space.

        Args:
            recipe_sha256: Of the recipe that is to go on, up to this phase's end.
            data_sha256: Of its data.
            space_sha256: Of its space.
            folder: Where the run is.
            cure: What to do instead.

        Raises:
            TrainingError: Names which of them differs.
        """
        for label, saved, current in (
            ("recipe", self.recipe_sha256, recipe_sha256),
            ("training data", self.data_sha256, data_sha256),
            ("space", self.space_sha256 or space_sha256, space_sha256),
        ):
            if saved != current:
                raise TrainingError(
                    f"the {label} is not the one that {folder} was started with; {cure}"
                )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """Position, weights by name, and momentum by parameter name.

    `extra` is what else a method keeps from step to step, by names of its own.
    """

    position: Position
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)


def require_finite(weights: Mapping[str, Tensor], *, when: str) -> None:
    """Refuse weights that nothing could go on from.

    Args:
        weights: By name.
        when: For people.

    Raises:
        TrainingError: Some are no numbers.
    """
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise TrainingError(
            f"the weights are no numbers any more {when}; lower the learning rate and "
            "start again. The last good checkpoint is kept"
        )


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Save a run's state."""
    tensors: dict[str, Tensor] = {}
    for prefix, others in (
        ("", checkpoint.weights),
        (_MOMENTUM, checkpoint.momentum),
        (_EXTRA, checkpoint.extra),
    ):
        for name, tensor in others.items():
            # A copy: safetensors refuses a module's tensors under two names.
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            tensors[prefix + name] = copied
    metadata = {
        "format_version": FORMAT_VERSION,
        "position": json.dumps(asdict(checkpoint.position), sort_keys=True),
    }
    write_atomically(path, save(tensors, metadata=metadata))


def read_checkpoint(
    path: Path, *, cure: str = "delete it, and do the same again"
) -> Checkpoint:
    """Load a run's state.

    Args:
        path: The file.
        cure: What to do if it is damaged.

    Raises:
        TrainingError: It cannot be read, is no checkpoint, or damaged.
    """
    try:
        # Read at once: the file may be replaced while a training goes on.
        content = path.read_bytes()
        tensors: dict[str, Tensor] = load(content)
        metadata = _metadata(content)
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format version {metadata['format_version']}, not {FORMAT_VERSION}"
            )
        position = Position(**json.loads(metadata["position"]))
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read: {error}. Check its permissions, and the disk"
        ) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{path} is damaged, or of another version ({error}); {cure}"
        ) from error
    return Checkpoint(
        position=position,
        weights={
            k: v for k, v in tensors.items() if not k.startswith((_MOMENTUM, _EXTRA))
        },
        momentum=_under(tensors, _MOMENTUM),
        extra=_under(tensors, _EXTRA),
    )


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _metadata(content: bytes) -> dict[str, str]:
    """Of a safetensors file: its header's length in 8 bytes, then the header."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata
