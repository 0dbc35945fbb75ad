"""LeGR on CIFAR-10: ResNet-20 at four budgets, beside uniform widths and plain norms.

Trainings take hours, so each stage is a command of its own, which goes on where it was
stopped and leaves its weights (float16) and log in the repository; the last one
measures and publishes. In this order:

    first      ResNet-20, one cycle
    taught     it once more, from there, by the first teachers of `pas.py`
    longer     and once more, in a longer cycle, by them as they were trained further
    dense      and at a low rate, on images that are not mixed
    ranking    LeGR's ranking, learned at the lowest budget; nothing else may run
    tuned      what each of three rankings leaves at each budget, fine-tuned alike
    further    that of half of the MACs in a second cycle, of all three rankings alike
    latency    LeGR by OpenVINO's latency, through `specialize`; nothing else may run
    report     everything measured, and the section of RESULTS.md; likewise
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from inputs import console
from loky import ProcessPoolExecutor
from pas import TAUGHT, TAUGHT_EPOCHS, first_teachers, later_teachers
from report import Section
from same_latency import (
    compare_by_latency,
    further_models,
    require_found_here,
    shrink_to_latency_of,
)
from teachers import OnOpenVino, asked_once
from torch import nn
from trainings import (
    DIGITS,
    DRY_RUN,
    RESOLUTION,
    TEMPERATURE,
    accuracy_of,
    arrays_of,
    digest,
    is_kept,
    keep,
    keep_facts,
    kept,
    kept_counts,
    kept_facts,
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
    train,
    training_set,
    trainings_of,
    wait_until_idle,
)

from ofa_deploy.cli.progress import StageBar
from ofa_deploy.families.cifar_resnet import ResNetShape
from ofa_deploy.nn.cifar_resnet import CifarResNet
from ofa_deploy.shrink.candidates import (
    CandidateImages,
    CandidateJob,
    validation_loss,
)
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.extract import extract_module
from ofa_deploy.shrink.legr import (
    Affine,
    LegrSettings,
    RankingSearch,
    affine_scores,
)
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.ranking import RemovalOrder, quota_floors, writers
from ofa_deploy.shrink.recipe import default_shrink_recipe
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.recipe import Recipe

DEPTH = 20
SHAPE = ResNetShape.dense(DEPTH)
FIRST_EPOCHS, LONGER_EPOCHS, DENSE_EPOCHS, TUNE_EPOCHS = 40, 90, 12, 24
FURTHER_EPOCHS = 36
BUDGETS = (0.2, 0.3, 0.5, 0.7)
# The budget whose bar is beside the dense network, which was trained for far longer.
HALF = 0.5
SEEDS = (0, 1)
RANKINGS = ("LeGR", "uniform", "norm")
SETTINGS = LegrSettings(evaluations=8, population=4) if DRY_RUN else LegrSettings()
LATENCY = "legr-latency"
# Evaluations that tell what one costs at each budget.
TIMED_EVALUATIONS = 32
FIRST = one_cycle("first", epochs=FIRST_EPOCHS, peak_learning_rate=0.1, cutmix_share=0)
LONGER = one_cycle(
    "longer",
    epochs=LONGER_EPOCHS,
    peak_learning_rate=0.1,
    cutmix_share=0.5,
    temperature=TEMPERATURE,
)
DENSE = one_cycle(
    "dense",
    epochs=DENSE_EPOCHS,
    peak_learning_rate=0.01,
    cutmix_share=0,
    temperature=TEMPERATURE,
)
TUNE = one_cycle(
    "tune",
    epochs=TUNE_EPOCHS,
    peak_learning_rate=0.05,
    cutmix_share=0,
    temperature=TEMPERATURE,
)
# By then it knows 95.4 % of the training images, and 89.4 % of those held out. Without
# mixed images a second cycle left 96.6 % and 89.4 %: what it lacks is not time.
FURTHER = one_cycle(
    "further",
    epochs=FURTHER_EPOCHS,
    peak_learning_rate=0.05,
    cutmix_share=0.5,
    temperature=TEMPERATURE,
)
# Bars.
LEAST_DENSE, MOST_LOST, MOST_COST = 0.91, 0.007, 0.4
CPUS = 2


def network(weights: str) -> nn.Module:
    """ResNet-20 with what a stage left."""
    return loaded(CifarResNet(SHAPE), kept(weights))


# -- stages ----------------------------------------------------------------------------


def train_first(args: argparse.Namespace) -> None:
    """ResNet-20, one cycle."""
    torch.manual_seed(0)
    module, images = CifarResNet(SHAPE), TrainingImages(training_set(args), FIRST)
    folder = train(
        module, "first", images=images, recipe=FIRST, work=args.work / "legr"
    )
    keep("resnet20-first", arrays_of(module), {"": log_of(folder)})


def train_taught(args: argparse.Namespace) -> None:
    """It once more, from there, by the first teachers of the other benchmark."""
    train_further("resnet20-first", "taught", TAUGHT, args, first_teachers)


def train_longer(args: argparse.Namespace) -> None:
    """And once more, by the later ones."""
    train_further("resnet20-taught", "longer", LONGER, args, later_teachers)


def train_dense(args: argparse.Namespace) -> None:
    """What is left to learn from images as they are."""
    train_further("resnet20-longer", "dense", DENSE, args, later_teachers)


def train_further(
    came_from: str,
    stage: str,
    recipe: Recipe,
    args: argparse.Namespace,
    teach: Callable[[TrainingImages], nn.Module],
) -> None:
    """Train what a stage left by other networks, and keep it."""
    module, images = network(came_from), TrainingImages(training_set(args), recipe)
    folder = train(
        module,
        stage,
        images=images,
        recipe=recipe,
        work=args.work / "legr",
        teacher=asked_once(teach(images), args),
    )
    keep(f"resnet20-{stage}", arrays_of(module), {"": log_of(folder)})


def search(
    own: OwnNetwork,
    images: TrainingImages,
    *,
    share: float,
    settings: LegrSettings,
    folder: Path,
) -> RankingSearch:
    """LeGR's, at a share of the MACs."""
    price = MacPrice(own.graph)
    candidates = CandidateImages.written(
        images,
        held_out=images.validation,
        resolution=RESOLUTION,
        training_count=settings.training_count,
        validation_count=settings.validation_count,
        folder=folder / "images",
    )
    return RankingSearch(
        own,
        price=price,
        most=share * float(price(full_counts(own.graph))),
        step=1,
        settings=settings,
        images=candidates,
        folder=folder,
    )


