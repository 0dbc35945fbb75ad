"""Work orders: what a device is asked to measure, and how."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

from profilers.measurement import MeasureSettings

__all__ = ["DEFAULT_LIMIT_S", "WorkOrder"]

# Models open at a time. Hundreds would not fit into a board's memory; far fewer would
# be seen again and again within one phase of the machine.
GROUP_SIZE = 64

# A model that does nothing for so long is taken to hang: loading is the longest.
DEFAULT_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """Models to measure against each other, and how.

    Attributes:
        names: Of the models; all different.
        backend: As `get_backend` takes it.
        threads: Of one inference.
        settings: How carefully; `max_seconds` bounds the extra visits of one execution,
            for every 64 models.
        limit_s: Time after which a silent worker is stopped, and its model failed.
        group_size: Models open at a time.
        anchor_name: The anchor model, one of `names`: it is with every group, in every
            pass, and ties what was measured at different times together. None to have
            none.
    """

    names: tuple[str, ...]
    backend: str
    threads: int
    settings: MeasureSettings
    limit_s: float = DEFAULT_LIMIT_S
    group_size: int = GROUP_SIZE
    anchor_name: str | None = None

    @property
    def digest(self) -> str:
        """Of the models' names, whatever their order."""
        return hashlib.sha256(json.dumps(sorted(self.names)).encode()).hexdigest()[:16]

    @property
    def grouped_names(self) -> tuple[str, ...]:
        """The models that take turns: all but the anchor model, if there are others."""
        others = tuple(name for name in self.names if name != self.anchor_name)
        return others or self.names

    @property
    def extra_s(self) -> float:
        """Time for extra visits: that of the settings for every 64 models."""
        return self.settings.max_seconds * math.ceil(len(self.names) / GROUP_SIZE)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"{len(self.names)} models with {len(set(self.names))} different "
                "names; give at least one model, and each its own name"
            )
        if self.anchor_name is not None and self.anchor_name not in self.names:
            raise ValueError(
                f"anchor_name={self.anchor_name!r} is none of the models; name one"
            )
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}; give at least 1")
        if not self.limit_s > 0:
            raise ValueError(f"limit_s={self.limit_s}; give a time above 0")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}; give at least 1")
