"""What numbers settings may be, and what is said of others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from ofa_deploy.errors import DeployError, SpaceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Finite numbers between two bounds.

    Args:
        least: The lowest one, or None.
        above: What all are above, or None.
        most: The highest one, or None.
        below: What all are below, or None.
        whole: Whether they are whole ones.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        kind = Integral if self.whole else Real
        # True is a whole number to Python, and a mistake to whoever wrote it here.
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        number = float(value)
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        told = [f"{word} {at:g}" for word, at in bounds.items() if at is not None]
        return f"a {'whole ' if self.whole else ''}number that is {' and '.join(told)}"


COUNT = Range(least=1, whole=True)
WHOLE = Range(least=0, whole=True)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
SHARE = Range(least=0, most=1)
# Of something that is there, and may be all of it; and of what must leave a rest.
PORTION = Range(above=0, most=1)
PART = Range(above=0, below=1)
DECAY = Range(least=0, below=1)


def require_in_range(
    settings: object,
    allowed: Range,
    *names: str,
    optional: bool = False,
    what: str = "",
    error: type[DeployError] = SpaceError,
) -> None:
    """Refuse settings that are no such numbers.

    Args:
        settings: Whose attributes are looked at.
        allowed: What they may be.
        names: Of the attributes.
        optional: Whether they may be None, too.
        what: Whose they are, for people.
        error: Of what is refused.

    Raises:
        DeployError: Of that class; names the first one with its value, and what is
            allowed.
    """
    for name in names:
        value = getattr(settings, name)
        if optional and value is None:
            continue
        if value not in allowed:
            whose = f"{what}: " if what else ""
            raise error(f"{whose}{name}={value!r}; give {allowed}")
