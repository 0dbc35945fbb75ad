"""Networks shrunk to the latency of another one, and what they are worth beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
from inputs import console
from numpy.typing import NDArray
from report import Section
from torch import nn
from trainings import (
    LOGS,
    WEIGHTS,
    Lines,
    accuracy_of,
    arrays_of,
    digest,
    kept,
    kept_facts,
    owned,
    time_on,
    wait_until_idle,
)

from ofa_deploy.api import specialize
from ofa_deploy.bundle import Bundle
from ofa_deploy.cli.progress import StageBar
from ofa_deploy.dataset import ImageSet
from ofa_deploy.shrink.device_prices import DevicePrices, measure_prices, runtime_step
from ofa_deploy.shrink.fitting import AIMED_SHARE
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import Method, ShrinkRecipe
from ofa_deploy.shrink.resume_store import remembered
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.to_budget import HISTORY_FILE
from ofa_deploy.table_files import cache_folder
from ofa_deploy.target import Target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.verify import judge_latency
from profilers.backends import get_backend
from profilers.device import this_device

SHRUNK_FOR = Target(backend="openvino-cpu", threads=1)
# Of two latencies, that pass for one.
SAME_LATENCY = 0.02


def shrink_to_latency_of(
    by_macs: bytes,
    *,
    came_from: str,
    name: str,
    model: nn.Module,
    method: Method,
    recipe: ShrinkRecipe,
    data: ImageSet,
    work: Path,
    seeds: Sequence[int] = (0,),
) -> None:
    """Shrink a network to the latency that its form found by MACs has on OpenVINO.

    Both are certified alike: in fresh processes, beside the network itself.

    Args:
        by_macs: That form, as an ONNX model.
        came_from: Name of the kept result that it is of; the model's own bytes tell of
            the folder that it was exported in, too.
        name: Of the bundle that is kept, and of further seeds' with these behind it.
        model: The network.
        method: That found both.
        recipe: Likewise.
        data: To train on.
        work: Folder of what is not kept.
        seeds: Of the training of what is found; the search is one for all.
    """
    # Milliseconds are of a machine.
    start = digest(
        arrays_of(model), digest(kept(came_from)), recipe, this_device().fingerprint
    )
    folder = work / f"{name}-{start}"
    bundles = {seed: folder / seeded("bundle", seed) for seed in seeds}
    missing = [seed for seed, out in bundles.items() if not out.exists()]
    if missing:
        wait_until_idle()
        with StageBar(console) as bar:
            own = owned(model, TrainingImages(data, recipe.search))
            budget_ms = remembered(
                folder / "budget.json",
                lambda: budget_of(by_macs, own, method=method, recipe=recipe, bar=bar),
            )
            for seed in missing:
                wait_until_idle()
                specialize(
                    SHRUNK_FOR.backend,
                    latency_ms=budget_ms,
                    model=model,
                    method=method,
                    data=data,
                    out=bundles[seed],
                    recipe=replace(
                        recipe, finetune=replace(recipe.finetune, seed=seed)
                    ),
                    work=folder,
                    reporter=bar,
                    on_training_progress=Lines(bar),
                )
    for seed, out in bundles.items():
        keep_bundle(seeded(name, seed), out)


def seeded(name: str, seed: int) -> str:
    """Name of what a seed left; of the first, as it is."""
    return f"{name}-{seed}" if seed else name


def further_models(name: str, seeds: Sequence[int]) -> list[bytes]:
    """Models of a bundle's structure, trained with further seeds.

    Raises:
        SystemExit: One is of another structure.
    """
    structure = kept_facts(name)["kept"]
    for seed in seeds:
        if kept_facts(seeded(name, seed))["kept"] != structure:
            raise SystemExit(
                f"{seeded(name, seed)} is of another structure than {name}: timing "
                "left another one; run the stage again on an idle machine"
            )
    return [kept_model(seeded(name, seed)) for seed in seeds]


def kept_model(name: str) -> bytes:
    """The ONNX model of a bundle that was kept."""
    return (Bundle.open(WEIGHTS / name).path / "model.onnx").read_bytes()


def budget_of(
    by_macs: bytes,
    own: OwnNetwork,
    *,
    method: Method,
    recipe: ShrinkRecipe,
    bar: StageBar,
) -> float:
    """Milliseconds that a network is shrunk to, as its form found by MACs takes them.

    It is priced as the call that shrinks it does, which then finds the prices.
    """
    backend = get_backend(SHRUNK_FOR.backend)
    step = recipe.step or runtime_step(
        SHRUNK_FOR, backend=backend, folder=cache_folder(), reporter=bar
    )
    if method == "tas":
        own = searched_by_tas(own, step=step, projects=recipe.tas.projects)
    prices = measure_prices(
        own,
        target=SHRUNK_FOR,
        backend=backend,
        step=step,
        folder=cache_folder(),
        reporter=bar,
    )
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name:
        folder = Path(name)
        prices = prices.beside(own, target=SHRUNK_FOR, folder=folder, reporter=bar)
        return certified_ms(by_macs, prices, bar) / AIMED_SHARE


def certified_ms(model: bytes, prices: DevicePrices, bar: StageBar) -> float:
    """What a model's latency is certified to be below, held against such prices."""
    bar.begin("certifying what was found by MACs")
    with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        measured = prices.measure(path, target=SHRUNK_FOR, progress=bar.advance)
    return judge_latency(measured, budget_ms=measured.quiet_ms).bound


