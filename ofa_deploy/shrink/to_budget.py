"""From a user's network, data and a budget to a verified bundle."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import torch
from torch import nn

from ofa_deploy.assembly import assemble_bundle, require_classes
from ofa_deploy.bundle import Bundle, require_output
from ofa_deploy.constraints import Constraints
from ofa_deploy.dataset import ImageSet, load_images, split_validation
from ofa_deploy.errors import (
    BundleError,
    DataError,
    SpaceError,
    TrainingError,
)
from ofa_deploy.preprocess import Normalisation, require_pixel_scale
from ofa_deploy.report.page import REPORT_FILE
from ofa_deploy.report.shrunk import ShrinkHistory, shrunk_report
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.shrink.by_channels import ByChannels
from ofa_deploy.shrink.by_weights import ByWeights
from ofa_deploy.shrink.device_prices import (
    DevicePrices,
    measure_prices,
    runtime_step,
)
from ofa_deploy.shrink.finetuning import TrainingCallback, ignore_progress
from ofa_deploy.shrink.methods import DECIDING_SETTING
from ofa_deploy.shrink.own_network import OwnNetwork, warn_if_by_chance
from ofa_deploy.shrink.recipe import (
    METHODS,
    Method,
    ShrinkRecipe,
    default_shrink_recipe,
)
from ofa_deploy.shrink.shrinking import Shrinking, Shrunk, Source
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.table_files import cache_folder
from ofa_deploy.target import parse_target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LOG_FILE
from ofa_deploy.verify import require_memory_gauge, require_time_for
from ofa_deploy.work_folder import require_outside
from profilers.backends import get_backend

HISTORY_FILE = "shrink.json"
# Errors of disks and permissions; others may be of what a caller handed in.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


def shrink(
    model: nn.Module,
    *,
    device: str,
    constraints: Constraints,
    method: str,
    data: str | Path | ImageSet,
    out: str | Path,
    threads: int | None = None,
    eval_data: str | Path | ImageSet | None = None,
    normalisation: Normalisation | None = None,
    recipe: ShrinkRecipe | None = None,
    work: str | Path | None = None,
    reporter: Reporter | None = None,
    on_progress: TrainingCallback = ignore_progress,
    executor: Executor | None = None,
) -> Bundle:
    """Shrink a network to a budget on a device; return what was shown to keep it.

    Args:
        model: Trained, from images `(N, 3, H, W)` to logits `(N, classes)`. Not
            changed.
        device: Such as `openvino-cpu`.
        constraints: What is asked for; a latency or a rate must be among it, or for
            `autoprune-weights` a compressed size.
        method: `pas`, `legr`, `autoprune` or `tas`, which take channels, or
            `autoprune-weights`.
        data: Labelled images of the network's input size, to train on.
        out: Folder of the bundle; must not exist, or be empty.
        threads: Of one inference, instead of naming them in `device`.
        eval_data: Labelled images to measure the accuracy on; None takes those of
            `data` that are held out, of `legr` the half that ranked no candidates.
        normalisation: Of the network's inputs; None measures the training images, as
            `ofa-deploy` itself trains.
        recipe: How; None for `default_shrink_recipe`.
        work: Folder of checkpoints, from which a call that was killed goes on; None
            for one beside `out`.
        reporter: Told of stages.
        on_progress: Called with what is trained, and how far it is.
        executor: Judges LeGR's candidates; None for processes, one a core.

    Raises:
        SpaceError: No such method, or the limit that it shrinks to is not given.
        TraceError: Names the layer whose channels cannot be told.
        BundleError: `out` is not free, `work` is in it, or nothing can be written.
        DataError: The images do not fit the network, or hold `out` or `work`.
        TrainingError: The recipe does not fit the images.
        InfeasibleBudget: No form of the network keeps the limits.
        ModelRejected: The network cannot be written for the device.
        MissingDependency: A package that this needs is not installed.
    """
    if method not in METHODS:
        raise SpaceError(f"method={method!r}; give one of {', '.join(METHODS)}")
    known: Method = method
    if constraints.peak_memory_mb is not None:
        require_memory_gauge()
    require_time_for(constraints)
    _require_limit(known, constraints)
    if normalisation is not None:
        require_pixel_scale(normalisation)
    out = Path(out).resolve()
    require_output(out)
    if work is None:
        work = out.with_name(f"{out.name}.work")
    work = Path(work).resolve()
    _require_apart(out, work, data=(data, eval_data))
    target = parse_target(device, threads=threads)
    get_backend(target.backend).runtime(threads=target.threads)
    recipe = recipe or default_shrink_recipe(method=known)
    reporter = reporter or Silent()
    read = _read(data, reporter)
    images = TrainingImages(read, recipe.search, normalisation=normalisation)
    images.for_recipe(recipe.finetune)
    if known.startswith("autoprune"):
        images.parted(recipe.deciding_share)
    if known == "tas":
        images.parted(recipe.tas.deciding_share, setting=DECIDING_SETTING)
    ranked_on, evaluation = images.validation, images.validation
    if eval_data is not None:
        evaluation = _read(eval_data, reporter)
    elif known == "legr":  # what chose the channels does not say how good they are
        ranked_on, evaluation = _halves(images.validation)
    height, width = read.images.shape[1:3]
    if height != width:
        raise DataError(
            f"the images are {width}×{height}; a network is priced for square ones. "
            "Crop or resize them"
        )
    own = OwnNetwork.of(
        model,
        resolution=height,
        normalisation=images.normalisation,
        class_names=read.class_names,
        narrowed=known != "autoprune-weights",
    )
    if known == "tas":
        own = searched_by_tas(own, projects=recipe.tas.projects)
    require_classes(evaluation, Source(own=own, sha256=""))
    if recipe.distill or not (known == "tas" and recipe.tas.fresh):  # it is needed
        warn_if_by_chance(own, images.validation)
    call = Shrinking(
        own=own,
        method=known,
        target=target,
        constraints=constraints,
        recipe=recipe,
        images=images,
        ranked_on=ranked_on,
        evaluation=evaluation,
        work=work,
        reporter=reporter,
        on_progress=on_progress,
        executor=executor,
    )
    with (
        _writing(out, work, cache := cache_folder()),
        # What is drawn has seeds of its own; the caller's generator stays as it was.
        torch.random.fork_rng(devices=[]),
    ):
        return _bundle(call, out=out, prices_folder=cache)


def _require_apart(out: Path, work: Path, *, data: tuple[object, ...]) -> None:
    """Refuse folders in each other's way.

    Raises:
        BundleError: `work` is in `out`, which must be empty.
        DataError: One of them is among the images.
    """
    if work.is_relative_to(out):
        raise BundleError(
            f"work={work} is in the folder of the bundle, {out}, which must be empty; "
            "name one outside"
        )
    for source in data:
        require_outside("out", out, source)
        require_outside("work", work, source)


@contextmanager
def _writing(*folders: Path) -> Iterator[None]:
    """Say where nothing could be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise BundleError(
            f"what is found cannot be written: {error}. See that there is space, and "
            f"that these can be written: {', '.join(map(str, folders))}, "
            f"{gettempdir()}. Then make the same call again: it goes on"
        ) from error


