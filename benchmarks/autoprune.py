"""AutoPrune on CIFAR-10: half of the MACs by filters, one weight in fifty by weights.

Both of a VGG-like network. Trainings take hours, so each stage is a command of its own,
which goes on where it was stopped and leaves its weights (float16) and log in the
repository; the last one measures and publishes. In this order:

    dense             the network that both are made from
    filters-search    half of its MACs
    weights-search    one in fifty of its weights, beside it or after it
    filters           what was found, fine-tuned
    weights           likewise, beside it or after it
    report            everything measured, and the section of RESULTS.md
"""

from __future__ import annotations

import argparse
import lzma
from dataclasses import replace
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
from ofa_deploy.shrink.sparse import SparsityPull, finetune_weights, search_weights
from ofa_deploy.shrink.weight_masks import weights_of
from ofa_deploy.train.images import TrainingImages

DENSE_EPOCHS, SEARCH_EPOCHS, FINETUNE_EPOCHS = 60, 24, 60
# With room for norms and biases, none of which goes, and for weights whose parameters
# are as large as the last one's.
MACS_SHARE, WEIGHTS_SHARE = 0.5, 0.0192
STEP = 8
Form = Literal["filters", "weights"]
FORMS: tuple[Form, ...] = ("filters", "weights")
DENSE = one_cycle("dense", epochs=DENSE_EPOCHS, peak_learning_rate=0.1)
# Bars.
MOST_LOST, LEAST_FEWER = 0.005, 50


def shrink_recipe(form: Form) -> ShrinkRecipe:
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


def search_origin(form: Form) -> str:
    """Digest of all that decides what a search leaves."""
    wanted = (MACS_SHARE, STEP) if form == "filters" else (WEIGHTS_SHARE,)
    settings = replace(shrink_recipe(form), finetune=DENSE)  # of no matter there
    return digest(kept("vgg-dense"), settings, *wanted)


def tuned_origin(form: Form) -> str:
    """Likewise of fine-tuning; of what the search of today's settings left."""
    name, origin = f"vgg-{form}-search", search_origin(form)
    found = kept(name)
    if not is_kept(name, origin):
        raise SystemExit(
            f"{name} is of another network or recipe; run the stage {form}-search"
        )
    return digest(found, origin, shrink_recipe(form))


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


def search_for_filters(args: argparse.Namespace) -> None:
    """Half of the MACs."""
    settings, origin = shrink_recipe("filters"), search_origin("filters")
    if is_kept("vgg-filters-search", origin):
        return
    images = TrainingImages(training_set(args), settings.search)
    own = owned(dense_network(), images)
    folder = args.work / "autoprune" / f"filters-search-{origin}"
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
            folder=folder,
            on_progress=Lines(bar),
        ).run("autoprune")
    full = float(price(full_counts(own.graph)))
    indices = found.order.kept(found.order.within(price, MACS_SHARE * full))
    arrays = arrays_of(extract_module(own.module, own.graph, indices))
    arrays |= {f"kept.{index}": one.numpy() for index, one in enumerate(indices)}
    keep("vgg-filters-search", arrays, {"": log_of(folder)}, origin=origin)


def tune_filters(args: argparse.Namespace) -> None:
    """What the search left."""
    recipe, origin = shrink_recipe("filters").finetune, tuned_origin("filters")
    if is_kept("vgg-filters", origin):
        return
    images = TrainingImages(training_set(args), recipe)
    found = kept("vgg-filters-search")
    narrow = narrowed(owned(dense_network(), images), found)
    folder = args.work / "autoprune" / f"filters-{origin}"
    with StageBar(console) as bar:
        finetune(
            narrow,
            resolution=RESOLUTION,
            recipe=recipe,
            images=images,
            folder=folder,
            teacher=dense_network(),
            on_progress=Lines(bar),
        )
    arrays = arrays_of(narrow)
    arrays |= {name: one for name, one in found.items() if name.startswith("kept.")}
    keep("vgg-filters", arrays, {"-finetune": log_of(folder)}, origin=origin)


def search_for_weights(args: argparse.Namespace) -> None:
    """One weight in fifty."""
    settings, origin = shrink_recipe("weights"), search_origin("weights")
    if is_kept("vgg-weights-search", origin):
        return
    images = TrainingImages(training_set(args), settings.search)
    folder = args.work / "autoprune" / f"weights-search-{origin}"
    with StageBar(console) as bar:
        pull = search_weights(
            owned(dense_network(), images).module,
            target_share=WEIGHTS_SHARE,
            settings=settings.sparsity,
            estimator=settings.estimator,
            deciding_share=settings.deciding_share,
            resolution=RESOLUTION,
            images=images,
            recipe=settings.search,
            folder=folder,
            on_progress=Lines(bar),
        )
    sparse = pull.narrowed_to(int(WEIGHTS_SHARE * pull.weight_count))
    keep("vgg-weights-search", arrays_of(sparse), {"": log_of(folder)}, origin=origin)


def tune_weights(args: argparse.Namespace) -> None:
    """What the search left."""
    settings, origin = shrink_recipe("weights"), tuned_origin("weights")
    if is_kept("vgg-weights", origin):
        return
    images = TrainingImages(training_set(args), settings.finetune)
    sparse = loaded(Vgg(), kept("vgg-weights-search"))
    nonzero, _ = counted(sparse)
    # Masks of what is there: weights of zero are the first to go.
    pull = SparsityPull(
        sparse, target_share=WEIGHTS_SHARE, steps=1, settings=settings.sparsity
    )
    pull.freeze(nonzero)
    folder = args.work / "autoprune" / f"weights-{origin}"
    with StageBar(console) as bar:
        sparse = finetune_weights(
            pull,
            resolution=RESOLUTION,
            images=images,
            recipe=settings.finetune,
            folder=folder,
            teacher=dense_network(),
            on_progress=Lines(bar),
        )
    keep("vgg-weights", arrays_of(sparse), {"-finetune": log_of(folder)}, origin=origin)


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
    for form in FORMS:
        if not is_kept(f"vgg-{form}", tuned_origin(form)):
            raise SystemExit(
                f"vgg-{form} is of another search or recipe; run the stage {form}"
            )
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
    lost = {name: round(found["dense"] - found[name], DIGITS) for name in FORMS}
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
    "filters-search": search_for_filters,
    "weights-search": search_for_weights,
    "filters": tune_filters,
    "weights": tune_weights,
    "report": publish,
}


if __name__ == "__main__":
    run_stage(__doc__, STAGES)