def learn_ranking(args: argparse.Namespace) -> None:
    """At the lowest budget; and what an evaluation costs at each."""
    images = TrainingImages(training_set(args), TUNE)
    own = owned(network("resnet20-dense"), images)
    wait_until_idle()
    start = digest(kept("resnet20-dense"), SETTINGS, BUDGETS)
    folder = args.work / "legr" / f"ranking-{start}"
    seconds_each = {}
    with (
        StageBar(console) as bar,
        ProcessPoolExecutor(CPUS, env={"OMP_NUM_THREADS": "1"}) as executor,
    ):
        # The first one is for nothing: it starts the processes, too.
        for share in (BUDGETS[0], *BUDGETS):
            bar.begin(f"timing evaluations at {share:.0%}")
            seconds_each[str(share)] = seconds_of_one(own, images, share, executor)
        bar.begin("learning the ranking")
        learned = search(
            own, images, share=BUDGETS[0], settings=SETTINGS, folder=folder
        )
        best = learned.run(
            executor,
            lambda population: bar.advance(population.done, SETTINGS.evaluations),
        )
    content = {
        "network": own.sha256,
        "alpha": best.alpha.tolist(),
        "kappa": best.kappa.tolist(),
        "layers": [source.name for source in learned.sources],
        "history": learned.population.history,
        "seconds": learned.population.seconds,
        "seconds_each": seconds_each,
    }
    keep_facts("legr-ranking", content)
    # Hours of training follow: what they start from is looked at first.
    for share in BUDGETS:
        for ranking, indices in structures(own, share).items():
            job = CandidateJob(module=own.candidate(indices), images=learned.images)
            counts = [len(one) for one in indices]
            print(f"{share:.0%} {ranking}: {validation_loss(job):.4f} {counts}")


def seconds_of_one(
    own: OwnNetwork, images: TrainingImages, share: float, executor: Executor
) -> float:
    """Seconds an evaluation takes at a share of the MACs, many being side by side."""
    quick = replace(
        SETTINGS, evaluations=TIMED_EVALUATIONS, population=TIMED_EVALUATIONS
    )
    with tempfile.TemporaryDirectory() as name:
        timed = search(own, images, share=share, settings=quick, folder=Path(name))
        timed.run(executor)
    return timed.population.seconds / TIMED_EVALUATIONS


