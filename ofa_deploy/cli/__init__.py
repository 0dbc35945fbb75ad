"""The command line: the only place of the library that prints."""

from __future__ import annotations

import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ofa_deploy.cli import bundles, measuring, shrinking
from ofa_deploy.cli import train as training
from ofa_deploy.cli.options import (
    AcceptDrift,
    AsJson,
    BundleFolder,
    Device,
    EvalData,
    LatencyMs,
    Out,
    PeakMemoryMb,
    Percentile,
    RateHz,
    Reprofile,
    Seed,
    SizeBytes,
    SupernetName,
    SustainedS,
    TableFile,
    Threads,
    on_drift_of,
)
from ofa_deploy.cli.outputs import require_folder
from ofa_deploy.cli.progress import StageBar
from ofa_deploy.cli.tables import (
    show_bundle,
    show_bundle_json,
    show_diagnosis,
    show_feasibility,
    show_fleet,
    show_frontier,
    show_operators,
    show_range,
    show_widths,
)
from ofa_deploy.named_spaces import SPACE_NAMES
from ofa_deploy.profiling import NETWORK_COUNT

app = typer.Typer(
    help="Specialise a once-for-all supernet to a device and a latency budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Paths, bundles and runtimes say what is printed: in them "[/x]" is text, no markup.
_console = Console(stderr=True, highlight=False, markup=False, emoji=False)
_no_console = Console(stderr=True, quiet=True)
# What typer makes of Ctrl-C, without a word.
_INTERRUPTED = 130
# What ends a process at once unless it is handled: a scheduler, a closed terminal.
_ENDING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show an error's traceback.")] = False,
) -> None:
    """Specialise a once-for-all supernet to a device and a latency budget."""


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine is, and what will spoil a measurement on it."""
    from profilers.doctor import examine

    with (_no_console if as_json else _console).status("watching this machine"):
        diagnosis = examine()
    if as_json:
        print(json.dumps(asdict(diagnosis), indent=2, sort_keys=True))
    else:
        show_diagnosis(_console, diagnosis)
    if any(finding.severity == "error" for finding in diagnosis.findings):
        raise typer.Exit(1)


@app.command()
def probe(
    device: Device = "openvino-cpu",
    plot: Annotated[
        Path | None, typer.Option(help="SVG file to draw the answers into.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a runtime makes of operators and widths on this machine."""
    from ofa_deploy.cli.plots import draw_probe, require_plots
    from ofa_deploy.probe import Prober, channel_step
    from ofa_deploy.target import parse_target
    from profilers.backends import get_backend
    from profilers.measurement import MeasureSettings

    target = parse_target(device)
    backend = get_backend(target.backend)
    runtime = backend.runtime(threads=target.threads)
    if plot is not None:
        require_plots()
        require_folder("--plot", plot)
    prober = Prober(
        backend=backend, threads=target.threads, settings=MeasureSettings.screen()
    )
    with StageBar(_no_console if as_json else _console) as bar:
        operators = prober.probe_operators(reporter=bar)
        widths = prober.sweep_widths(reporter=bar)
    step = channel_step(widths)
    if as_json:
        content = {
            "operators": [asdict(fact) for fact in operators],
            "widths": [asdict(fact) for fact in widths],
            "channel_step": step,
        }
        print(json.dumps(content, indent=2, sort_keys=True))
    else:
        show_operators(_console, operators)
        show_widths(_console, widths, step=step)
    if plot is not None:
        title = f"{runtime.backend} {runtime.version}, {runtime.threads} thread(s)"
        draw_probe(operators, widths, step=step, title=title, out=plot)


