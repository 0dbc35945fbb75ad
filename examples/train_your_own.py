"""Train a supernet on your own images, then specialise it (needs torch).

    python examples/train_your_own.py --data images/ --out runs/mine

`images/` holds one folder per class. The command line does the same:

    ofa-deploy train --data images/ --out runs/mine/run
    ofa-deploy specialize --supernet runs/mine/run/supernet --latency-ms 0.5 --out mine

Without `--data`, a few tiny networks learn generated images of three colours, in a
minute or two. An interrupted call goes on; remove a bundle that is there already.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ofa_deploy import DeployError, Specializer
from ofa_deploy.cli import app
from ofa_deploy.families import mbv3
from ofa_deploy.space_file import encode_space

COLOURS = {"blue": (60, 90, 200), "green": (60, 180, 70), "red": (200, 60, 50)}


def write_images(folder: Path, *, per_class: int = 60) -> None:
    """Noisy patches of 16×16 pixels, one folder per class; always the same."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            patch = (colour + rng.normal(0, 40, (16, 16, 3))).clip(0, 255)
            Image.fromarray(np.uint8(patch)).save(folder / name / f"{index:03}.png")


def write_tiny_space(path: Path) -> None:
    """A space of a dozen networks; any `SearchSpace` can be written like this."""
    space = mbv3.small(class_count=len(COLOURS))
    stage = replace(space.stages[0], out_channels=16, expands=(1, 2), depths=(1, 2))
    head = replace(space.head, expand_channels=64, feature_channels=64)
    space = replace(space, stem=replace(space.stem, out_channels=8), head=head)
    space = replace(space, name="tiny", resolutions=(12, 16), stages=(stage,))
    path.write_text(json.dumps(encode_space(space)), encoding="utf-8")


def main() -> None:
    """Train, then specialise for the middle of what is reachable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/my-supernet"))
    parser.add_argument("--epochs-scale", type=float, default=1.0)
    args = parser.parse_args()
    run, images = args.out / "run", args.data or args.out / "images"
    words = ["--out", str(run), "--epochs-scale", str(args.epochs_scale)]
    words += ["--data", str(images), *(["--resume"] if run.exists() else [])]
    if args.data is None:
        write_images(images)
        write_tiny_space(args.out / "space.json")
        words += ["--batch-size", "32", "--space", str(args.out / "space.json")]
    try:
        app(["train", *words], standalone_mode=False)
        device, found = "openvino-cpu", run / "supernet"
        session = Specializer(device, supernet=found, on_drift="reprofile")
        middle_ms = session.reachable().middle_ms
        bundle = session.specialize(middle_ms, out=args.out / "bundle")
    except DeployError as error:
        raise SystemExit(str(error)) from error
    measured, accuracy = bundle.manifest.measured, bundle.manifest.accuracy
    print(f"{bundle.path}: {measured.quiet_ms:.3f} ms, accuracy {accuracy.value:.2%}")


if __name__ == "__main__":
    main()