def _halves(held_out: ImageSet) -> tuple[ImageSet, ImageSet]:
    """To rank candidates on, and to tell the accuracy by."""
    try:
        return split_validation(held_out, fraction=0.5)
    except DataError as error:
        raise DataError(
            "legr ranks candidates on one half of the images that are held out, and "
            f"tells the accuracy by the other: {error}; give eval_data, or more images"
        ) from error


def _require_limit(method: Method, constraints: Constraints) -> None:
    """Refuse a call without the limit that its method shrinks to.

    Raises:
        SpaceError: Says which to give.
    """
    if method == "autoprune-weights":
        if constraints.compressed_bytes is None:
            raise SpaceError(
                "no compressed size is asked for; autoprune-weights makes a file "
                "smaller, and a network no faster: give compressed_bytes"
            )
    elif constraints.budget_ms is None:
        raise SpaceError(
            f"no latency is asked for; {method} shrinks a network to one: give "
            "latency_ms"
        )


def _bundle(call: Shrinking, *, out: Path, prices_folder: Path) -> Bundle:
    """Price, search, fit, fine-tune, certify, write.

    Args:
        call: What is asked for.
        out: Folder of the bundle.
        prices_folder: Of the tables measured on this machine.
    """
    step, left_whole = _step(call, prices_folder), call.own.left_whole
    if call.method == "tas":  # what leaves no choice in such steps stays whole
        own = searched_by_tas(call.own, step=step, projects=False)  # it has them
        call = replace(call, own=own)
    prices, source = _prices(call, prices_folder, step=step), call.source
    with ExitStack() as stack:
        if call.constraints.is_plain:  # of single runs no anchor model tells
            folder = stack.enter_context(TemporaryDirectory(prefix="ofa-deploy-"))
            prices = prices.beside(
                call.own,
                target=call.target,
                folder=Path(folder),
                reporter=call.reporter,
            )
        shrunk = _shrunk(call, prices, stack)
        network = shrunk.network
        parity = call.compare(network.exported, beside="the trained network")
        history = _history(call, source.sha256, shrunk, left_whole=left_whole)
        call.reporter.begin("writing the bundle")
        return assemble_bundle(
            out,
            network,
            parity=parity,
            source=source,
            extra_files={
                HISTORY_FILE: history.to_json().encode(),
                REPORT_FILE: shrunk_report(
                    network, history=history, table=prices.table
                ).encode(),
            },
        )


