"""What a command calls the library with, which is then not called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ofa_deploy import api, fleet
from ofa_deploy.cli import main


class Called(Exception):
    """With what."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given


def given_by(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of the call that a command's words make, by their names."""

    def specialize(device: str, **others: Any) -> None:
        raise Called(device=device, **others)

    def specialize_fleet(devices: dict[str, float], **others: Any) -> None:
        raise Called(devices=devices, **others)

    with monkeypatch.context() as patch:
        patch.setattr(api, "specialize", specialize)
        patch.setattr(fleet, "specialize_fleet", specialize_fleet)
        patch.setattr("sys.argv", ["ofa-deploy", "--debug", *words])
        with pytest.raises(Called) as called:
            main()
    return called.value.given
