"""Trainings stopped half way, kept so that another machine can go on with them.

    python benchmarks/under_way.py build/benchmarks/tas/tas-found-0-…

copies the checkpoint and the log of each folder to `under_way/`, weights and momentum
as float16. Every stage looks there for what its own folder does not have, and removes
what it has finished.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from inputs import add_work
from torch import Tensor

from ofa_deploy.train.checkpoint import read_checkpoint, write_checkpoint
from ofa_deploy.train.loop import CHECKPOINT_FILE

# Of masks and distributions: some lie so near that rounding would decide them.
EXACT = (".latent", ".logits")
UNDER_WAY = Path(__file__).parent / "under_way"


def put(folder: Path, *, work: Path) -> None:
    """Keep a training's state where it is committed.

    Args:
        folder: Of the training, in that of the benchmarks' work.
        work: That.
    """
    kept = UNDER_WAY / folder.resolve().relative_to(work.resolve())
    _copy(folder, kept, taken=torch.float32, given=torch.float16)


def fetch(work: Path) -> None:
    """Put what is kept where trainings look for it, unless there is something."""
    for checkpoint in UNDER_WAY.glob(f"**/{CHECKPOINT_FILE}"):
        kept = checkpoint.parent
        folder = work / kept.relative_to(UNDER_WAY)
        if not (folder / CHECKPOINT_FILE).exists():
            _copy(kept, folder, taken=torch.float16, given=torch.float32)


def forget(folder: Path) -> None:
    """Remove a finished training, which leaves its result elsewhere."""
    for kept in UNDER_WAY.glob(f"**/{folder.name}"):
        shutil.rmtree(kept)


def _copy(
    source: Path, target: Path, *, taken: torch.dtype, given: torch.dtype
) -> None:
    """A training's folder, in another number format."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name != CHECKPOINT_FILE:
            shutil.copyfile(file, target / file.name)

    def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor.to(given)
            if tensor.dtype == taken and not name.endswith(EXACT)
            else tensor
            for name, tensor in tensors.items()
        }

    checkpoint = read_checkpoint(source / CHECKPOINT_FILE)
    # The checkpoint last: without it there is nothing to go on with.
    write_checkpoint(
        target / CHECKPOINT_FILE,
        replace(
            checkpoint,
            weights=converted(checkpoint.weights),
            momentum=converted(checkpoint.momentum),
        ),
    )


def main() -> None:
    """Keep the trainings that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_work(parser)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    args = parser.parse_args()
    for folder in args.folders:
        put(folder, work=args.work)


if __name__ == "__main__":
    main()