def _shrunk(call: Shrinking, prices: DevicePrices, stack: ExitStack) -> Shrunk:
    if call.method == "autoprune-weights":
        return ByWeights(call=call, prices=prices, stack=stack).run()
    return ByChannels(call=call, method=call.method, prices=prices, stack=stack).run()


def _step(call: Shrinking, folder: Path) -> int:
    """What channel counts are multiples of."""
    if call.recipe.step is not None:
        return call.recipe.step
    if not call.own.graph.groups:
        return 1
    return runtime_step(
        call.target,
        backend=get_backend(call.target.backend),
        folder=folder,
        work=call.work,
        reporter=call.reporter,
    )


def _prices(call: Shrinking, folder: Path, *, step: int) -> DevicePrices:
    return measure_prices(
        call.own,
        target=call.target,
        backend=get_backend(call.target.backend),
        step=step,
        folder=folder,
        work=call.work,
        reporter=call.reporter,
    )


def _history(
    call: Shrinking, before_sha256: str, shrunk: Shrunk, *, left_whole: tuple[str, ...]
) -> ShrinkHistory:
    """What happened, for the report and for whoever asks later.

    Args:
        call: What was asked for.
        before_sha256: Of the network's weights.
        shrunk: What came of it.
        left_whole: Layers that would be left whole in steps of one channel, too.
    """
    logs = [_read_log(folder / LOG_FILE) for folder in shrunk.trainings]
    return ShrinkHistory(
        method=call.method,
        recipe=asdict(call.recipe),
        weights_sha256=before_sha256,
        groups=shrunk.parts,
        channels=shrunk.had,
        search=logs[0] if logs else (),
        finetune=tuple(line for log in logs[1:] for line in log),
        kept=shrunk.kept,
        left_whole=left_whole,
        too_narrow=tuple(n for n in call.own.left_whole if n not in left_whole),
        family=tuple(asdict(member) for member in shrunk.family),
    )


def _read(data: str | Path | ImageSet, reporter: Reporter) -> ImageSet:
    if isinstance(data, ImageSet):
        return data
    reporter.begin(f"reading {Path(data).name}")
    return load_images(Path(data), progress=reporter.advance)[0]


def _read_log(path: Path) -> tuple[Mapping[str, object], ...]:
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise TrainingError(
                f"line {number} of {path} is damaged ({error}); remove it, and make "
                "the same call again: it goes on"
            ) from error
    return tuple(found)
