"""Transformable Architecture Search on CIFAR-10: ResNet-20 at 55 % of its MACs.

Beside uniform widths trained without a teacher, and random networks of the same cost
trained with one. Trainings take hours, so each stage is a command of its own, which
goes on where it was stopped and leaves its weights (float16) and log in the repository;
the last one measures and publishes. The teacher is what the stage `dense` of `legr.py`
leaves. In this order:

    search     widths and depths; and widths alone
    trained    what was found, and its rivals, several seeds each
    latency    by OpenVINO's latency, through `specialize`; nothing else may run
    report     everything measured, and the section of RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from inputs import console
from numpy.typing import NDArray
from report import Section
from torch import nn
from trainings import (
    DRY_RUN,
    LOGS,
    RESOLUTION,
    Lines,
    accuracy_of,
    arrays_of,
    compare_by_latency,
    digest,
    is_kept,
    keep,
    kept,
    loaded,
    log_of,
    one_cycle,
    onnx_of,
    origin_of,
    run_stage,
    shrink_to_latency_of,
    test_inputs,
    test_set,
    train,
    training_set,
    trainings_of,
)

from ofa_deploy.cli.progress import StageBar
from ofa_deploy.families.cifar_resnet import WIDTHS, ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.shrink.cost import MacPrice
from ofa_deploy.shrink.expected_price import LikeliestOrder
from ofa_deploy.shrink.methods import Search, searched_by_tas
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import KNOWLEDGE_TEMPERATURE, ShrinkRecipe
from ofa_deploy.shrink.tas import TasSettings
from ofa_deploy.shrink.transformable import depth_choices, width_choices
from ofa_deploy.train.images import TrainingImages

DEPTH, TARGET_SHARE = 20, 0.55
WHOLE = ResNetShape.dense(DEPTH)
MOST_MACS = TARGET_SHARE * WHOLE.mac_count
SEARCH_EPOCHS, TRAIN_EPOCHS = 40, 30
PLAIN = one_cycle("plain", epochs=TRAIN_EPOCHS, peak_learning_rate=0.1, cutmix_share=0)
TAUGHT = replace(PLAIN, temperature=KNOWLEDGE_TEMPERATURE)
SEEDS = (0, 1, 2)
# Two seeds are enough to see what depth is worth.
KINDS = {"found": SEEDS, "random": SEEDS, "uniform": SEEDS, "widths": SEEDS[:2]}
# Of the target, within which a random network's cost is.
SAME_COST = 0.01
MAX_DRAWS = 200_000
# Bars.
LEAST_WON = {"uniform": 0.007, "random": 0.003}
MOST_OFF, MOST_COST = 0.05, 3.0


def shrink_recipe(*, searches_depth: bool) -> ShrinkRecipe:
    """Of all searches: from new weights, as published."""
    return ShrinkRecipe(
        search=one_cycle(
            "search", epochs=SEARCH_EPOCHS, peak_learning_rate=0.1, cutmix_share=0
        ),
        finetune=TAUGHT,
        tas=TasSettings(searches_depth=searches_depth, fresh=True),
    )


def teacher() -> nn.Module:
    """ResNet-20, trained."""
    return loaded(CifarResNet(WHOLE), kept("resnet20-dense"))


def owned(images: TrainingImages) -> OwnNetwork:
    """The dense network, ready to be searched."""
    own = OwnNetwork.of(
        teacher(),
        resolution=RESOLUTION,
        normalisation=images.normalisation,
        class_names=images.training.class_names,
    )
    return searched_by_tas(own)


# -- structures ------------------------------------------------------------------------


def conv_names(shape: ResNetShape) -> list[str]:
    """Of the convolutions that have a width, in its order."""
    return ["stem"] + [
        f"stages.{stage}.{block}.{conv}"
        for stage in range(len(shape.kept_blocks))
        for block in range(shape.blocks)
        for conv in ("first", "second")
    ]


def structure(kind: str, seed: int) -> ResNetShape:
    """Of a network to be trained."""
    if kind == "uniform":
        return uniform_shape()
    if kind == "random":
        return random_shape(seed)
    content = json.loads((LOGS / f"tas-search-{kind}.json").read_text())
    first, second, third = content["depths"] or WHOLE.kept_blocks
    # What a block had that is gone counts for nothing.
    widths = [
        content["counts"].get(name, whole)
        for name, whole in zip(conv_names(WHOLE), WHOLE.widths, strict=True)
    ]
    shape = ResNetShape(widths=tuple(widths), kept_blocks=(first, second, third))
    is_near = (1 - MOST_OFF) * MOST_MACS <= shape.mac_count <= MOST_MACS
    if not is_near and not DRY_RUN:
        raise SystemExit(f"{kind} costs {shape.mac_count} MACs of {MOST_MACS:.0f}")
    return shape


def uniform_shape() -> ResNetShape:
    """One share of all widths, up to whole channels: as dear as it may be."""
    shapes = [
        shape
        for share in np.linspace(0.02, 1, 500)
        for more in product((0, 1), repeat=len(WIDTHS))
        if (shape := scaled_shape(share, more)).mac_count <= MOST_MACS
    ]
    return max(shapes, key=lambda shape: shape.mac_count)


def scaled_shape(share: float, more: Sequence[int]) -> ResNetShape:
    """A share of all widths, rounded down, and so many channels more in each stage."""
    narrow = {
        width: min(width, max(1, int(share * width)) + extra)
        for width, extra in zip(WIDTHS, more, strict=True)
    }
    return replace(WHOLE, widths=tuple(narrow[width] for width in WHOLE.widths))


def random_shape(seed: int) -> ResNetShape:
    """Widths and depths drawn evenly among the search's, until the cost is right."""
    rng = np.random.default_rng(seed)
    for _ in range(MAX_DRAWS):
        first, second, third = (
            int(rng.choice(depth_choices(WHOLE.blocks))) for _ in WHOLE.kept_blocks
        )
        widths = [int(rng.choice(width_choices(width))) for width in WHOLE.widths]
        shape = ResNetShape(widths=tuple(widths), kept_blocks=(first, second, third))
        if (1 - SAME_COST) * MOST_MACS <= shape.mac_count <= MOST_MACS:
            return shape
    raise SystemExit(f"none of {MAX_DRAWS} random networks costs {MOST_MACS:.0f} MACs")