def keep_bundle(name: str, bundle: Path) -> None:
    """Put a bundle where it is committed, and its history beside the logs."""
    target = WEIGHTS / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(bundle, target)
    shutil.copyfile(bundle / HISTORY_FILE, LOGS / f"{name}.json")


def is_shrunk(name: str) -> bool:
    """Whether a bundle that was kept is less than the whole network."""
    return bool(kept_facts(name)["search"])


def require_found_here(name: str) -> None:
    """Stop, where a bundle was chosen by another machine's milliseconds.

    Asked before anything is tested, which takes minutes.
    """
    bundle = Bundle.open(WEIGHTS / name)
    require_this_device(bundle.manifest.device.fingerprint, name)


def require_this_device(fingerprint: str, name: str) -> None:
    """Stop, where a result was chosen by another machine's milliseconds."""
    here = this_device().fingerprint
    if fingerprint != here:
        raise SystemExit(
            f"{name} was chosen by latency on {fingerprint}, and this is {here}: what "
            "takes as long there need not here. Run its stage again, or this one there"
        )


def compare_by_latency(
    section: Section,
    name: str,
    by_macs: Sequence[bytes],
    inputs: NDArray[np.float32],
    test: ImageSet,
    *,
    again: Sequence[bytes] = (),
) -> None:
    """Tell of a network found by latency, beside the one found by MACs.

    Args:
        section: Gets the bar.
        name: Of the bundle, as it was kept.
        by_macs: The other one, as ONNX models of several trainings.
        inputs: To test both on.
        test: Their labels.
        again: Models of further trainings by that latency.
    """
    require_found_here(name)
    bundle = Bundle.open(WEIGHTS / name)
    if not is_shrunk(name):
        section.text(
            "By latency nothing was searched: the whole network keeps it, trained as "
            "it was before."
        )
    by_ms = kept_model(name)
    found_ms = time_on("openvino-cpu", {"ms": by_ms, "macs": by_macs[0]})
    accuracies = {
        "ms": mean(accuracy_of(one, inputs, test) for one in (by_ms, *again)),
        "macs": mean(accuracy_of(one, inputs, test) for one in by_macs),
    }
    verdict = bundle.manifest.binding
    section.bar(
        f"a latency as the budget: certified {verdict.bound:.4f} of "
        f"{verdict.limit:.4f} ms; {accuracies['ms']:.2%}, the mean of "
        f"{1 + len(again)}, in {found_ms['ms']:.4f} ms "
        f"beside {accuracies['macs']:.2%}, the mean of {len(by_macs)}, in "
        f"{found_ms['macs']:.4f} ms by MACs",
        passed=verdict.met
        and accuracies["ms"] >= accuracies["macs"]
        and found_ms["ms"] <= (1 + SAME_LATENCY) * found_ms["macs"],
    )
