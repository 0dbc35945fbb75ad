"""Transformable Architecture Search on CIFAR-10: ResNet-20 at 55 % of its MACs.

Beside uniform widths trained without a teacher, and random networks of the same cost
trained with one. Trainings take hours, so each stage is a command of its own, which
goes on where it was stopped and leaves its weights (float16) and log in the repository;
the last one measures and publishes. Searches start from new weights; the teacher of
what they find is what the stage `dense` of `legr.py` leaves. In this order:

    search     widths and depths; widths alone; random rivals; nothing else may run, as
               epochs are timed
    trained    what was found, and its rivals, several seeds each: `--seeds 0` beside
               `--seeds 1`, and then `--seeds 2` alone, as that has fewer
    latency    by OpenVINO's latency, through `specialize`; nothing else may run
    again      what was found by latency, with the other seeds
    report     everything measured, and the section of RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import console
from numpy.typing import NDArray
from report import Section
from same_latency import (
    compare_by_latency,
    is_shrunk,
    require_found_here,
    shrink_to_latency_of,
)
from teachers import OnOpenVino, asked_once
from torch import nn
from trainings import (
    DIGITS,
    LOGS,
    RESOLUTION,
    WEIGHTS,
    Lines,
    accuracy_of,
    arrays_of,
    digest,
    is_kept,
    keep,
    keep_facts,
    keep_log,
    kept,
    kept_facts,
    loaded,
    log_of,
    one_cycle,
    onnx_of,
    origin_of,
    owned,
    run_stage,
    test_inputs,
    test_set,
    train,
    training_set,
    trainings_of,
    wait_until_idle,
)

from ofa_deploy.bundle import Bundle
from ofa_deploy.cli.progress import StageBar
from ofa_deploy.dataset import ImageSet
from ofa_deploy.families.cifar_resnet import WIDTHS, ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.shrink.cost import MacPrice
from ofa_deploy.shrink.finetuning import TrainingCallback, finetune
from ofa_deploy.shrink.methods import Found, Search, likeliest
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import KNOWLEDGE_TEMPERATURE, ShrinkRecipe
from ofa_deploy.shrink.tas import TasSettings
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.tas_network import insert_distributions
from ofa_deploy.shrink.tas_price import ExpectedPrice
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LoopProgress
from profilers.device import this_device

DEPTH, TARGET_SHARE = 20, 0.55
WHOLE = ResNetShape.dense(DEPTH)
MOST_MACS = TARGET_SHARE * WHOLE.mac_count
SEARCH_EPOCHS, TRAIN_EPOCHS = 40, 30
PLAIN = one_cycle("plain", epochs=TRAIN_EPOCHS, peak_learning_rate=0.1, cutmix_share=0)
TAUGHT = replace(PLAIN, temperature=KNOWLEDGE_TEMPERATURE)
SEEDS = (0, 1, 2)
# Two seeds are enough to see what depth is worth.
KINDS = {"found": SEEDS, "random": SEEDS, "uniform": SEEDS, "widths": SEEDS[:2]}
MAX_DRAWS = 20_000
LATENCY = "tas-latency"
# The bundle found by latency is of the first seed.
OTHER_SEEDS = SEEDS[1:]
ONCE = one_cycle("once", epochs=1, peak_learning_rate=0.1, cutmix_share=0)
TIMED_EPOCHS = 3
EPOCHS = "tas-search-epochs"
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
        tas=TasSettings(searches_depth=searches_depth, fresh=True, rate=0.01),
    )


def teacher() -> nn.Module:
    """ResNet-20, trained."""
    return loaded(CifarResNet(WHOLE), kept("resnet20-dense"))


def searchable(images: TrainingImages) -> OwnNetwork:
    """The network, ready to be searched from new weights, whatever they are."""
    return searched_by_tas(owned(CifarResNet(WHOLE), images))


# -- structures ------------------------------------------------------------------------


def conv_names(shape: ResNetShape) -> list[str]:
    """Of the convolutions that have a width, in its order."""
    return ["stem"] + [
        f"stages.{stage}.{block}.{conv}"
        for stage in range(len(shape.kept_blocks))
        for block in range(shape.blocks)
        for conv in ("first", "second")
    ]


def shape_of(counts: Mapping[str, int], depths: Sequence[int]) -> ResNetShape:
    """The dense network with these widths, by name, and with so many blocks left."""
    first, second, third = depths
    # What a block had that is gone counts for nothing.
    widths = [
        counts.get(name) or whole
        for name, whole in zip(conv_names(WHOLE), WHOLE.widths, strict=True)
    ]
    return ResNetShape(widths=tuple(widths), kept_blocks=(first, second, third))


def fitted_shape(found: Found) -> ResNetShape:
    """What is likeliest, or near it, at the cost of all networks here."""
    graph = found.own.graph
    price = MacPrice(graph)
    counts = found.order.within(price, MOST_MACS / 1e6)
    names = [group.name for group in graph.groups]
    depths = [depth for _, _, depth in found.depths]
    shape = shape_of(dict(zip(names, counts, strict=True)), depths or WHOLE.kept_blocks)
    require_macs(shape, 1e6 * float(price(torch.tensor(counts))))
    return shape


def require_macs(shape: ResNetShape, macs: float) -> None:
    """Stop, if a structure is not what it was read from."""
    if round(macs) != shape.mac_count:
        raise SystemExit(f"{shape} has {shape.mac_count} MACs, not {macs:.0f}")


def random_network(own: OwnNetwork, seed: int) -> tuple[Found, float]:
    """What random logits leave, and its share of the MACs.

    Drawn until what is likeliest costs about what is asked for, as at a search's end.
    """
    torch.manual_seed(seed)
    searched = insert_distributions(
        own.module,
        own.graph,
        image=own.image,
        step=1,
        searches_depth=True,
        fresh=True,
    )
    price = ExpectedPrice(searched, MacPrice(own.graph))
    for _ in range(MAX_DRAWS):
        for one in searched.module.distributions:
            torch.nn.init.normal_(one.logits)
        share = price.settled(searched.widths(), searched.depths()) / price.full
        if abs(share / TARGET_SHARE - 1) <= MOST_OFF:
            found = likeliest(own, searched, depths=searched.depths(), step=1)
            return found, share
    raise SystemExit(f"none of {MAX_DRAWS} random networks costs {MOST_MACS:.0f} MACs")


def structure(kind: str, seed: int) -> ResNetShape:
    """Of a network to be trained."""
    if kind == "uniform":
        return uniform_shape()
    if kind == "latency":
        return latency_shape()
    content = kept_structure(f"{kind}-{seed}" if kind == "random" else kind)
    return shape_of(content["counts"], content["depths"])


def kept_structure(name: str) -> dict[str, Any]:
    """What the stage `search` left of one."""
    return kept_facts(f"tas-search-{name}")


def keep_structure(name: str, found: Found, **facts: float | str) -> None:
    """Put a structure, at the cost of all networks here, where it is committed."""
    shape = fitted_shape(found)
    content = {
        "counts": dict(zip(conv_names(shape), shape.widths, strict=True)),
        "depths": shape.kept_blocks,
        **facts,
    }
    keep_facts(f"tas-search-{name}", content)


def latency_shape() -> ResNetShape:
    """Of the bundle that the stage `latency` left."""
    history = kept_facts(LATENCY)
    counts = dict(zip(history["groups"], history["kept"], strict=True))
    depths = [
        counts.get(f"stages.{stage}[0:{WHOLE.blocks}], blocks", WHOLE.blocks)
        for stage in range(len(WHOLE.kept_blocks))
    ]
    shape = shape_of(counts, depths)
    bundle = Bundle.open(WEIGHTS / LATENCY)
    require_macs(shape, bundle.manifest.cost.mac_count)
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


def as_arrays(shape: ResNetShape) -> dict[str, NDArray[Any]]:
    """A structure, as its weights are kept with it."""
    return {
        "widths": np.array(shape.widths),
        "kept_blocks": np.array(shape.kept_blocks),
    }


def trained(kind: str, seed: int) -> CifarResNet:
    """What the stage `trained` left, or `again`, of the structure as it is now."""
    name, shape = f"tas-{kind}-{seed}", structure(kind, seed)
    arrays = kept(name)
    for key, values in as_arrays(shape).items():
        if not np.array_equal(arrays.pop(key), values):
            raise SystemExit(f"{name} is of another structure; train it again")
    module = CifarResNet(shape)
    loaded(module, arrays)
    return module


# -- stages ----------------------------------------------------------------------------


def search(args: argparse.Namespace) -> None:
    """Widths and depths; widths alone; random ones; and what an epoch takes."""
    data = training_set(args)
    for name, searches_depth in (("found", True), ("widths", False)):
        recipe = shrink_recipe(searches_depth=searches_depth)
        origin = digest({}, recipe, WHOLE, TARGET_SHARE)
        if is_found(f"tas-search-{name}", origin):
            continue
        folder = args.work / "tas" / f"search-{name}-{origin}"
        with StageBar(console) as bar:
            found = searching(data, recipe, folder=folder, on_progress=Lines(bar)).run(
                "tas"
            )
        keep_log(f"tas-search-{name}", log_of(folder))
        last = json.loads(log_of(folder).read_text().splitlines()[-1])
        keep_structure(
            name,
            found,
            origin=origin,
            searched_share=last["price_share"],
            minutes=last["elapsed_s"] / 60,
        )
    own = searchable(TrainingImages(data, PLAIN))
    for seed in SEEDS:
        found, share = random_network(own, seed)
        keep_structure(f"random-{seed}", found, searched_share=share)
    recipe = shrink_recipe(searches_depth=True)
    origin = digest({}, recipe, ONCE, TIMED_EPOCHS, this_device().fingerprint)
    if not is_found(EPOCHS, origin):
        wait_until_idle()
        keep_facts(EPOCHS, {"origin": origin, **timed_epochs(data)})


def is_found(name: str, origin: str) -> bool:
    """Whether facts are there that were found from this."""
    path = LOGS / f"{name}.json"
    return path.is_file() and kept_facts(name).get("origin") == origin


def searching(
    data: ImageSet,
    recipe: ShrinkRecipe,
    *,
    folder: Path | None,
    on_progress: TrainingCallback,
) -> Search:
    """A search to the share of the MACs that is aimed at."""
    images = TrainingImages(data, recipe.search)
    own = searchable(images)
    return Search(
        own=own,
        price=MacPrice(own.graph),
        share=TARGET_SHARE,
        step=1,
        recipe=recipe,
        images=images,
        held_out=images.validation,
        folder=folder,
        on_progress=on_progress,
        announced=lambda preflight: print(preflight.told, flush=True),
    )


def timed_epochs(data: ImageSet) -> dict[str, list[float]]:
    """Seconds of epochs of the search, and of the dense network's training, in turn."""
    recipe = replace(shrink_recipe(searches_depth=True), search=ONCE)
    images = TrainingImages(data, ONCE)
    seconds: dict[str, list[float]] = {"search": [], "dense": []}

    def note(name: str) -> TrainingCallback:
        def told(stage: str, progress: LoopProgress) -> None:
            if progress.step == progress.steps:
                seen = progress.step * ONCE.batch_size
                seconds[name].append(seen / progress.images_per_s)

        return told

    for _ in range(TIMED_EPOCHS):
        searching(data, recipe, folder=None, on_progress=note("search")).run("tas")
        finetune(
            CifarResNet(WHOLE),
            resolution=RESOLUTION,
            recipe=ONCE,
            images=images,
            folder=None,
            on_progress=note("dense"),
        )
    return seconds


