"""Transformable Architecture Search on CIFAR-10: ResNet-20 at 55 % of its MACs.

Beside uniform widths trained without a teacher, and random networks of the same cost
trained with one. Trainings take hours, so each stage is a command of its own, which
goes on where it was stopped and leaves its weights (float16) and log in the repository;
the last one measures and publishes. In this order:

    dense      ResNet-20: the teacher
    search     widths and depths; and widths alone
    trained    what was found, and its rivals, several seeds each
    latency    by OpenVINO's latency, through `specialize`; nothing else may run
    report     everything measured, and the section of RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace

import numpy as np
import torch
from inputs import console, read_test_images
from legr import uniform_counts
from report import Section
from torch import Tensor, nn
from trainings import (
    LOGS,
    RESOLUTION,
    WEIGHTS,
    Lines,
    accuracy_of,
    arrays_of,
    digest,
    keep,
    keep_bundle,
    kept,
    loaded,
    log_of,
    one_cycle,
    onnx_of,
    run_stage,
    time_on,
    train,
    training_set,
    trainings_of,
)

from ofa_deploy.api import specialize
from ofa_deploy.bundle import Bundle
from ofa_deploy.cli.progress import StageBar
from ofa_deploy.families.cifar_resnet import ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.preprocess import prepare
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.extract import extract_module
from ofa_deploy.shrink.fitting import AIMED_SHARE
from ofa_deploy.shrink.methods import Search, searched_by_tas
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import KNOWLEDGE_TEMPERATURE, ShrinkRecipe
from ofa_deploy.shrink.searched import reset_parameters
from ofa_deploy.shrink.stages import find_stages, shallower
from ofa_deploy.shrink.tas import TasSettings
from ofa_deploy.shrink.transformable import width_choices
from ofa_deploy.train.images import TrainingImages

DEPTH, TARGET_SHARE, SEEDS = 20, 0.55, (0, 1, 2)
DENSE_EPOCHS, SEARCH_EPOCHS, TRAIN_EPOCHS = 80, 20, 30
DENSE = one_cycle("dense", epochs=DENSE_EPOCHS, peak_learning_rate=0.1)
PLAIN = one_cycle("plain", epochs=TRAIN_EPOCHS, peak_learning_rate=0.1, cutmix_share=0)
TAUGHT = replace(PLAIN, temperature=KNOWLEDGE_TEMPERATURE)
# One seed is enough to see what depth is worth.
KINDS = {"found": SEEDS, "random": SEEDS, "uniform": SEEDS, "widths": SEEDS[:1]}
# Bars.
LEAST_WON = {"uniform": 0.007, "random": 0.003}
MOST_OFF, MOST_COST, SAME_LATENCY = 0.05, 3.0, 0.02


def shrink_recipe(*, searches_depth: bool) -> ShrinkRecipe:
    """Of all searches."""
    return ShrinkRecipe(
        search=one_cycle(
            "search", epochs=SEARCH_EPOCHS, peak_learning_rate=0.05, cutmix_share=0
        ),
        finetune=TAUGHT,
        tas=TasSettings(searches_depth=searches_depth),
    )


def teacher() -> nn.Module:
    """What the stage `dense` left."""
    return loaded(CifarResNet(ResNetShape.dense(DEPTH)), kept("tas-dense"))


def owned(images: TrainingImages) -> OwnNetwork:
    """The dense network, ready to be searched."""
    own = OwnNetwork.of(
        teacher(),
        resolution=RESOLUTION,
        normalisation=images.normalisation,
        class_names=images.training.class_names,
    )
    return searched_by_tas(own)


# -- stages ----------------------------------------------------------------------------


def train_dense(args: argparse.Namespace) -> None:
    """ResNet-20: the teacher."""
    torch.manual_seed(0)
    module = CifarResNet(ResNetShape.dense(DEPTH))
    images, folder = TrainingImages(training_set(args), DENSE), args.work / "tas/dense"
    train(module, "dense", images=images, recipe=DENSE, folder=folder)
    keep("tas-dense", arrays_of(module), {"": log_of(folder)})


def search(args: argparse.Namespace) -> None:
    """Widths and depths; and widths alone."""
    for name, searches_depth in (("found", True), ("widths", False)):
        recipe = shrink_recipe(searches_depth=searches_depth)
        images = TrainingImages(training_set(args), recipe.search)
        own = owned(images)
        folder = args.work / "tas" / f"search-{name}-{own.sha256[:12]}"
        price = MacPrice(own.graph)
        with StageBar(console) as bar:
            found = Search(
                own=own,
                price=price,
                share=TARGET_SHARE,
                step=1,
                recipe=recipe,
                images=images,
                held_out=images.validation,
                folder=folder,
                told=Lines(bar),
                announced=lambda preflight: print(preflight.told, flush=True),
            ).run("tas")
        most = TARGET_SHARE * float(price(full_counts(own.graph)))
        left = found.own
        counts = found.order.within(MacPrice(left.graph), most)
        log = log_of(folder).read_text()
        (LOGS / f"tas-search-{name}.jsonl").write_text(log)
        content = {
            "counts": dict(
                zip([g.name for g in left.graph.groups], counts, strict=True)
            ),
            "depths": [depth for _, _, depth in found.depths],
            "searched_share": json.loads(log.splitlines()[-1])["price_share"],
            "minutes": json.loads(log.splitlines()[-1])["elapsed_s"] / 60,
        }
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        (LOGS / f"tas-{name}.json").write_text(text)


Structure = tuple[list[int], dict[str, int]]


def structure(kind: str, seed: int, own: OwnNetwork) -> Structure:
    """Depths, and channels by group, of a network to be trained."""
    stages = find_stages(own.module, own.graph)
    whole = [stage.blocks for stage in stages]
    names = [group.name for group in own.graph.groups]
    most = TARGET_SHARE * float(MacPrice(own.graph)(full_counts(own.graph)))
    if kind == "uniform":
        counts = uniform_counts(own, most)
        return whole, dict(zip(names, counts, strict=True))
    if kind == "random":
        return random_structure(own, most, seed)
    content = json.loads((LOGS / f"tas-{kind}.json").read_text())
    return content["depths"] or whole, content["counts"]


def random_structure(own: OwnNetwork, most: float, seed: int) -> Structure:
    """Widths and depths drawn evenly, until the cost is the target's."""
    rng = np.random.default_rng(seed)
    stages = find_stages(own.module, own.graph)
    while True:
        depths = [int(rng.integers(1, stage.blocks + 1)) for stage in stages]
        left = own.left_of(shallower(own.module, stages, depths))
        for _ in range(2000):
            counts = [
                int(rng.choice(width_choices(group.channels)))
                for group in left.graph.groups
            ]
            cost = float(MacPrice(left.graph)(torch.tensor(counts).double()))
            if (1 - MOST_OFF / 5) * most <= cost <= most:
                names = [group.name for group in left.graph.groups]
                return depths, dict(zip(names, counts, strict=True))


