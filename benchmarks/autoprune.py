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
    keep,
    kept,
    kept_counts,
    loaded,
    log_of,
    narrowed,
    one_cycle,
    onnx_of,
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
from ofa_deploy.shrink.sparse import finetune_weights, search_weights, weights_of
from ofa_deploy.train.images import TrainingImages

DENSE_EPOCHS, SEARCH_EPOCHS, FINETUNE_EPOCHS = 60, 24, 40
# With room for weights whose parameters are as large as the last one's.
MACS_SHARE, WEIGHTS_SHARE = 0.5, 0.0198
STEP = 8
DENSE = one_cycle("dense", epochs=DENSE_EPOCHS, peak_learning_rate=0.1)
# Bars.
MOST_LOST, LEAST_FEWER = 0.005, 50


def shrink_recipe() -> ShrinkRecipe:
    """Of both forms."""
    return ShrinkRecipe(
        search=one_cycle("search", epochs=SEARCH_EPOCHS, peak_learning_rate=0.02),
        finetune=one_cycle(
            "finetune",
            epochs=FINETUNE_EPOCHS,
            peak_learning_rate=0.05,
            temperature=TEMPERATURE,
        ),
    )


def dense_network() -> nn.Module:
    """What the stage `dense` left."""
    return loaded(Vgg(), kept("vgg-dense"))


# -- stages ----------------------------------------------------------------------------


def train_dense(args: argparse.Namespace) -> None:
    """The network that both are made from."""
    torch.manual_seed(0)
    module, images = Vgg(), TrainingImages(training_set(args), DENSE)
    work = args.work / "autoprune"
    folder = train(module, "dense", images=images, recipe=DENSE, work=work)
    keep("vgg-dense", arrays_of(module), {"": log_of(folder)})


def prune_filters(args: argparse.Namespace) -> None:
    """Half of the MACs."""
    settings = shrink_recipe()
    images = TrainingImages(training_set(args), settings.search)
    own = owned(dense_network(), images)
    folder = args.work / "autoprune" / f"filters-{digest(kept('vgg-dense'), settings)}"
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
            told=Lines(bar),
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
            told=Lines(bar),
        )
    arrays = arrays_of(narrow)
    arrays |= {f"kept.{index}": one.numpy() for index, one in enumerate(indices)}
    logs = {"-search": log_of(folder / "search"), "-finetune": log_of(tuning)}
    keep("vgg-filters", arrays, logs)


def prune_weights(args: argparse.Namespace) -> None:
    """One weight in fifty."""
    settings = shrink_recipe()
    images = TrainingImages(training_set(args), settings.search)
    own = owned(dense_network(), images)
    folder = args.work / "autoprune" / f"weights-{digest(kept('vgg-dense'), settings)}"
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
            told=Lines(bar),
        )
        pull.freeze(int(WEIGHTS_SHARE * pull.weight_count))
        sparse = finetune_weights(
            pull,
            resolution=RESOLUTION,
            images=images,
            recipe=settings.finetune,
            folder=folder / "finetune",
            teacher=dense_network(),
            told=Lines(bar),
        )
    logs = {"-search": log_of(folder / "search")}
    logs["-finetune"] = log_of(folder / "finetune")
    keep("vgg-weights", arrays_of(sparse), logs)


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
    images = TrainingImages(training_set(args), shrink_recipe().search)
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
    section.bar(
        f"weights: {lost['weights']:+.2%} lost (at most {MOST_LOST:.1%}) with "
        f"{fewer:.1f}× fewer that are not zero (at least {LEAST_FEWER}×)",
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
