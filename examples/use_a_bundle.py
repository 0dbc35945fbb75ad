"""Open a bundle, check that nothing changed, and classify an image.

    python examples/use_a_bundle.py build/example-bundle --image photo.jpg

`examples/specialize_for_a_budget.py` makes such a bundle. Without an image, one is
generated, of which the model can know nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ofa_deploy import Bundle, DeployError


def generated_image() -> NDArray[np.uint8]:
    """Blue above, green below, `(32, 32, 3)`."""
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:16] = (110, 160, 230)
    image[16:] = (70, 130, 50)
    return image


def main() -> None:
    """Check, then predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=Path("build/example-bundle")
    )
    parser.add_argument("--image", type=Path)
    args = parser.parse_args()
    try:
        # Opening compares every file with its digest.
        with Bundle.open(args.bundle) as bundle:
            report = bundle.check()
            print(
                f"intact; outputs within {report.max_relative_error:.1e} of the "
                f"reference on {report.image_count} images"
            )
            prediction = bundle.predict(args.image or generated_image())
    except DeployError as error:
        raise SystemExit(str(error)) from error
    shares = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    for name, share in shares[:3]:
        print(f"{share:7.2%}  {name}")


if __name__ == "__main__":
    main()
