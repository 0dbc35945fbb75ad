"""Make a bundle that meets a latency budget on this machine.

    python examples/specialize_for_a_budget.py --latency-ms 0.5 --out build/my-bundle

Without a budget, the middle of what is reachable here is taken. The first call on a
machine measures it, which takes one to two minutes; later calls read that table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ofa_deploy import DeployError, Specializer


def main() -> None:
    """Specialise once, and show what the bundle says of itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="openvino-cpu")
    parser.add_argument("--latency-ms", type=float)
    parser.add_argument("--out", type=Path, default=Path("build/example-bundle"))
    args = parser.parse_args()
    console = Console(stderr=True)
    try:
        with console.status("reading the latency table, or measuring this machine"):
            session = Specializer(args.device, on_drift="reprofile")
        reachable = session.reachable()
        print(f"reachable: {reachable.fastest_ms:.3f} to {reachable.slowest_ms:.3f} ms")
        budget_ms = args.latency_ms
        if budget_ms is None:
            budget_ms = round(reachable.middle_ms, 3)
        with console.status(f"specialising for {budget_ms} ms"):
            bundle = session.specialize(budget_ms, out=args.out)
    except DeployError as error:
        # Of a budget that no network keeps it says what the nearest takes.
        raise SystemExit(str(error)) from error
    manifest = bundle.manifest
    print(f"bundle    {bundle.path}")
    print(f"network   {manifest.config_id}, {manifest.cost.mac_count / 1e6:.1f} MMACs")
    print(f"budget    {budget_ms:.3f} ms")
    print(f"predicted {manifest.predicted.ms:.3f} ms")
    print(
        f"measured  {manifest.measured.quiet_ms:.3f} ms in the quiet state, median "
        f"{manifest.measured.median_ms:.3f} ms"
    )
    print(f"accuracy  {manifest.accuracy.value:.2%} ({manifest.accuracy.kind})")


if __name__ == "__main__":
    main()
