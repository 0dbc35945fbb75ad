"""Runs an example as it stands, but has the machine profiled quickly.

    python quick_example.py EXAMPLE [WORDS…]

What an example finds is not looked at, only that it does; the minute or two that a
table of full precision takes are `make demo`'s, which every user runs.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace

from ofa_deploy import profiling


def main() -> None:
    """Run it."""
    # Before other modules take them from there.
    profiling.PROFILE_SETTINGS = replace(
        profiling.PROFILE_SETTINGS, visits=6, max_seconds=1.0, pass_seconds=0.0
    )
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