def built(own: OwnNetwork, found: Structure) -> tuple[nn.Module, float]:
    """The network of a structure, with new weights; and its share of the MACs."""
    depths, counts = found
    stages = find_stages(own.module, own.graph)
    left = own.left_of(shallower(own.module, stages, depths))
    widths = [counts[group.name] for group in left.graph.groups]
    cost = float(MacPrice(left.graph)(torch.tensor(widths).double()))
    full = float(MacPrice(own.graph)(full_counts(own.graph)))
    kept_channels: list[Tensor] = [torch.arange(width) for width in widths]
    return extract_module(left.module, left.graph, kept_channels), cost / full


def train_all(args: argparse.Namespace) -> None:
    """What was found, and its rivals, all for as long."""
    data = training_set(args)
    for place in range(len(SEEDS)):
        for kind, seeds in KINDS.items():
            if place < len(seeds):
                train_one(kind, seeds[place], args, TrainingImages(data, PLAIN))


def train_one(
    kind: str, seed: int, args: argparse.Namespace, images: TrainingImages
) -> None:
    """One of them, with one seed."""
    own = owned(images)
    name = f"tas-{kind}-{seed}"
    module, share = built(own, structure(kind, seed, own))
    if (WEIGHTS / f"{name}.safetensors").is_file():
        return
    print(f"{name}: {share:.2%} of the MACs", flush=True)
    torch.manual_seed(seed)
    reset_parameters(module)
    # Of rivals that have no teacher, uniform widths are the one that is asked about.
    recipe = replace(PLAIN if kind == "uniform" else TAUGHT, seed=seed)
    folder = args.work / "tas" / f"{name}-{digest(arrays_of(module))}"
    train(
        module,
        name,
        images=images,
        recipe=recipe,
        folder=folder,
        teacher=None if kind == "uniform" else teacher(),
    )
    keep(name, arrays_of(module), {"": log_of(folder)})


def shrink_by_latency(args: argparse.Namespace) -> None:
    """The latency of the network found by MACs, as a budget."""
    data = training_set(args)
    images = TrainingImages(data, PLAIN)
    own = owned(images)
    by_macs, _ = built(own, structure("found", 0, own))
    loaded(by_macs, kept("tas-found-0"))
    work = args.work / "tas" / f"latency-{digest(arrays_of(by_macs))}"
    path = work / "budget.json"
    if not path.is_file():
        found = time_on("openvino-cpu", {"macs": onnx_of(by_macs)})
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"budget_ms": found["macs"] / AIMED_SHARE}) + "\n")
    out = work / "bundle"
    if not out.exists():
        with StageBar(console) as bar:
            specialize(
                "openvino-cpu",
                latency_ms=json.loads(path.read_text())["budget_ms"],
                model=teacher(),
                method="tas",
                data=data,
                out=out,
                recipe=shrink_recipe(searches_depth=True),
                work=work,
                reporter=bar,
                training_told=Lines(bar),
            )
    keep_bundle("tas-latency", out)


