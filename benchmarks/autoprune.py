"""AutoPrune on CIFAR-10: half of the MACs by filters, one weight in fifty by weights.

Both of a VGG-like network. Trainings take hours, so each stage is a command of its own,
which goes on where it was stopped and leaves its weights (float16) and log in the
repository; the last one measures and publishes. In this order:

    dense      the network that both are made from
    filters    half of its MACs
    weights    one in fifty of its weights
    report     everything measured, and the section of RESULTS.md
"""

from __future__ import annotations

import argparse
import lzma
from typing import Literal

import torch
from cifar_networks import Vgg
from inputs import console
from report import Section
from torch import nn
from trainings import (
    DIGITS,
    RESOLUTION,
    TEMPERATURE,
    Lines,
    accuracy_of,
    arrays_of,
    digest,
    is_kept,
    keep,
    kept,
    kept_counts,
    loaded,
    log_of,
    narrowed,
    one_cycle,
    onnx_of,
    origin_of,
    owned,
    run_stage,
    test_inputs,
    test_set,
    time_on,
    train,
    training_set,
    trainings_of,
)

from ofa_deploy.cli.progress import StageBar
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.extract import extract_module
from ofa_deploy.shrink.finetuning import finetune
from ofa_deploy.shrink.methods import Search
from ofa_deploy.shrink.recipe import ShrinkRecipe
from ofa_deploy.shrink.sparse import finetune_weights, search_weights
from ofa_deploy.shrink.weight_masks import weights_of
from ofa_deploy.train.images import TrainingImages

DENSE_EPOCHS, SEARCH_EPOCHS, FINETUNE_EPOCHS = 60, 24, 60
# With room for norms and biases, none of which goes, and for weights whose parameters
# are as large as the last one's.
MACS_SHARE, WEIGHTS_SHARE = 0.5, 0.0192
STEP = 8
DENSE = one_cycle("dense", epochs=DENSE_EPOCHS, peak_learning_rate=0.1)
# Bars.
MOST_LOST, LEAST_FEWER = 0.005, 50


def shrink_recipe(form: Literal["filters", "weights"]) -> ShrinkRecipe:
    """Of a form: few single weights have to find their places anew."""
    return ShrinkRecipe(
        search=one_cycle("search", epochs=SEARCH_EPOCHS, peak_learning_rate=0.02),
        finetune=one_cycle(
            "finetune",
            epochs=FINETUNE_EPOCHS,
            peak_learning_rate=0.05 if form == "filters" else 0.1,
            cutmix_share=0.5,
            temperature=TEMPERATURE,
        ),
    )


def filters_origin() -> str:
    """Digest of all that decides what the stage `filters` leaves."""
    return digest(kept("vgg-dense"), shrink_recipe("filters"), MACS_SHARE, STEP)


def weights_origin() -> str:
    """Likewise."""
    return digest(kept("vgg-dense"), shrink_recipe("weights"), WEIGHTS_SHARE)


def dense_network() -> nn.Module:
    """What the stage `dense` left."""
    return loaded(Vgg(), kept("vgg-dense"))


# -- stages ----------------------------------------------------------------------------


def train_dense(args: argparse.Namespace) -> None:
    """The network that both are made from."""
    torch.manual_seed(0)
    module = Vgg()
    origin = origin_of(module, DENSE, None)
    if is_kept("vgg-dense", origin):
        return
    images, work = TrainingImages(training_set(args), DENSE), args.work / "autoprune"
    folder = train(module, "dense", images=images, recipe=DENSE, work=work)
    keep("vgg-dense", arrays_of(module), {"": log_of(folder)}, origin=origin)


def prune_filters(args: argparse.Namespace) -> None:
    """Half of the MACs."""
    settings, origin = shrink_recipe("filters"), filters_origin()
    if is_kept("vgg-filters", origin):
        return
    images = TrainingImages(training_set(args), settings.search)
    own = owned(dense_network(), images)
    folder = args.work / "autoprune" / f"filters-{origin}"
    price = MacPrice(own.graph)
    with StageBar(console) as bar:
        found = Search(
            own=own,
            price=price,
            share=MACS_SHARE,
            step=STEP,
            recipe=settings,
            images=images,
            held_out=images.validation,
            folder=folder / "search",
            on_progress=Lines(bar),
        ).run("autoprune")
        full = float(price(full_counts(own.graph)))
        indices = found.order.kept(found.order.within(price, MACS_SHARE * full))
        narrow = extract_module(own.module, own.graph, indices)
        tuning = folder / f"finetune-{'-'.join(str(len(one)) for one in indices)}"
        finetune(
            narrow,
            resolution=RESOLUTION,
            recipe=settings.finetune,
            images=images,
            folder=tuning,
            teacher=dense_network(),
            on_progress=Lines(bar),
        )
    arrays = arrays_of(narrow)
    arrays |= {f"kept.{index}": one.numpy() for index, one in enumerate(indices)}
    logs = {"-search": log_of(folder / "search"), "-finetune": log_of(tuning)}
    keep("vgg-filters", arrays, logs, origin=origin)