def train_all(args: argparse.Namespace) -> None:
    """What was found, and its rivals, all for as long."""
    data = training_set(args)
    for seed in args.seeds:
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
    teaching = None if kind == "uniform" else asked_once(OnOpenVino(teacher()), args)
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
        # Rivals in one number format, whichever machine trains them.
        bf16=False,
    )
    arrays = arrays_of(module) | as_arrays(shape)
    keep(name, arrays, {"": log_of(folder)}, origin=origin)


def shrink_by_latency(args: argparse.Namespace) -> None:
    """The latency of the network found by MACs, as a budget."""
    shrink_to_latency_of(
        onnx_of(trained("found", 0)),
        came_from="tas-found-0",
        name=LATENCY,
        model=teacher(),
        method="tas",
        recipe=shrink_recipe(searches_depth=True),
        data=training_set(args),
        work=args.work / "tas",
    )


def train_again(args: argparse.Namespace) -> None:
    """What was found by latency, trained as what was found by MACs."""
    if not is_shrunk(LATENCY):
        print("the whole network keeps the latency; it is the teacher as it is")
        return
    data = training_set(args)
    for seed in OTHER_SEEDS:
        if seed in args.seeds:
            train_one("latency", seed, args, TrainingImages(data, PLAIN))


# -- the report ------------------------------------------------------------------------


