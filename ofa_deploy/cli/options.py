"""Options that several commands have, and what they say together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ofa_deploy.errors import MeasurementError
from ofa_deploy.pipeline import OnDrift

Device = Annotated[
    str,
    typer.Option(
        help="openvino-cpu, onnxruntime-cpu, litert-cpu, tensorrt-gpu or "
        "tensorrt-rtx-gpu; with threads as 'openvino-cpu?threads=2', quoted."
    ),
]
SupernetName = Annotated[
    str, typer.Option(help="Name in the zoo, or folder of a trained supernet.")
]
Out = Annotated[Path, typer.Option(help="Folder of the bundle; new or empty.")]
LatencyMs = Annotated[float | None, typer.Option(help="Budget in milliseconds.")]
Percentile = Annotated[
    int, typer.Option(help="Of the runs the budget speaks of: 50, 90, 95 or 99.")
]
SizeBytes = Annotated[
    int | None, typer.Option(help="Largest model that will do, in bytes.")
]
PeakMemoryMb = Annotated[
    float | None, typer.Option(help="Memory that loading and running may take.")
]
RateHz = Annotated[
    float | None, typer.Option(help="The application's runs per second.")
]
SustainedS = Annotated[
    float, typer.Option(help="Seconds of load before the first timed run.")
]
Threads = Annotated[
    int | None, typer.Option(help="Of one inference; default: the device's, or 1.")
]
EvalData = Annotated[
    Path | None, typer.Option(help="Labelled images to measure accuracy on.")
]
BundleFolder = Annotated[Path, typer.Argument(help="Folder of a bundle.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the search.")]
TableFile = Annotated[
    Path | None, typer.Option(help="Latency table to use; default: find one.")
]
Reprofile = Annotated[
    bool, typer.Option("--reprofile", help="Measure anew if a table is stale.")
]
AcceptDrift = Annotated[
    bool, typer.Option("--accept-drift", help="Use a table that is stale.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and no bars.")]


def on_drift_of(*, reprofile: bool, accept_drift: bool) -> OnDrift:
    """What to do about a table that is stale.

    Raises:
        MeasurementError: Both are asked for.
    """
    if reprofile and accept_drift:
        raise MeasurementError(
            "--reprofile measures a stale table anew, --accept-drift uses it as it is; "
            "give one of them"
        )
    return "reprofile" if reprofile else "accept" if accept_drift else "refuse"
