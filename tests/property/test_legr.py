"""Laws of LeGR; P1 to P8 are numbered as in the method's specification."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.errors import SpaceError, TraceError, TrainingError
from ofa_deploy.families import repvgg
from ofa_deploy.nn.static import FusedNet, StaticNet
from ofa_deploy.plan import lower
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.shrink import candidates, legr
from ofa_deploy.shrink.candidates import (
    CandidateImages,
    CandidateJob,
    _losses,
    validation_loss,
    warn_if_few,
)
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.extract import extract_module, extract_plan
from ofa_deploy.shrink.legr import (
    CANDIDATES_PER_CORE,
    STATE_FILE,
    Affine,
    LegrSettings,
    Population,
    RankingSearch,
    affine_scores,
    bred,
)
from ofa_deploy.shrink.masks import BinaryMask
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.ranking import RemovalOrder, quota_floors, writers
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.recipe import Phase, Recipe
from profilers.device import available_cores
from tests.support import own_networks, tiny
from tests.support.mac_counter import counted_macs

SIZE = own_networks.SIZE
NORMALISATION = Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3)


def owned(network: nn.Module) -> OwnNetwork:
    return OwnNetwork.of(
        network,
        resolution=SIZE,
        normalisation=NORMALISATION,
        class_names=tuple("abcde"),
    )


def own(name: str) -> OwnNetwork:
    torch.manual_seed(0)
    return owned(own_networks.ALL[name]().eval())


RESIDUAL, CHAIN = own("residual"), own("vgg")
PRICE = MacPrice(RESIDUAL.graph)
FULL = float(PRICE(full_counts(RESIDUAL.graph)))
SOURCES = writers(RESIDUAL.module, RESIDUAL.graph)


def order_of(
    network: OwnNetwork, affine: Affine, *, safeguard: float = 0.1, step: int = 1
) -> RemovalOrder:
    sources = writers(network.module, network.graph)
    return RemovalOrder(
        affine_scores(network.graph, sources, affine),
        step=step,
        floors=quota_floors(network.graph, safeguard=safeguard, step=step),
    )


def affine(seed: int, layers: int = len(SOURCES)) -> Affine:
    rng = np.random.default_rng(seed)
    return Affine(
        alpha=np.exp(rng.normal(size=layers)), kappa=rng.normal(size=layers) * 0.1
    )


def cost(counts: list[int]) -> float:
    return float(PRICE(torch.tensor(counts, dtype=torch.float64)))


def kept(order: RemovalOrder, share: float) -> list[set[int]]:
    counts = order.within(PRICE, share * FULL)
    return [set(indices.tolist()) for indices in order.kept(counts)]


seeds = st.integers(0, 10_000)
shares = st.floats(0.15, 0.95)


# -- P1, P2: what the numbers do -------------------------------------------------------


def test_plain_numbers_rank_by_the_norm_alone() -> None:
    order = order_of(CHAIN, Affine.plain(3), safeguard=0)
    norms = [
        (float(weight.square().sum()), index, channel)
        for index, name in enumerate(("features.0", "features.4", "classifier.0"))
        for channel, weight in enumerate(
            cast(nn.Conv2d, CHAIN.module.get_submodule(name)).weight.detach()
        )
    ]
    # Half of all, but for the last one of each layer.
    gone = {(index, channel) for _, index, channel in sorted(norms)[:20]}
    found = order.kept(order.counts(20))
    for index, indices in enumerate(found):
        left = set(range(CHAIN.graph.groups[index].channels)) - set(indices.tolist())
        assert left == {channel for i, channel in gone if i == index}


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(1e-3, 1e3), shares)
def test_a_common_factor_changes_nothing(
    seed: int, factor: float, share: float
) -> None:
    one = affine(seed)
    other = Affine(alpha=one.alpha * factor, kappa=one.kappa * factor)
    assert kept(order_of(RESIDUAL, one), share) == kept(
        order_of(RESIDUAL, other), share
    )


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(-5, 5), st.integers(1, 36))
def test_of_single_layers_a_common_summand_changes_nothing(
    seed: int, summand: float, steps: int
) -> None:
    one = affine(seed, 3)
    other = Affine(alpha=one.alpha, kappa=one.kappa + summand)
    first, second = order_of(CHAIN, one), order_of(CHAIN, other)
    assert first.counts(steps) == second.counts(steps)


def test_of_layers_in_one_group_a_common_summand_counts_as_often_as_they_are() -> None:
    """Groups of more layers get more of it, and go later."""
    one = affine(0)
    orders = [
        order_of(RESIDUAL, Affine(alpha=one.alpha, kappa=one.kappa + summand))
        for summand in (0.0, 1e6)
    ]
    first, second = ([o.counts(n) for n in range(len(o))] for o in orders)
    assert first != second


def test_norms_are_squared_unless_they_are_not_to_be() -> None:
    plain = writers(RESIDUAL.module, RESIDUAL.graph, norm_power=1)
    for one, squared in zip(plain, SOURCES, strict=True):
        weight = RESIDUAL.module.get_submodule(one.name).weight
        assert isinstance(weight, Tensor)
        norms = weight.detach().double().flatten(1).norm(dim=1).numpy()
        np.testing.assert_allclose(one.norms, norms)
        np.testing.assert_allclose(squared.norms, norms**2)
    with pytest.raises(SpaceError, match="norm_power=3; give 2"):
        LegrSettings(norm_power=3)


def test_a_layer_of_large_kappa_goes_last_and_of_small_kappa_first() -> None:
    layers = [source.name for source in SOURCES]
    place = layers.index("blocks.1.first")
    group = [g.name for g in RESIDUAL.graph.groups].index("blocks.1.first")
    full = int(full_counts(RESIDUAL.graph)[group])
    for kappa in (1e6, -1e6):
        numbers = Affine.plain(len(layers))
        numbers.kappa[place] = kappa
        order = order_of(RESIDUAL, numbers)
        floor = quota_floors(RESIDUAL.graph, safeguard=0.1, step=1)[group]
        others = len(order) - (full - floor)
        if kappa > 0:
            assert order.counts(others)[group] == full
        else:
            assert order.counts(full - floor)[group] == floor


# -- P3 to P5, P7: the order -----------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seeds, shares)
def test_within_a_group_the_least_go(seed: int, share: float) -> None:
    order = order_of(RESIDUAL, affine(seed))
    for score, indices in zip(order.scores, kept(order, share), strict=True):
        gone = set(range(len(score))) - indices
        if gone:
            assert max(score[list(gone)]) <= min(score[list(indices)])


def test_a_group_of_one_layer_goes_by_its_norms_whatever_its_numbers() -> None:
    order = order_of(RESIDUAL, affine(3))
    names = [group.name for group in RESIDUAL.graph.groups]
    for source in SOURCES:
        if source.name.endswith("first"):
            score = order.scores[names.index(source.name)]
            assert np.array_equal(np.argsort(score), np.argsort(source.norms))


@settings(max_examples=20, deadline=None)
@given(seeds, shares, shares, st.sampled_from([1, 4]))
def test_a_lower_budget_keeps_a_part_of_what_a_higher_one_keeps(
    seed: int, one: float, other: float, step: int
) -> None:
    low, high = sorted((max(one, 0.4), max(other, 0.4)))
    order = order_of(RESIDUAL, affine(seed), step=step)
    for small, large in zip(kept(order, low), kept(order, high), strict=True):
        assert small <= large


@settings(max_examples=20, deadline=None)
@given(seeds, shares)
def test_the_price_is_kept_and_was_not_a_step_before(seed: int, share: float) -> None:
    order = order_of(RESIDUAL, affine(seed))
    counts = order.within(PRICE, share * FULL)
    assert cost(counts) <= share * FULL
    steps = int(full_counts(RESIDUAL.graph).sum()) - sum(counts)
    assert order.counts(steps) == counts
    assert cost(order.counts(steps - 1)) > share * FULL


def test_the_price_is_what_the_narrowed_network_computes() -> None:
    order = order_of(RESIDUAL, affine(1))
    counts = order.within(PRICE, 0.5 * FULL)
    narrow = extract_module(RESIDUAL.module, RESIDUAL.graph, order.kept(counts))
    assert 1e6 * cost(counts) == pytest.approx(counted_macs(narrow, SIZE))


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([1, 4, 8]))
def test_every_group_keeps_its_quota(seed: int, safeguard: float, step: int) -> None:
    order = order_of(RESIDUAL, affine(seed), safeguard=safeguard, step=step)
    counts = order.counts(len(order))
    for group, count in zip(RESIDUAL.graph.groups, counts, strict=True):
        least = (
            1 if safeguard == 0 else max(2, int(np.ceil(safeguard * group.channels)))
        )
        assert least <= count < least + step
        assert count % step == 0 or count == group.channels


def test_a_budget_below_the_quotas_is_refused() -> None:
    with pytest.raises(SpaceError, match="with its floors of channels"):
        order_of(RESIDUAL, affine(0), safeguard=0.5).within(PRICE, 0.05 * FULL)


@pytest.mark.parametrize("safeguard", [-0.1, 1.1, float("nan")])
def test_a_safeguard_that_is_no_share_is_refused(safeguard: float) -> None:
    with pytest.raises(SpaceError, match="from 0 to 1"):
        quota_floors(RESIDUAL.graph, safeguard=safeguard, step=1)


# -- P8: evolution ---------------------------------------------------------------------

QUICK = LegrSettings(
    evaluations=30,
    population=8,
    samples=4,
    together=3,
    training_count=36,
    validation_count=18,
)


def made_up_loss(candidate: Affine) -> float:
    """Least where all layers are worth the same."""
    off = np.square(np.log(candidate.alpha)) + np.abs(candidate.kappa)
    return float(off.sum())


def evolved(settings: LegrSettings, layers: int = 6) -> tuple[Population, list[Affine]]:
    population = Population.empty(settings.population, layers)
    seen = []
    for index in range(settings.evaluations):
        child = bred(
            population, index, settings=settings, kappa_spread=np.full(layers, 0.1)
        )
        seen.append(child)
        population.take(child, made_up_loss(child))
    return population, seen


@pytest.mark.parametrize("seed", range(3))
def test_the_oldest_make_room_and_the_best_stays(seed: int) -> None:
    settings = replace(QUICK, seed=seed)
    population, seen = evolved(settings)
    youngest = seen[-settings.population :]
    for index, candidate in enumerate(youngest, start=len(seen) - len(youngest)):
        slot = index % settings.population
        assert np.array_equal(population.alpha[slot], candidate.alpha)
    assert population.history == sorted(population.history, reverse=True)
    assert population.best_loss == min(made_up_loss(one) for one in seen)


def test_norms_as_they_are_are_among_the_first() -> None:
    _, seen = evolved(QUICK)
    assert np.array_equal(seen[QUICK.population - 1].alpha, np.ones(6))
    assert not seen[QUICK.population - 1].kappa.any()


def test_a_child_differs_from_its_parent_in_few_layers() -> None:
    settings = replace(QUICK, mutated_share=0.2)
    population, _ = evolved(settings, layers=20)
    child = bred(
        population,
        settings.evaluations,
        settings=settings,
        kappa_spread=np.full(20, 0.1),
    )
    changed = [int((child.alpha != parent).sum()) for parent in population.alpha]
    assert 1 <= min(changed) <= 4


def test_the_parent_is_the_best_of_those_that_were_drawn() -> None:
    layers, settings = 40, replace(QUICK, samples=300)
    strangers, _ = evolved(replace(settings, evaluations=settings.population), layers)
    best = int(strangers.losses.argmin())
    for index in range(settings.population, settings.evaluations):
        child = bred(
            strangers, index, settings=settings, kappa_spread=np.full(layers, 0.1)
        )
        changed = (child.alpha != strangers.alpha).sum(1)
        assert changed[best] <= settings.mutated_share * layers
        assert np.delete(changed, best).min() > layers / 2


def test_mutations_of_factors_become_smaller() -> None:
    layers, settings = 4000, replace(QUICK, mutated_share=1.0)
    parents = Population.empty(settings.population, layers)
    spreads = []
    for index in (settings.population, settings.evaluations - 1):
        child = bred(
            parents, index, settings=settings, kappa_spread=np.full(layers, 0.1)
        )
        assert (child.alpha > 0).all()
        spreads.append((np.log(child.alpha).std(), child.kappa.std()))
    (early, early_kappa), (late, late_kappa) = spreads
    assert early == pytest.approx(QUICK.spread * (1 - 0.8 * 8 / 30), rel=0.1)
    assert early_kappa == pytest.approx(0.1, rel=0.1)
    # 1 at the first evaluation, falling evenly to 0.2 behind the last.
    assert late / early == pytest.approx(
        (1 - 0.8 * 29 / 30) / (1 - 0.8 * 8 / 30), rel=0.1
    )
    assert late_kappa / early_kappa == pytest.approx(1, rel=0.1)


# -- with real networks ----------------------------------------------------------------


def test_what_is_added_to_norms_is_spread_as_they_are(images: CandidateImages) -> None:
    spread = search(images)._kappa_spread
    stds = [source.norms.std() for source in SOURCES]
    assert spread.tolist() == pytest.approx(stds)
    assert len(set(stds)) > 1


def test_the_published_numbers_are_the_default() -> None:
    settings = LegrSettings()
    assert (settings.evaluations, settings.population, settings.samples) == (
        400,
        64,
        16,
    )
    found = (settings.mutated_share, settings.spread, settings.safeguard)
    assert found == (0.1, 1.0, 0.1)


def test_what_tunes_a_candidate_sees_no_image_twice(tmp_path: Path) -> None:
    phase = Phase(name="x", epochs=1, peak_learning_rate=0.1, distill=False)
    data = tiny.images(per_class=40, seed=2)
    training = TrainingImages(data, Recipe(phases=(phase,), batch_size=18))
    images = CandidateImages.written(
        training,
        held_out=training.validation,
        resolution=SIZE,
        training_count=9,
        validation_count=6,
        tuning_count=60,
        folder=tmp_path,
    )
    assert [images.count(part) for part in ("training", "validation", "tuning")] == [
        *(9, 6, 60)
    ]
    seen = [x.numpy().tobytes() for batch, _ in images.batches("tuning") for x in batch]
    assert len(set(seen)) == 60


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CandidateImages:
    phase = Phase(name="x", epochs=1, peak_learning_rate=0.1, distill=False)
    data = tiny.images(per_class=40, seed=2)
    settings = Recipe(phases=(phase,), batch_size=18, crop_padding=1)
    training = TrainingImages(data, settings)
    return CandidateImages.written(
        training,
        held_out=training.validation,
        resolution=SIZE,
        training_count=QUICK.training_count,
        validation_count=QUICK.validation_count,
        folder=tmp_path_factory.mktemp("images"),
        tuning_count=QUICK.training_count,
    )


class InTurn(Executor):
    """Runs jobs as they come, in this thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        result: Future[Any] = Future()
        result.set_result(fn(*args, **kwargs))
        return result