def as_arrays(shape: ResNetShape) -> dict[str, NDArray[Any]]:
    """A structure, as its weights are kept with it."""
    return {
        "widths": np.array(shape.widths),
        "kept_blocks": np.array(shape.kept_blocks),
    }


def trained(kind: str, seed: int) -> CifarResNet:
    """What the stage `trained` left."""
    arrays = kept(f"tas-{kind}-{seed}")
    widths, blocks = (arrays.pop(key) for key in ("widths", "kept_blocks"))
    first, second, third = (int(count) for count in blocks)
    shape = ResNetShape(
        widths=tuple(int(width) for width in widths),
        kept_blocks=(first, second, third),
    )
    module = CifarResNet(shape)
    loaded(module, arrays)
    return module


# -- stages ----------------------------------------------------------------------------


def search(args: argparse.Namespace) -> None:
    """Widths and depths; and widths alone."""
    data = training_set(args)
    for name, searches_depth in (("found", True), ("widths", False)):
        recipe = shrink_recipe(searches_depth=searches_depth)
        images = TrainingImages(data, recipe.search)
        own = owned(images)
        start = digest(kept("resnet20-dense"), recipe)
        folder = args.work / "tas" / f"search-{name}-{start}"
        with StageBar(console) as bar:
            found = Search(
                own=own,
                price=MacPrice(own.graph),
                share=TARGET_SHARE,
                step=1,
                recipe=recipe,
                images=images,
                held_out=images.validation,
                folder=folder,
                told=Lines(bar),
                announced=lambda preflight: print(preflight.told, flush=True),
            ).run("tas")
        left = found.own
        order = cast(LikeliestOrder, found.order)
        order = replace(order, tolerance=SAME_COST)  # as near as its rivals are
        counts = order.within(MacPrice(left.graph), MOST_MACS / 1e6)
        log = log_of(folder).read_text()
        (LOGS / f"tas-search-{name}.jsonl").write_text(log)
        last = json.loads(log.splitlines()[-1])
        content = {
            "counts": dict(
                zip([g.name for g in left.graph.groups], counts, strict=True)
            ),
            "depths": [depth for _, _, depth in found.depths],
            "searched_share": last["price_share"],
            "minutes": last["elapsed_s"] / 60,
        }
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        (LOGS / f"tas-search-{name}.json").write_text(text)


def train_all(args: argparse.Namespace) -> None:
    """What was found, and its rivals, all for as long."""
    data = training_set(args)
    for seed in SEEDS:
        for kind, seeds in KINDS.items():
            if seed in seeds:
                train_one(kind, seed, args, TrainingImages(data, PLAIN))


