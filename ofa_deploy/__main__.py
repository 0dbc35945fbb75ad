"""`python -m ofa_deploy`: the command line."""

from __future__ import annotations

from ofa_deploy.cli import main

if __name__ == "__main__":
    main()