def search(
    images: CandidateImages, folder: Path | None = None, **changes: Any
) -> RankingSearch:
    return RankingSearch(
        RESIDUAL,
        price=PRICE,
        most=0.4 * FULL,
        step=1,
        settings=replace(QUICK, **changes),
        images=images,
        folder=folder,
    )


def test_a_search_leaves_the_network_as_it_was_and_finds_the_least_loss(
    images: CandidateImages,
) -> None:
    before = RESIDUAL.sha256
    one = search(images, tuning_steps=1)
    best = one.run(InTurn())
    assert RESIDUAL.sha256 == before
    assert one.population.done == QUICK.evaluations
    order = one.order(best)
    module = extract_module(
        RESIDUAL.module, RESIDUAL.graph, order.kept(order.within(PRICE, one.most))
    )
    job = CandidateJob(module=module, images=images, tuning_steps=1)
    assert validation_loss(job) == pytest.approx(one.population.best_loss, rel=1e-4)


def chain_of_branches() -> StaticNet:
    torch.manual_seed(0)
    space = replace(
        repvgg.small(class_count=own_networks.CLASS_COUNT),
        resolutions=(SIZE,),
        stages=(repvgg.stage(32, depths=(1,)),),
    )
    return StaticNet(lower(space, space.largest()))


