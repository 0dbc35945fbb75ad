"""What the converter of users' own modules refuses."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from ofa_deploy.errors import DeviceError, MissingDependency, ModelRejected
from ofa_deploy.nn import litert_module
from ofa_deploy.nn.litert_module import convert_module, require_converter


class Undecided(nn.Module):
    """Does what its images say; no graph can be made of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One of two."""
        return x.mean(dim=(2, 3)) if x.sum() > 0 else x.amax(dim=(2, 3))


def test_a_module_that_is_no_graph_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="Undecided cannot be converted to"):
        convert_module(Undecided(), input_shape=(1, 3, 8, 8), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("system", "machine", "kind", "cure"),
    [
        ("Linux", "x86_64", MissingDependency, r"pip install .*\[litert-convert\]"),
        ("Linux", "aarch64", DeviceError, "Linux on aarch64; take onnxruntime-cpu"),
    ],
)
def test_a_converter_that_is_missing_is_told_with_what_helps_there(
    system: str,
    machine: str,
    kind: type[Exception],
    cure: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(litert_module, "_CONVERTER", "absent-converter")
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(kind, match=cure):
        require_converter()