def structures(own: OwnNetwork, share: float) -> dict[str, list[torch.Tensor]]:
    """What each ranking leaves at a share of the MACs."""
    learned = kept_facts("legr-ranking")
    if learned["network"] != own.sha256:
        raise SystemExit("the ranking is of another network; run the stage ranking")
    price = MacPrice(own.graph)
    most = share * float(price(full_counts(own.graph)))
    floors = quota_floors(own.graph, safeguard=SETTINGS.safeguard, step=1)
    sources = writers(own.module, own.graph, norm_power=SETTINGS.norm_power)

    def order(affine: Affine) -> RemovalOrder:
        scores = affine_scores(own.graph, sources, affine)
        return RemovalOrder(scores, step=1, floors=floors)

    ranked = order(
        Affine(alpha=np.array(learned["alpha"]), kappa=np.array(learned["kappa"]))
    )
    plain = order(Affine.plain(len(sources)))
    return {
        "LeGR": list(ranked.kept(ranked.within(price, most))),
        "uniform": list(plain.kept(uniform_counts(own, most))),
        "norm": list(plain.kept(plain.within(price, most))),
    }


def uniform_counts(own: OwnNetwork, most: float) -> list[int]:
    """One share of all groups' channels; what is left over, where most is missing."""
    price = MacPrice(own.graph)
    full = [group.channels for group in own.graph.groups]

    def fits(counts: list[int]) -> bool:
        return float(price(torch.tensor(counts, dtype=torch.float64))) <= most

    for width in np.linspace(1, 0.02, 800):
        counts = [max(1, int(width * channels)) for channels in full]
        if fits(counts):
            break
    missing = np.array([width * c for c in full]) - counts
    for index in np.argsort(-missing):
        more = [n + (k == index) for k, n in enumerate(counts)]
        if more[index] <= full[index] and fits(more):
            counts = more
    return counts


def tune(args: argparse.Namespace) -> None:
    """Fine-tune what each ranking leaves at each budget, all for as long."""
    images = TrainingImages(training_set(args), TUNE)
    own, work = owned(network("resnet20-dense"), images), args.work / "legr"
    teacher = asked_once(OnOpenVino(network("resnet20-dense")), args)
    for share in BUDGETS:
        for ranking, indices in structures(own, share).items():
            for seed in args.seeds:
                tune_one(
                    tuned_name(ranking, share, seed),
                    extract_module(own.module, own.graph, indices),
                    indices,
                    images,
                    recipe=replace(TUNE, seed=seed),
                    teacher=teacher,
                    work=work,
                )


def tune_further(args: argparse.Namespace) -> None:
    """In a second cycle what each ranking left at half of the MACs, all for as long."""
    images = TrainingImages(training_set(args), FURTHER)
    own, work = owned(network("resnet20-dense"), images), args.work / "legr"
    teacher = asked_once(OnOpenVino(network("resnet20-dense")), args)
    for ranking, indices in structures(own, HALF).items():
        before = tuned(own, ranking, HALF)
        for seed in args.seeds:
            tune_one(
                further_name(ranking, seed),
                before[SEEDS.index(seed)],
                indices,
                images,
                recipe=replace(FURTHER, seed=seed),
                teacher=teacher,
                work=work,
            )


def tune_one(
    name: str,
    narrow: nn.Module,
    indices: list[torch.Tensor],
    images: TrainingImages,
    *,
    recipe: Recipe,
    teacher: nn.Module,
    work: Path,
) -> None:
    """What is left of the dense network by these channels, unless it is kept."""
    places = {f"kept.{k}": one.numpy() for k, one in enumerate(indices)}
    origin = digest(places, origin_of(narrow, recipe, teacher))
    if is_kept(name, origin):
        return
    folder = train(
        narrow, name, images=images, recipe=recipe, work=work, teacher=teacher
    )
    keep(name, arrays_of(narrow) | places, {"": log_of(folder)}, origin=origin)


def tuned_name(ranking: str, share: float, seed: int) -> str:
    """Of a result."""
    return f"legr-{ranking.lower()}-{share * 100:.0f}-{seed}"


def further_name(ranking: str, seed: int) -> str:
    """Of a result of the second cycle."""
    return f"{tuned_name(ranking, HALF, seed)}-further"


def tuned(
    own: OwnNetwork, ranking: str, share: float, *, further: bool = False
) -> list[nn.Module]:
    """What the stage `tuned` left, or `further`, of each seed."""
    indices = [one.tolist() for one in structures(own, share)[ranking]]
    found = []
    for seed in SEEDS:
        name = tuned_name(ranking, share, seed)
        arrays = kept(further_name(ranking, seed) if further else name)
        if [arrays[f"kept.{k}"].tolist() for k in range(len(indices))] != indices:
            raise SystemExit("the ranking is another one by now; run the stage tuned")
        found.append(narrowed(own, arrays))
    return found