def test_candidates_of_a_chain_of_branches_are_judged_without_what_they_lost(
    images: CandidateImages,
) -> None:
    network = chain_of_branches()
    own = owned(network)
    x = torch.randn(4, 3, SIZE, SIZE)
    found = []
    for share in (0.5, 0.75):
        kept = [torch.arange(int(share * g.channels)) for g in own.graph.groups]
        left = extract_plan(network, own.graph, kept, name="left")
        expected = FusedNet(left.plan, left.weights).eval()(x)
        module = own.candidate(kept).eval()
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        found.append(validation_loss(CandidateJob(module=module, images=images)))
    assert found[0] != found[1]
    with pytest.raises(TraceError, match="nothing is known of how to remove"):
        extract_module(own.module, own.graph, kept)


def test_tuning_a_candidate_of_a_chain_brings_no_channel_back(
    images: CandidateImages,
) -> None:
    own = owned(chain_of_branches())
    kept = [torch.arange(g.channels // 2) for g in own.graph.groups]
    module = own.candidate(kept)
    before = {name: one.detach().clone() for name, one in module.named_parameters()}
    validation_loss(
        CandidateJob(module=module, images=images, tuning_steps=3, learning_rate=0.1)
    )
    moved = [
        name
        for name, one in module.named_parameters()
        if not torch.equal(one.detach(), before[name])
    ]
    assert moved  # it was tuned
    assert not [name for name in moved if name.endswith("latent")]
    masks = [m for m in module.modules() if isinstance(m, BinaryMask)]
    found = [mask.kept().tolist() for mask in masks]
    assert found == [one.tolist() for one in kept]


def test_a_ranking_leaves_a_nested_family(images: CandidateImages) -> None:
    one = search(images)
    affine = Affine.plain(len(one.sources))
    family = one.family(affine, InTurn())
    prices = [member.price for member in family]
    assert prices == sorted(prices)
    assert prices[0] <= one.most
    assert prices[-1] == pytest.approx(FULL)
    for smaller, larger in itertools.pairwise(family):
        counts = zip(smaller.counts, larger.counts, strict=True)
        assert all(a <= b for a, b in counts)
    assert all(member.loss is not None for member in family)


def test_few_images_to_rank_by_are_told_of_with_the_standard_error(
    images: CandidateImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = CandidateJob(module=RESIDUAL.module, images=images)
    losses = _losses(job.module, images).double()
    error = float(losses.std() / len(losses) ** 0.5)
    with pytest.warns(UserWarning, match=f"standard error of {error:.4f}"):
        warn_if_few(RESIDUAL.module, images)
    monkeypatch.setattr(candidates, "FEW_IMAGES", len(losses))
    warn_if_few(RESIDUAL.module, images)  # pytest raises what is warned of


def test_whoever_judges_the_ranking_is_the_same(images: CandidateImages) -> None:
    with ThreadPoolExecutor(2) as threads:
        side_by_side = search(images).run(threads)
    in_turn = search(images).run(InTurn())
    assert np.array_equal(side_by_side.alpha, in_turn.alpha)


class Dropping(nn.Module):
    """Drops channels before a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.drop = nn.Conv2d(3, 8, 3), nn.Dropout2d(0.5)
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.drop(self.stem(x))))
        return cast(Tensor, self.head(x.relu().mean((2, 3))))


def test_candidates_are_judged_without_dropout(images: CandidateImages) -> None:
    """Threads would draw it from one generator, in whichever order they come to it."""
    network = Dropping()
    losses = {
        validation_loss(
            CandidateJob(module=copy.deepcopy(network), images=images, seed=seed)
        )
        for seed in range(3)
    }
    assert len(losses) == 1


def test_few_candidates_wait_at_a_time(images: CandidateImages) -> None:
    searched = search(images)
    waiting: list[int] = []

    class Counting(InTurn):
        """Remembers, at each job, how many nobody has looked at."""

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            waiting.append(len(waiting) + 1 - searched.population.done)
            return super().submit(fn, *args, **kwargs)

    searched.run(Counting())
    assert len(waiting) == searched.settings.evaluations
    most = max(searched.settings.together, CANDIDATES_PER_CORE * available_cores())
    assert max(waiting) <= most


def test_a_search_that_was_killed_goes_on(
    images: CandidateImages, tmp_path: Path
) -> None:
    whole = search(images).run(InTurn())

    def stop(population: Population) -> None:
        if population.done > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(images, tmp_path).run(InTurn(), stop)
    resumed = search(images, tmp_path)
    assert 8 <= resumed.population.done < QUICK.evaluations
    best = resumed.run(InTurn())
    assert np.array_equal(best.alpha, whole.alpha)
    assert np.array_equal(best.kappa, whole.kappa)


def test_a_search_of_other_images_is_not_continued(
    images: CandidateImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legr, "validation_loss", lambda job: 1.0)
    search(images, tmp_path / "search").run(InTurn())
    folder = tmp_path / "others"
    shutil.copytree(images.folder, folder)
    labels = np.load(folder / "validation_labels.npy")
    np.save(folder / "validation_labels.npy", labels[::-1])
    with pytest.raises(TrainingError, match="another search"):
        search(replace(images, folder=folder), tmp_path / "search")


def test_another_search_is_not_continued(
    images: CandidateImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legr, "validation_loss", lambda job: 1.0)
    search(images, tmp_path).run(InTurn())
    assert (tmp_path / STATE_FILE).is_file()
    with pytest.raises(TrainingError, match="another search"):
        search(images, tmp_path, seed=1)


def test_a_loss_that_is_no_number_is_the_worst(
    images: CandidateImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: Iterator[float] = iter([float("nan"), *(5.0 for _ in range(40))])
    monkeypatch.setattr(legr, "validation_loss", lambda job: next(losses))
    one = search(images)
    one.run(InTurn())
    assert one.population.best_loss == 5.0


def test_of_losses_that_are_no_numbers_nothing_is_learned(
    images: CandidateImages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(legr, "validation_loss", lambda job: float("inf"))
    told = f"the loss of all {QUICK.population} candidates is no number"
    with pytest.raises(TrainingError, match=told):
        search(images, tmp_path).run(InTurn())
    with pytest.raises(TrainingError, match=told):  # nor is it after a restart
        search(images, tmp_path).run(InTurn())


@pytest.mark.parametrize("population", [0, 50])
def test_a_population_is_of_judged_candidates(population: int) -> None:
    with pytest.raises(SpaceError, match=f"population={population}|of {population}"):
        replace(QUICK, population=population)