def train_one(
    kind: str, seed: int, args: argparse.Namespace, images: TrainingImages
) -> None:
    """One of them, with one seed."""
    name, shape = f"tas-{kind}-{seed}", structure(kind, seed)
    torch.manual_seed(seed)
    module = CifarResNet(shape)
    # Of rivals that have no teacher, uniform widths are the one that is asked about.
    teaching = None if kind == "uniform" else teacher()
    recipe = replace(PLAIN if teaching is None else TAUGHT, seed=seed)
    origin = digest(as_arrays(shape), origin_of(module, recipe, teaching))
    if is_kept(name, origin):
        return
    share = shape.mac_count / WHOLE.mac_count
    print(f"{name}: {share:.2%} of the MACs, {shape}", flush=True)
    folder = train(
        module,
        name,
        images=images,
        recipe=recipe,
        work=args.work / "tas",
        teacher=teaching,
    )
    arrays = arrays_of(module) | as_arrays(shape)
    keep(name, arrays, {"": log_of(folder)}, origin=origin)


def shrink_by_latency(args: argparse.Namespace) -> None:
    """The latency of the network found by MACs, as a budget."""
    shrink_to_latency_of(
        onnx_of(trained("found", 0)),
        name="tas-latency",
        model=teacher(),
        method="tas",
        recipe=shrink_recipe(searches_depth=True),
        data=training_set(args),
        work=args.work / "tas",
    )


# -- the report ------------------------------------------------------------------------


def publish(args: argparse.Namespace) -> None:
    """Measure everything, and write the section."""
    images = TrainingImages(training_set(args), PLAIN)
    test = test_set(args)
    inputs = test_inputs(test, images.normalisation)
    dense = accuracy_of(onnx_of(teacher()), inputs, test)
    networks = {
        kind: [trained(kind, seed) for seed in seeds] for kind, seeds in KINDS.items()
    }
    accuracies = {
        kind: [accuracy_of(onnx_of(one), inputs, test) for one in each]
        for kind, each in networks.items()
    }
    section = Section("tas", "Transformable Architecture Search", results=args.results)
    section.text(
        f"ResNet-{DEPTH}: {dense:.2%} of the test images. Searched for "
        f"{SEARCH_EPOCHS} epochs at {TARGET_SHARE:.0%} of its MACs; every network "
        f"trained from nothing for {TRAIN_EPOCHS} epochs, all but the uniform one with "
        "the dense network as teacher. Test accuracy of the exported models: mean and "
        "spread over seeds."
    )
    section.table(
        ["network", "of the MACs", "seeds", "test accuracy", "spread"],
        [
            [
                kind,
                shares_told(networks[kind]),
                f"{len(values)}",
                f"{statistics.mean(values):.2%}",
                f"{statistics.stdev(values):.2%}",
            ]
            for kind, values in accuracies.items()
        ],
    )
    rows = trainings_of("resnet20-") + trainings_of("tas-")
    section.table(["training", "epochs", "minutes"], rows)
    means = {kind: statistics.mean(values) for kind, values in accuracies.items()}
    for kind, least in LEAST_WON.items():
        won = means["found"] - means[kind]
        section.bar(
            f"above {kind}: {won:+.2%} (at least {least:.1%})", passed=won >= least
        )
    write_search(section)
    by_macs = [onnx_of(one) for one in networks["found"]]
    compare_by_latency(section, "tas-latency", by_macs, inputs, test)
    section.publish()


def shares_told(networks: list[CifarResNet]) -> str:
    """Of the whole network's MACs, each once."""
    shares = {one.shape.mac_count / WHOLE.mac_count for one in networks}
    return ", ".join(f"{share:.1%}" for share in sorted(shares))


def write_search(section: Section) -> None:
    """How near the search ended, and what it took."""
    content = json.loads((LOGS / "tas-search-found.json").read_text())
    share = structure("found", 0).mac_count / WHOLE.mac_count
    off = abs(share / TARGET_SHARE - 1)
    section.bar(
        f"the network found: {share:.2%} of the MACs, {off:.1%} off (at most "
        f"{MOST_OFF:.0%}); the likeliest at the search's end: "
        f"{content['searched_share']:.2%}",
        passed=off <= MOST_OFF,
    )
    # Without a teacher, whose time is not the network's.
    line = json.loads((LOGS / "resnet20-first.jsonl").read_text().splitlines()[-1])
    each_s = line["elapsed_s"] / line["epoch"]
    ratio = content["minutes"] * 60 / (each_s * SEARCH_EPOCHS)
    section.bar(
        f"search: {content['minutes']:.0f} min, {ratio:.2f} × {SEARCH_EPOCHS} epochs "
        f"of the dense network (at most {MOST_COST:g})",
        passed=ratio <= MOST_COST,
    )


STAGES = {
    "search": search,
    "trained": train_all,
    "latency": shrink_by_latency,
    "report": publish,
}


if __name__ == "__main__":
    run_stage(__doc__, STAGES)