def prune_by_latency(args: argparse.Namespace) -> None:
    """The latency of the network with half of the MACs, as a budget."""
    data = training_set(args)
    images = TrainingImages(data, TUNE)
    own = owned(network("resnet20-dense"), images)
    by_macs = onnx_of(tuned(own, "LeGR", HALF)[0])
    recipe = replace(default_shrink_recipe(), search=TUNE, finetune=TUNE, legr=SETTINGS)
    shrink_to_latency_of(
        by_macs,
        came_from=tuned_name("LeGR", HALF, 0),
        name=LATENCY,
        model=network("resnet20-dense"),
        method="legr",
        recipe=recipe,
        data=data,
        work=args.work / "legr",
        seeds=SEEDS,
    )


# -- the report ------------------------------------------------------------------------


def publish(args: argparse.Namespace) -> None:
    """Measure everything, and write the section."""
    require_found_here(LATENCY)
    images = TrainingImages(training_set(args), TUNE)
    test = test_set(args)
    own = owned(network("resnet20-dense"), images)
    inputs = test_inputs(test, images.normalisation)
    dense = accuracy_of(onnx_of(network("resnet20-dense")), inputs, test)
    price = MacPrice(own.graph)
    full = float(price(full_counts(own.graph)))
    rows = {f"{share:.0%}": (share, TUNE_EPOCHS) for share in BUDGETS}
    longest = f"{HALF:.0%}, further"
    rows[longest] = (HALF, TUNE_EPOCHS + FURTHER_EPOCHS)
    found = {
        (ranking, row): mean(
            accuracy_of(onnx_of(one), inputs, test)
            for one in tuned(own, ranking, share, further=row == longest)
        )
        for row, (share, _) in rows.items()
        for ranking in RANKINGS
    }
    macs = {
        (ranking, row): float(price(kept_counts(tuned_name(ranking, share, 0), own)))
        for row, (share, _) in rows.items()
        for ranking in RANKINGS
    }
    section = Section("legr", "LeGR", results=args.results)
    section.text(
        f"ResNet-{DEPTH}, {full:.1f} MMACs, trained for {FIRST_EPOCHS} epochs, "
        f"and by other networks for {TAUGHT_EPOCHS}, {LONGER_EPOCHS} and "
        f"{DENSE_EPOCHS} more: "
        f"{dense:.2%} of the test images. What each ranking leaves "
        "is fine-tuned alike, with the dense network as teacher; at half of the MACs "
        "once more in a second cycle. "
        f"Test accuracy of the exported models, the mean of {len(SEEDS)} trainings; "
        "and MMACs."
    )
    section.table(
        ["of the MACs", "epochs", *RANKINGS],
        [
            [
                row,
                f"{epochs}",
                *(f"{found[one, row]:.2%} ({macs[one, row]:.1f})" for one in RANKINGS),
            ]
            for row, (_, epochs) in rows.items()
        ],
    )
    section.table(
        ["training", "epochs", "minutes"],
        trainings_of("resnet20-") + trainings_of("legr-"),
    )
    section.bar(
        f"dense: {dense:.2%} (at least {LEAST_DENSE:.1%})", passed=dense >= LEAST_DENSE
    )
    lost = round(dense - found["LeGR", longest], DIGITS)
    section.bar(
        f"half of the MACs: {lost:+.2%} lost (at most {MOST_LOST:.1%}) after "
        f"{rows[longest][1]} epochs",
        passed=lost <= MOST_LOST,
    )
    for other in RANKINGS[1:]:
        won = [round(found["LeGR", row] - found[other, row], DIGITS) for row in rows]
        told = ", ".join(
            f"{one:+.2%} at {row}" for one, row in zip(won, rows, strict=True)
        )
        section.bar(f"LeGR above {other}: {told}", passed=min(won) > 0)
    write_search(section)
    compare_by_latency(
        section,
        LATENCY,
        [onnx_of(one) for one in tuned(own, "LeGR", HALF)],
        inputs,
        test,
        again=further_models(LATENCY, SEEDS[1:]),
    )
    section.publish()


def write_search(section: Section) -> None:
    """What one search costs, beside one a budget."""
    learned = kept_facts("legr-ranking")
    each = learned["seconds_each"]
    rivals_s = SETTINGS.evaluations * sum(each.values())
    ratio = learned["seconds"] / rivals_s
    section.bar(
        f"search for all budgets: {learned['seconds']:.0f} s, {ratio:.2f} of a search "
        f"for each, {rivals_s:.0f} s by {TIMED_EVALUATIONS} evaluations at each budget "
        f"(at most {MOST_COST:g})",
        passed=ratio <= MOST_COST,
    )


STAGES = {
    "first": train_first,
    "taught": train_taught,
    "longer": train_longer,
    "dense": train_dense,
    "ranking": learn_ranking,
    "tuned": tune,
    "further": tune_further,
    "latency": prune_by_latency,
    "report": publish,
}


if __name__ == "__main__":
    run_stage(__doc__, STAGES, seeds=SEEDS)