# -- the report ------------------------------------------------------------------------


def publish(args: argparse.Namespace) -> None:
    """Measure everything, and write the section."""
    images = TrainingImages(training_set(args), PLAIN)
    test = read_test_images(args.data)
    own = owned(images)
    inputs = prepare(
        test.images, resolution=RESOLUTION, normalisation=images.normalisation
    )
    dense = accuracy_of(onnx_of(teacher()), inputs, test)
    accuracies: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for kind, seeds in KINDS.items():
        for seed in seeds:
            module, share = built(own, structure(kind, seed, own))
            loaded(module, kept(f"tas-{kind}-{seed}"))
            shares.setdefault(kind, []).append(share)
            found = accuracy_of(onnx_of(module), inputs, test)
            accuracies.setdefault(kind, []).append(found)
    section = Section("tas", "Transformable Architecture Search", results=args.results)
    section.text(
        f"ResNet-{DEPTH}, trained for {DENSE_EPOCHS} epochs: {dense:.2%} of the test "
        f"images. Searched for {SEARCH_EPOCHS} epochs at {TARGET_SHARE:.0%} of its "
        f"MACs; every network trained from nothing for {TRAIN_EPOCHS} epochs, all but "
        "the uniform one with the dense network as teacher. Test accuracy of the "
        "exported models: mean and spread over seeds."
    )
    section.table(
        ["network", "of the MACs", "seeds", "test accuracy", "spread"],
        [
            [
                kind,
                ", ".join(f"{share:.1%}" for share in sorted(set(shares[kind]))),
                f"{len(values)}",
                f"{statistics.mean(values):.2%}",
                f"{statistics.stdev(values):.2%}" if len(values) > 1 else "",
            ]
            for kind, values in accuracies.items()
        ],
    )
    section.table(["training", "epochs", "minutes"], trainings_of("tas-"))
    means = {kind: statistics.mean(values) for kind, values in accuracies.items()}
    for kind, least in LEAST_WON.items():
        won = means["found"] - means[kind]
        section.bar(
            f"above {kind}: {won:+.2%} (at least {least:.1%})", passed=won >= least
        )
    write_search(section)
    write_latency(section, own, args)
    section.publish()


def write_search(section: Section) -> None:
    """How near the search ended, and what it took."""
    content = json.loads((LOGS / "tas-found.json").read_text())
    off = abs(content["searched_share"] / TARGET_SHARE - 1)
    section.bar(
        f"the likeliest network at the search's end: {content['searched_share']:.2%} "
        f"of the MACs, {off:.1%} off (at most {MOST_OFF:.0%})",
        passed=off <= MOST_OFF,
    )
    line = json.loads((LOGS / "tas-dense.jsonl").read_text().splitlines()[-1])
    each_s = line["elapsed_s"] / line["epoch"]
    ratio = content["minutes"] * 60 / (each_s * SEARCH_EPOCHS)
    section.bar(
        f"search: {content['minutes']:.0f} min, {ratio:.2f} × {SEARCH_EPOCHS} epochs "
        f"of the dense network (at most {MOST_COST:g})",
        passed=ratio <= MOST_COST,
    )


def write_latency(section: Section, own: OwnNetwork, args: argparse.Namespace) -> None:
    """A latency as the cost, beside MACs."""
    test = read_test_images(args.data)
    bundle = Bundle.open(WEIGHTS / "tas-latency")
    by_ms = (bundle.path / "model.onnx").read_bytes()
    module, _ = built(own, structure("found", 0, own))
    by_macs = onnx_of(loaded(module, kept("tas-found-0")))
    found_ms = time_on("openvino-cpu", {"ms": by_ms, "macs": by_macs})
    inputs = prepare(
        test.images, resolution=RESOLUTION, normalisation=own.normalisation
    )
    accuracies = {
        "ms": accuracy_of(by_ms, inputs, test),
        "macs": accuracy_of(by_macs, inputs, test),
    }
    verdict = bundle.manifest.binding
    section.bar(
        f"a latency as the cost: certified {verdict.bound:.4f} of {verdict.limit:.4f} "
        f"ms; {accuracies['ms']:.2%} in {found_ms['ms']:.4f} ms beside "
        f"{accuracies['macs']:.2%} in {found_ms['macs']:.4f} ms by MACs",
        passed=verdict.met
        and accuracies["ms"] >= accuracies["macs"]
        and found_ms["ms"] <= (1 + SAME_LATENCY) * found_ms["macs"],
    )


STAGES = {
    "dense": train_dense,
    "search": search,
    "trained": train_all,
    "latency": shrink_by_latency,
    "report": publish,
}


if __name__ == "__main__":
    run_stage(__doc__, STAGES)