@app.command()
def profile(
    device: Device = "openvino-cpu",
    supernet: Annotated[
        str | None,
        typer.Option(help="Supernet whose space to measure; default: cifar10-small."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="A space by name, or its .json file, without a supernet."),
    ] = None,
    networks: Annotated[
        int, typer.Option(min=2, help="Whole networks to measure besides the blocks.")
    ] = NETWORK_COUNT,
    evaluate: Annotated[
        int,
        typer.Option(
            min=0, help="Random networks to measure and judge the predictor by."
        ),
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File to save the table to as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the blocks of a space on this machine, and keep the table."""
    measuring.profile(
        device=device,
        supernet=supernet,
        space=space,
        networks=networks,
        evaluate=evaluate,
        out=out,
        console=_console,
        quiet=_no_console,
        as_json=as_json,
    )


@app.command()
def specialize(
    out: Out,
    latency_ms: LatencyMs = None,
    percentile: Percentile = 50,
    size_bytes: SizeBytes = None,
    peak_memory_mb: PeakMemoryMb = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(help="Accuracy to keep, 0..1; the fastest that does is taken."),
    ] = None,
    rate_hz: RateHz = None,
    sustained_s: SustainedS = 0.0,
    threads: Threads = None,
    device: Device = "openvino-cpu",
    supernet: SupernetName = "cifar10-small",
    table: TableFile = None,
    reprofile: Reprofile = False,
    accept_drift: AcceptDrift = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Your images instead of the supernet's own.")
    ] = None,
    eval_data: EvalData = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make a verified bundle whose model keeps your limits on this machine."""
    from ofa_deploy.api import specialize as run

    on_drift = on_drift_of(reprofile=reprofile, accept_drift=accept_drift)
    console = _no_console if as_json else _console
    with StageBar(console) as bar:
        bundle = run(
            device,
            out=out,
            latency_ms=latency_ms,
            percentile=percentile,
            size_bytes=size_bytes,
            peak_memory_mb=peak_memory_mb,
            min_accuracy=min_accuracy,
            rate_hz=rate_hz,
            sustained_s=sustained_s,
            threads=threads,
            supernet=supernet,
            table=table,
            on_drift=on_drift,
            calibration=calibration,
            eval_data=eval_data,
            seed=seed,
            reporter=bar,
            on_feasibility=lambda rows: show_feasibility(console, rows),
        )
    show_bundle_json(bundle) if as_json else show_bundle(_console, bundle)


@app.command()
def shrink(
    model: Annotated[
        str,
        typer.Option(
            help="What builds your network: net.py:build, or package.module:build. It "
            "is run."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Folder, .zip or .npz of labelled images.")
    ],
    out: Out,
    latency_ms: LatencyMs = None,
    percentile: Percentile = 50,
    size_bytes: SizeBytes = None,
    peak_memory_mb: PeakMemoryMb = None,
    rate_hz: RateHz = None,
    sustained_s: SustainedS = 0.0,
    threads: Threads = None,
    compressed_bytes: Annotated[
        int | None,
        typer.Option(help="Largest compressed file that will do; autoprune-weights."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Its weights, as .safetensors.")
    ] = None,
    device: Device = "openvino-cpu",
    method: Annotated[
        str,
        typer.Option(help="How: pas, legr, autoprune, tas, or autoprune-weights."),
    ] = "pas",
    search_epochs: Annotated[
        int, typer.Option(min=1, help="Passes while widths are searched; not of legr.")
    ] = 10,
    evaluations: Annotated[
        int, typer.Option(min=1, help="Candidates that legr judges.")
    ] = 400,
    lowest_share: Annotated[
        float | None,
        typer.Option(
            help="Of legr: share of the latency at which it ranks; with one --work, "
            "budgets above it are cut from one search."
        ),
    ] = None,
    finetune_epochs: Annotated[
        int, typer.Option(min=1, help="Passes over what was found.")
    ] = 30,
    distill: Annotated[
        bool, typer.Option(help="Let your network teach what is left of it.")
    ] = True,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Of the inputs your network was trained with, as 0.49,0.48,0.45 "
            "for pixels of 0 to 1; default: the images' own."
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Likewise, as 0.25,0.24,0.26.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Accuracy to keep besides, 0..1.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 256,
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Factor on the learning rates; 0.1 or less for what was trained on "
            "many other images, or with small batches."
        ),
    ] = 1.0,
    eval_data: EvalData = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints; the same command goes on from it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Shrink a network of your own to a budget on this machine."""
    from ofa_deploy.api import specialize as run

    console = _no_console if as_json else _console
    network = shrinking.load_model(model, weights)
    with StageBar(console) as bar:
        bundle = run(
            device,
            model=network,
            method=method,
            data=data,
            out=out,
            latency_ms=latency_ms,
            percentile=percentile,
            size_bytes=size_bytes,
            compressed_bytes=compressed_bytes,
            peak_memory_mb=peak_memory_mb,
            min_accuracy=min_accuracy,
            rate_hz=rate_hz,
            sustained_s=sustained_s,
            threads=threads,
            eval_data=eval_data,
            normalisation=shrinking.normalisation(mean, std),
            recipe=replace(
                shrinking.recipe(
                    method,
                    search_epochs,
                    finetune_epochs,
                    batch_size,
                    evaluations,
                    learning_rate,
                ),
                distill=distill,
                lowest_share=lowest_share,
            ),
            work=work,
            reporter=bar,
            on_training_progress=lambda stage, progress: bar.show_below(
                shrinking.drawn(progress)
            ),
        )
    show_bundle_json(bundle) if as_json else show_bundle(_console, bundle)


@app.command()
def fleet(
    device: Annotated[
        list[str],
        typer.Option(
            help="A runtime of this machine and its budget in ms, such as "
            "openvino-cpu=0.5; once for each."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the bundles; new or empty.")],
    max_models: Annotated[
        int | None, typer.Option(help="Different networks at most.")
    ] = None,
    supernet: SupernetName = "cifar10-small",
    reprofile: Reprofile = False,
    accept_drift: AcceptDrift = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Your images instead of the supernet's own.")
    ] = None,
    eval_data: EvalData = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make a bundle for each of several devices, of a few networks in all."""
    from ofa_deploy.fleet import specialize_fleet

    on_drift = on_drift_of(reprofile=reprofile, accept_drift=accept_drift)
    with StageBar(_no_console if as_json else _console) as bar:
        found = specialize_fleet(
            bundles.budgets_by_device(device),
            out=out,
            max_models=max_models,
            supernet=supernet,
            calibration=calibration,
            eval_data=eval_data,
            on_drift=on_drift,
            seed=seed,
            reporter=bar,
        )
    if as_json:
        content = {"path": str(found.path), "members": list(map(asdict, found.members))}
        print(json.dumps(content, indent=2, sort_keys=True))
    else:
        show_fleet(_console, found)


@app.command()
def frontier(
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path(
        "frontier.html"
    ),
    device: Device = "openvino-cpu",
    supernet: SupernetName = "cifar10-small",
    table: TableFile = None,
    reprofile: Reprofile = False,
    accept_drift: AcceptDrift = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show all that a supernet offers on this machine: latency, accuracy and size."""
    from ofa_deploy.fronts import frontier as find

    require_folder("--out", out)
    on_drift = on_drift_of(reprofile=reprofile, accept_drift=accept_drift)
    with StageBar(_no_console if as_json else _console) as bar:
        found = find(
            device,
            supernet=supernet,
            table=table,
            on_drift=on_drift,
            seed=seed,
            reporter=bar,
        )
        found.write_report(out)
    if as_json:
        content = [asdict(network) for network in found.networks]
        print(json.dumps({"report": str(out), "networks": content}, indent=2))
    else:
        show_frontier(_console, found.networks)
        _console.print(f"the whole front is in {out}")


@app.command()
def demo(
    out: Out,
    device: Device = "openvino-cpu",
    as_json: AsJson = False,
) -> None:
    """Show what is reachable here, and specialise for a budget in its middle."""
    from ofa_deploy.bundle import require_output
    from ofa_deploy.pipeline import Specializer

    require_output(out)
    console = _no_console if as_json else _console
    with StageBar(console) as bar:
        # A first look must not end with a request to profile.
        session = Specializer(device, on_drift="reprofile", reporter=bar)
        session.require_current()
    reachable = session.reachable()
    show_range(console, reachable)
    budget_ms = round(reachable.middle_ms, 3)
    console.print(f"specialising for {budget_ms} ms, in the middle of it")
    with StageBar(console) as bar:
        session.reporter = bar
        bundle = session.specialize(budget_ms, out=out)
    show_bundle_json(bundle) if as_json else show_bundle(console, bundle)


@app.command()
def check(bundle: BundleFolder, as_json: AsJson = False) -> None:
    """Check a bundle's digests, and its outputs on this machine's runtime."""
    bundles.check(bundle, console=_console, as_json=as_json)


@app.command()
def bench(bundle: BundleFolder, as_json: AsJson = False) -> None:
    """Time a bundle's model again, here and now."""
    bundles.bench(bundle, console=_console, quiet=_no_console, as_json=as_json)


@app.command()
def assert_latency(
    bundle: BundleFolder,
    max_ms: Annotated[float, typer.Option(help="Latency to keep, in milliseconds.")],
    percentile: Annotated[
        int | None,
        typer.Option(help="Of the runs it speaks of; default: as the bundle was made."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fail with exit code 1 if a bundle's model is slower here and now."""
    bundles.assert_latency(
        bundle,
        max_ms=max_ms,
        percentile=percentile,
        console=_console,
        quiet=_no_console,
        as_json=as_json,
    )


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder, .zip or .npz of images.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    space: Annotated[
        str, typer.Option(help=f"{', '.join(SPACE_NAMES)} or a JSON file.")
    ] = "mbv3-small",
    resume: Annotated[bool, typer.Option(help="Continue the run in --out.")] = False,
    skip_bad: Annotated[
        bool, typer.Option(help="Leave out images that are damaged.")
    ] = False,
    epochs_scale: Annotated[
        float, typer.Option(help="Multiply every phase's epochs.")
    ] = 1.0,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step; by default the recipe's.")
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(
            help="Stop after this phase (full, kernel, depth1, depth2, width1, width2, "
            "width3); --resume goes on."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; by default all that may be used."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a supernet by progressive shrinking."""
    training.train(
        data_path=data,
        space_name=space,
        out=out,
        resume=resume,
        skip_bad=skip_bad,
        epochs_scale=epochs_scale,
        batch_size=batch_size,
        stop_after=stop_after,
        threads=threads,
        console=_no_console if as_json else _console,
        as_json=as_json,
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as people read it, without the line of code that gave it."""
    _console.print("warning:", style="bold yellow", end=" ")
    _console.print(str(message))


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Have what else would end the process at once remove what it has half written."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # others cannot say what signals do
        return
    # Those that nohup has ignored stay ignored.
    handled = [one for one in _ENDING if signal.getsignal(one) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Run the command line; an error ends with its message and exit code 1."""
    from ofa_deploy.errors import DeployError

    warnings.showwarning = _show_warning
    try:
        with _ending_cleanly():
            app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        told = str(error)
        if not isinstance(error, (DeployError, OSError)):
            told = (
                f"{type(error).__name__}: {error}. That should not happen: run it "
                "again with --debug to see where, and report that"
            )
        _console.print("error:", style="bold red", end=" ")
        _console.print(told)
        sys.exit(1)
    except SystemExit as end:
        if end.code in (_INTERRUPTED, *(128 + number for number in _ENDING)):
            _console.print(
                "interrupted: nothing half-written was left. Run the same command "
                "again, `train` with --resume once it has begun: it goes on from there"
            )
        raise
