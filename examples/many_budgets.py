"""What accuracy costs in time here: one front, many budgets, nothing exported.

    python examples/many_budgets.py --count 12

Latency and accuracy are both predicted; only `Specializer.specialize` exports and
measures. `--report` writes the same as a page to look at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from ofa_deploy import frontier
from ofa_deploy.errors import DeployError


def main() -> None:
    """Find the front, and print the best network within each budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="openvino-cpu")
    parser.add_argument("--count", type=int, default=10, help="budgets")
    parser.add_argument("--report", type=Path, help="HTML file to write")
    args = parser.parse_args()
    with Console(stderr=True).status("searching, or measuring this machine first"):
        found = frontier(args.device, on_drift="reprofile")
    networks = [network for network in found.networks if network.on_latency_front]
    latencies_ms = [network.latency_ms for network in networks]
    budgets_ms = np.geomspace(latencies_ms[0], latencies_ms[-1], args.count)
    print("budget ms  predicted ms  predicted accuracy  network")
    for budget_ms in budgets_ms:
        # Fastest first, and each more accurate than the one before.
        place = max(1, np.searchsorted(latencies_ms, budget_ms, side="right"))
        network = networks[place - 1]
        print(
            f"{budget_ms:9.3f}  {network.latency_ms:12.3f}  {network.accuracy:18.2%}  "
            f"{network.config_id}"
        )
    error = found.session.predictor.residual_ratio
    print(f"predicted latencies are right within {error:.1%} (one standard error)")
    if args.report:
        found.write_report(args.report)
        print(f"the whole front is in {args.report}")


if __name__ == "__main__":
    try:
        main()
    except DeployError as error:
        raise SystemExit(str(error)) from error