def prune_weights(args: argparse.Namespace) -> None:
    """One weight in fifty."""
    settings, origin = shrink_recipe("weights"), weights_origin()
    if is_kept("vgg-weights", origin):
        return
    images = TrainingImages(training_set(args), settings.search)
    own = owned(dense_network(), images)
    folder = args.work / "autoprune" / f"weights-{origin}"
    with StageBar(console) as bar:
        pull = search_weights(
            own.module,
            target_share=WEIGHTS_SHARE,
            settings=settings.sparsity,
            estimator=settings.estimator,
            deciding_share=settings.deciding_share,
            resolution=RESOLUTION,
            images=images,
            recipe=settings.search,
            folder=folder / "search",
            on_progress=Lines(bar),
        )
        pull.freeze(int(WEIGHTS_SHARE * pull.weight_count))
        sparse = finetune_weights(
            pull,
            resolution=RESOLUTION,
            images=images,
            recipe=settings.finetune,
            folder=folder / "finetune",
            teacher=dense_network(),
            on_progress=Lines(bar),
        )
    logs = {"-search": log_of(folder / "search")}
    logs["-finetune"] = log_of(folder / "finetune")
    keep("vgg-weights", arrays_of(sparse), logs, origin=origin)


# -- the report ------------------------------------------------------------------------


def counted(module: nn.Module) -> tuple[int, int]:
    """Weights of convolutions and linear layers that are not zero, and all."""
    weights = weights_of(module).values()
    return (
        sum(int(weight.count_nonzero()) for weight in weights),
        sum(weight.numel() for weight in weights),
    )


def publish(args: argparse.Namespace) -> None:
    """Measure everything, and write the section."""
    origins = {"vgg-filters": filters_origin(), "vgg-weights": weights_origin()}
    for name, origin in origins.items():
        if not is_kept(name, origin):
            raise SystemExit(f"{name} is of another network or recipe; run its stage")
    images = TrainingImages(training_set(args), shrink_recipe("filters").search)
    test = test_set(args)
    own = owned(dense_network(), images)
    networks = {
        "dense": own.module,
        "filters": narrowed(own, kept("vgg-filters")),
        "weights": loaded(Vgg(), kept("vgg-weights")),
    }
    models = {name: onnx_of(module) for name, module in networks.items()}
    inputs = test_inputs(test, images.normalisation)
    found = {name: accuracy_of(model, inputs, test) for name, model in models.items()}
    latencies = time_on("openvino-cpu", models)
    price = MacPrice(own.graph)
    full = float(price(full_counts(own.graph)))
    left = float(price(kept_counts("vgg-filters", own)))
    nonzero = {name: counted(module) for name, module in networks.items()}
    section = Section("autoprune", "AutoPrune", results=args.results)
    section.text(
        f"A VGG-like network of {nonzero['dense'][1] / 1e6:.2f} million weights and "
        f"{full:.0f} MMACs, trained for {DENSE_EPOCHS} epochs; either form searches "
        f"for {SEARCH_EPOCHS} and is fine-tuned for {FINETUNE_EPOCHS}, with the dense "
        "network as teacher. Test accuracy of the exported models; compressed: the "
        "ONNX file by xz; OpenVINO, 1 thread, timed against each other. Single weights "
        "that are zero make nothing faster."
    )
    section.table(
        [
            "network",
            "weights not zero",
            "compressed kB",
            "OpenVINO ms",
            "test accuracy",
        ],
        [
            [
                name,
                f"{nonzero[name][0]:,}",
                f"{len(lzma.compress(models[name])) / 1e3:,.0f}",
                f"{latencies[name]:.4f}",
                f"{found[name]:.2%}",
            ]
            for name in networks
        ],
    )
    section.table(["training", "epochs", "minutes"], trainings_of("vgg-"))
    lost = {
        name: round(found["dense"] - found[name], DIGITS)
        for name in ("filters", "weights")
    }
    section.bar(
        f"filters: {lost['filters']:+.2%} lost (at most {MOST_LOST:.1%}) with "
        f"{left / full:.1%} of the MACs",
        passed=lost["filters"] <= MOST_LOST and left <= MACS_SHARE * full,
    )
    fewer = nonzero["weights"][1] / nonzero["weights"][0]
    others = sum(p.numel() for p in networks["weights"].parameters())
    others -= nonzero["weights"][1]
    with_others = (nonzero["weights"][1] + others) / (nonzero["weights"][0] + others)
    section.bar(
        f"weights: {lost['weights']:+.2%} lost (at most {MOST_LOST:.1%}) with "
        f"{fewer:.1f}× fewer that are not zero (at least {LEAST_FEWER}×; with the "
        f"factors and offsets of norms, which all stay, {with_others:.1f}×)",
        passed=lost["weights"] <= MOST_LOST and fewer >= LEAST_FEWER,
    )
    section.publish()


STAGES = {
    "dense": train_dense,
    "filters": prune_filters,
    "weights": prune_weights,
    "report": publish,
}


if __name__ == "__main__":
    run_stage(__doc__, STAGES)
