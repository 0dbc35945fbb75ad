"""The command line: the only place of the library that prints."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ofa_deploy import cli_train
from ofa_deploy.errors import DeployError

app = typer.Typer(
    help="Specialise a once-for-all supernet to a device and a latency budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console(stderr=True)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option(help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Specialise a once-for-all supernet to a device and a latency budget."""


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder, .zip or .npz of images.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    space: Annotated[
        str, typer.Option(help=f"{', '.join(cli_train.SPACE_NAMES)} or a JSON file.")
    ] = "mbv3-small",
    resume: Annotated[bool, typer.Option(help="Continue the run in --out.")] = False,
    skip_bad: Annotated[
        bool, typer.Option(help="Leave out images that cannot be read.")
    ] = False,
    epochs_scale: Annotated[
        float, typer.Option(help="Multiply every phase's epochs.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    stop_after: Annotated[
        str | None, typer.Option(help="Stop after this phase; --resume goes on.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train a supernet by progressive shrinking."""
    cli_train.train(
        data_path=data,
        space_name=space,
        out=out,
        resume=resume,
        skip_bad=skip_bad,
        epochs_scale=epochs_scale,
        batch_size=batch_size,
        stop_after=stop_after,
        threads=threads,
        console=_console,
    )


def main() -> None:
    """Run the command line; errors end with a message and exit code 1."""
    debug = "--debug" in sys.argv
    try:
        app()
    except DeployError as error:
        if debug:
            raise
        _console.print(f"[red]error:[/] {error}", highlight=False)
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        _console.print(f"[red]error:[/] {error}", highlight=False)
        sys.exit(1)
