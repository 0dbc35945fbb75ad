"""Runs an example as it stands, but has the machine measured quickly.

    python quick_example.py EXAMPLE [WORDS…]

What an example finds is not looked at, only that it does; the minute or two that a
table of full precision takes are `make demo`'s, which every user runs. Images to
calibrate with are fewer, too; what is handed out is certified as ever.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ofa_deploy import profiling
from profilers import MeasureSettings
from tests.support.quick_export import export_quickly


def measure_quickly(patch: pytest.MonkeyPatch) -> None:
    """Tables and widths of kernels of less precision."""
    quick = replace(
        MeasureSettings.screen(), visits=6, max_seconds=1.0, pass_seconds=0.0
    )
    # Before other modules take them from there.
    patch.setattr(profiling, "PROFILE_SETTINGS", quick)
    patch.setattr(MeasureSettings, "screen", lambda: quick)


def synthesise_quickly(patch: pytest.MonkeyPatch) -> None:
    """Calibration images, few and less like those that were trained on."""
    from ofa_deploy.train import finish
    from ofa_deploy.train.calibration_set import synthesise_images

    def few(*args: Any, count: int, **others: Any) -> NDArray[np.uint8]:
        return synthesise_images(*args, count=count // 5, steps=60, **others)

    patch.setattr(finish, "synthesise_images", few)


def main() -> None:
    """Run it."""
    sys.argv = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        example = Path(sys.argv[0]).name
        if example == "train_your_own.py":
            synthesise_quickly(patch)
        if example == "shrink_your_own.py":
            export_quickly(patch)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
