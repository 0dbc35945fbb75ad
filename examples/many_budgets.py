"""What accuracy costs in time here: one session, many budgets, nothing exported.

    python examples/many_budgets.py --count 12

A search takes seconds at most, since latency and accuracy are both predicted; only
`Specializer.specialize` exports and measures.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.progress import track

from ofa_deploy import Specializer


def main() -> None:
    """Search for each budget, and print the best network of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="openvino-cpu")
    parser.add_argument("--count", type=int, default=10, help="budgets")
    args = parser.parse_args()
    console = Console(stderr=True)
    with console.status("reading the latency table, or measuring this machine"):
        session = Specializer(args.device)
    reachable = session.reachable()
    budgets_ms = np.geomspace(
        1.02 * reachable.fastest_ms, reachable.slowest_ms, args.count
    )
    print("budget ms  predicted ms  predicted accuracy  network")
    for budget_ms in track(budgets_ms, "searching", console=console, transient=True):
        found = session.search(float(budget_ms))
        config = session.supernet.space.decode(found.genomes[0])
        print(
            f"{budget_ms:9.3f}  {found.latency_ms[0]:12.3f}  "
            f"{found.accuracy[0]:18.2%}  {config.id}"
        )
    error = session.predictor.residual_ratio
    print(f"predicted latencies are right within {error:.1%} (one standard error)")


if __name__ == "__main__":
    main()