def publish(args: argparse.Namespace) -> None:
    """Measure everything, and write the section."""
    require_found_here(LATENCY)
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
        "the dense network as teacher; on several machines, all in float32. Test "
        "accuracy of the exported models: mean and spread over seeds."
    )
    section.text(
        "Random networks are of random logits whose likeliest network costs within "
        f"{MOST_OFF:.0%} of the target; from there they are fitted to it as the "
        "search's result is, by the same rule. The spreads differ in kind: as a search "
        f"takes {kept_structure('found')['minutes']:.0f} min here, one of them serves "
        "all seeds of what was found, whose spread is of trainings alone; each random "
        "network has a structure of its own."
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
        won = round(means["found"] - means[kind], DIGITS)
        section.bar(
            f"above {kind}: {won:+.2%} (at least {least:.1%})", passed=won >= least
        )
    write_search(section)
    compare_by_latency(
        section,
        LATENCY,
        [onnx_of(one) for one in networks["found"]],
        inputs,
        test,
        again=[
            onnx_of(trained("latency", seed))
            for seed in (OTHER_SEEDS if is_shrunk(LATENCY) else ())
        ],
    )
    section.publish()


def shares_told(networks: list[CifarResNet]) -> str:
    """Of the whole network's MACs, each once."""
    shares = {one.shape.mac_count / WHOLE.mac_count for one in networks}
    return ", ".join(f"{share:.1%}" for share in sorted(shares))


def write_search(section: Section) -> None:
    """How near the search ended, and what it took."""
    content = kept_structure("found")
    fitted = structure("found", SEEDS[0]).mac_count / WHOLE.mac_count
    off = abs(content["searched_share"] / TARGET_SHARE - 1)
    section.bar(
        f"the likeliest at the search's end: {content['searched_share']:.2%} of the "
        f"MACs, {off:.1%} off the target (at most {MOST_OFF:.0%}); fitted to it, "
        f"{fitted:.2%}",
        passed=off <= MOST_OFF,
    )
    seconds = kept_facts(EPOCHS)
    each_s = {name: statistics.median(seconds[name]) for name in ("search", "dense")}
    ratio = each_s["search"] / each_s["dense"]
    section.bar(
        f"an epoch of the search: {each_s['search']:.0f} s, {ratio:.2f} × the "
        f"{each_s['dense']:.0f} s of the dense network (at most {MOST_COST:g}; medians "
        f"of {TIMED_EPOCHS} each, in turn); the search of {SEARCH_EPOCHS} took "
        f"{content['minutes']:.0f} min",
        passed=ratio <= MOST_COST,
    )
    section.text(
        "Both searches by MACs drew the images of their two halves in one order, by "
        "which each step of the distributions saw the same classes as that of the "
        "weights before it. Since then they are drawn apart."
    )


STAGES = {
    "search": search,
    "trained": train_all,
    "latency": shrink_by_latency,
    "again": train_again,
    "report": publish,
}


if __name__ == "__main__":
    run_stage(__doc__, STAGES, seeds=SEEDS)
