"""What the converter of users' own modules refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ofa_deploy.errors import ModelRejected
from ofa_deploy.nn.litert_module import convert_module


class Undecided(nn.Module):
    """Does what its images say; no graph can be made of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One of two."""
        return x.mean(dim=(2, 3)) if x.sum() > 0 else x.amax(dim=(2, 3))


def test_a_module_that_is_no_graph_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="Undecided cannot be converted to"):
        convert_module(Undecided(), input_shape=(1, 3, 8, 8), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
