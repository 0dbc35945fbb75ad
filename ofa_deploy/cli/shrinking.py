"""`ofa-deploy shrink`: a network of one's own, from a Python file and its weights."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ofa_deploy.errors import DataError, MissingDependency
from ofa_deploy.preprocess import Normalisation

if TYPE_CHECKING:
    from torch import nn

    from ofa_deploy.shrink.recipe import ShrinkRecipe
    from ofa_deploy.train.loop import LoopProgress

BAR_WIDTH = 40


def load_model(name: str, weights: Path | None) -> nn.Module:
    """The network that `WHERE:NAME` builds, with weights of a .safetensors file.

    Args:
        name: A Python file or a module that can be imported, and a function or class of
            it that is called with nothing. It is run: give only what you trust. It may
            import what lies beside it, of a module what lies in the current folder.
        weights: By the names of `state_dict`; None for what `NAME` gives.

    Raises:
        DataError: There is no such file, function or weights, or they do not fit.
        MissingDependency: torch is not installed.
    """
    where, _, attribute = name.rpartition(":")
    is_file = where.endswith(".py")
    if not (attribute and where) or (is_file and not Path(where).is_file()):
        raise DataError(
            f"--model {name!r} names no network; give a Python file, or a module, and "
            "what builds the network in it, such as net.py:build or package.net:build"
        )
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("PyTorch", extra="shrink") from error
    try:
        module = _imported_file(Path(where)) if is_file else _imported(where)
        network = getattr(module, attribute)()
    except DataError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise DataError(
            f"{name} cannot be built: {type(error).__name__}: {error}. It is called "
            "without arguments"
        ) from error
    if not isinstance(network, torch.nn.Module):
        raise DataError(
            f"{name} gives {type(network).__name__}; a torch.nn.Module is needed"
        )
    if weights is not None:
        _load_weights(network, weights)
    return network


def _imported_file(path: Path) -> ModuleType:
    """A Python file as a module."""
    module = _imported(path.stem, beside=path.resolve().parent)
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != path.resolve():
        raise DataError(
            f"{path} has the name of another module, {found or path.stem}; rename it"
        )
    return module


def _imported(name: str, *, beside: Path | None = None) -> ModuleType:
    """A module, by its name, which processes that judge candidates import it by, too.

    Args:
        name: Of the module.
        beside: Folder that it is in; None for the current one, or an installed module.
    """
    folder = str(beside or Path.cwd())
    if folder not in sys.path:  # which such processes are started with
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _load_weights(network: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as .safetensors: {error}. docs/shrinking.md says "
            "how a .pt becomes one"
        ) from error
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(
            f"{path} holds weights of another network: {error}. Give those of what "
            "--model builds"
        ) from error


def normalisation(mean: str | None, std: str | None) -> Normalisation | None:
    """Of pixels of 0 to 1, as frameworks give it, for pixels of 0 to 255.

    Raises:
        DataError: One of them is missing, or is no three numbers.
    """
    if mean is None and std is None:
        return None
    return Normalisation(
        mean=_three("--mean", mean, least=0.0), std=_three("--std", std, least=1 / 255)
    )


def _three(name: str, given: str | None, *, least: float) -> tuple[float, float, float]:
    """Three numbers for pixels of 0 to 1, as for pixels of 0 to 255."""
    try:
        red, green, blue = (float(part) for part in (given or "").split(","))
    except ValueError:
        red = green = blue = math.nan
    if not all(least <= value <= 1 for value in (red, green, blue)):
        raise DataError(
            f"{name} {given!r}: give both --mean and --std, each as three numbers for "
            "pixels of 0 to 1, such as 0.49,0.48,0.45"
        )
    return 255 * red, 255 * green, 255 * blue


def recipe(
    method: str,
    search_epochs: int,
    finetune_epochs: int,
    batch_size: int,
    evaluations: int,
    rate: float,
) -> ShrinkRecipe:
    """The default recipe, of another length."""
    from ofa_deploy.shrink.legr import LegrSettings
    from ofa_deploy.shrink.recipe import default_shrink_recipe

    found = default_shrink_recipe(
        method=method,
        search_epochs=search_epochs,
        finetune_epochs=finetune_epochs,
        batch_size=batch_size,
        rate=rate,
    )
    population = min(LegrSettings().population, evaluations)
    legr = LegrSettings(evaluations=evaluations, population=population)
    return replace(found, legr=legr)


def drawn(progress: LoopProgress) -> RenderableType:
    """A training as it goes: its last figures, and what each group keeps."""
    accuracy = "" if progress.accuracy is None else f" · {progress.accuracy:.2%}"
    line = Text(
        f"epoch {progress.epoch}/{progress.epochs} · loss {progress.loss:.3f}"
        f"{accuracy} · {progress.images_per_s:.0f} images/s"
    )
    remarks = [Text(remark, style="yellow") for remark in progress.remarks]
    table = [_kept_table(progress.kept)] if progress.kept else []
    return Group(line, *remarks, *table)


def _kept_table(kept: Mapping[str, tuple[int, int]]) -> Table:
    table = Table("group", "kept", "", box=None)
    for name, (count, had) in kept.items():
        bar = ProgressBar(total=had, completed=count, width=BAR_WIDTH)
        table.add_row(name, f"{count}/{had}", bar)
    return table
