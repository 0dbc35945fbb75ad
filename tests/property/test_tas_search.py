"""Laws of a whole search by TAS: what it starts from, says, and leaves for a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from ofa_deploy.constraints import Constraints, Verdict
from ofa_deploy.errors import DataError
from ofa_deploy.evidence import EXPECTED_RATIO
from ofa_deploy.report.shrunk import (
    ShrinkHistory,
    _chances,
    _course,
    _family,
    _told_whole,
    draw_chances,
    draw_kept,
    draw_losses,
)
from ofa_deploy.reporting import Silent
from ofa_deploy.shrink import methods
from ofa_deploy.shrink.channel_prices import LatencyPrice
from ofa_deploy.shrink.cost import MacPrice
from ofa_deploy.shrink.device_prices import DevicePrices
from ofa_deploy.shrink.fitting import NEAR_BUDGET, Fitted, Fitting
from ofa_deploy.shrink.methods import Found, Search, likeliest
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import ShrinkRecipe, default_shrink_recipe
from ofa_deploy.shrink.tas import PREFLIGHT_PASSES, Preflight, TasSettings, preflight
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.tas_layers import temperature
from ofa_deploy.shrink.tas_order import LikeliestOrder
from ofa_deploy.shrink.tas_price import ExpectedPrice
from ofa_deploy.target import Target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LOG_FILE, LoopProgress
from tests.support import own_networks, tiny, tiny_session
from tests.support.searching import owned, resnet, scattered, searched

SIZE = own_networks.SIZE
EPOCHS, TUNED = 3, 5


def own(seed: int = 0) -> OwnNetwork:
    torch.manual_seed(seed)
    row = nn.Sequential(*(own_networks.Residual(16, 16, 1) for _ in range(2)))
    network = nn.Sequential(
        own_networks.conv(3, 16), row, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    return searched_by_tas(owned(network, resolution=SIZE, class_count=3))


def recipe(*, fresh: bool) -> ShrinkRecipe:
    found = default_shrink_recipe(
        search_epochs=EPOCHS, finetune_epochs=TUNED, batch_size=18
    )
    return replace(
        found,
        search=replace(found.search, crop_padding=1),
        finetune=replace(found.finetune, crop_padding=1),
        tas=TasSettings(rate=0.05, fresh=fresh),
    )


def search(
    network: OwnNetwork,
    *,
    fresh: bool = False,
    share: float = 0.5,
    folder: Path | None = None,
    distill: bool = True,
    tas: TasSettings | None = None,
    told: Callable[[str, LoopProgress], None] = lambda stage, progress: None,
    announced: Callable[[Preflight], None] = lambda found: None,
) -> Found:
    settings = replace(recipe(fresh=fresh), distill=distill)
    settings = replace(settings, tas=tas or settings.tas)
    images = TrainingImages(tiny.images(per_class=60, seed=4), settings.search)
    return Search(
        own=network,
        price=MacPrice(network.graph),
        share=share,
        step=1,
        recipe=settings,
        images=images,
        held_out=images.validation,
        folder=folder,
        on_progress=told,
        announced=announced,
    ).run("tas")


# -- what it starts from ---------------------------------------------------------------


def learned(found: Found) -> list[Tensor]:
    return list(cast(LikeliestOrder, found.order).probabilities)


def test_a_fresh_search_is_the_same_whatever_weights_were_brought() -> None:
    assert_alike = partial(torch.testing.assert_close, rtol=0, atol=0)
    first, second = (search(own(seed), fresh=True) for seed in (0, 1))
    assert first.depths == second.depths
    for one, other in zip(learned(first), learned(second), strict=True):
        assert_alike(one, other)
    brought = [search(own(seed)) for seed in (0, 1)]
    pairs = zip(*map(learned, brought), strict=False)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_a_search_for_less_than_whole_stages_leaves_fewer_blocks() -> None:
    network = own()
    distributions = searched(network)
    price = ExpectedPrice(distributions, MacPrice(network.graph))
    narrowest = [one.choices[0] for one in distributions.width_distributions]
    (blocks,) = (stage.blocks for stage in distributions.stages)
    share = price.settled(narrowest, [blocks]) / price.full
    assert share > price.least / price.full
    ((_, _, depth),) = search(network, share=share).depths
    assert depth < blocks


# -- what it says before it begins -----------------------------------------------------


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each pass that is timed takes a second."""
    ticks = count(step=PREFLIGHT_PASSES)
    clocked = partial(preflight, clock=lambda: float(next(ticks)))
    monkeypatch.setattr(methods, "preflight", clocked)


# Of 180 images a tenth is held out; the search has two halves of the others.
SEARCH_STEPS, TUNE_STEPS = EPOCHS * 4, TUNED * 9


def test_a_search_says_what_it_and_training_what_it_finds_will_take(
    ticking: None,
) -> None:
    said: list[Preflight] = []
    network = own()
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    for distill in (True, False):
        search(network, distill=distill, announced=said.append)
    # A step is one pass for weights, and one for distributions, or the teacher's.
    assert [one.seconds for one in said] == [2 * SEARCH_STEPS] * 2
    assert [one.training_seconds for one in said] == [2 * TUNE_STEPS, TUNE_STEPS]
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(before[name], tensor)


def test_a_search_that_goes_on_says_what_is_left(ticking: None, tmp_path: Path) -> None:
    said: list[Preflight] = []

    def stop(stage: str, progress: LoopProgress) -> None:
        if progress.step >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(own(), folder=tmp_path, told=stop, announced=said.append)
    search(own(), folder=tmp_path, announced=said.append)
    search(own(), folder=tmp_path, announced=said.append)
    assert [one.seconds for one in said] == [24, 16, 0]


@pytest.mark.parametrize(
    ("memory_mb", "told"),
    [
        (None, "about 2 min; then at most 30 s to train what is found, and again"),
        (
            1260.0,
            "about 2 min and 1.3 GB of memory more; then at most 30 s to train what is "
            "found, and again",
        ),
        (
            12.4,
            "about 2 min and 12 MB of memory more; then at most 30 s to train what is "
            "found, and again",
        ),
    ],
)
def test_what_it_says_is_in_words(memory_mb: float | None, told: str) -> None:
    found = Preflight(seconds=120, training_seconds=30, memory_mb=memory_mb)
    assert found.told == f"{told} should its file miss the budget"


@pytest.mark.parametrize("falls", ["cosine", "linear"])
def test_a_search_cools_as_its_settings_say(falls: str, tmp_path: Path) -> None:
    settings = TasSettings(
        rate=0.05, falls=falls, highest_temperature=10, lowest_temperature=0.5
    )
    search(own(), tas=settings, folder=tmp_path)
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    expected = [
        temperature(epoch / EPOCHS, highest=10, lowest=0.5, falls=falls)
        for epoch in range(1, EPOCHS + 1)
    ]
    seen = [json.loads(line)["temperature"] for line in lines]
    assert seen == pytest.approx(expected, abs=1e-3)


def test_a_class_that_is_too_small_for_two_halves_names_the_setting() -> None:
    data = tiny.images(per_class=20)
    few = torch.arange(len(data)).numpy()
    few = few[(data.labels != 1) | (few < 6)]  # two of class 1
    settings = recipe(fresh=False)
    phase = replace(settings.search, validation_fraction=0.3, batch_size=2)
    images = TrainingImages(data.take(few), phase)
    network = own()
    with pytest.raises(DataError) as caught:
        Search(
            own=network,
            price=MacPrice(network.graph),
            share=0.5,
            step=1,
            recipe=replace(settings, search=phase),
            images=images,
            held_out=images.validation,
            folder=None,
        ).run("tas")
    assert str(caught.value) == (
        f"class {tiny.CLASS_NAMES[1]!r} has 1 images: too few to hold out 50% by "
        "recipe.tas.deciding_share; give more images of it, or hold out another share"
    )


# -- what it leaves for a budget -------------------------------------------------------


class Stubbed(Fitting):
    """A device on which everything takes `factor` times what it is priced at."""

    factor = 1.0

    def time(self, counts: list[int]) -> Fitted:  # type: ignore[override]
        took_ms = self.factor * self.price_ms(counts)
        return Fitted(
            counts=tuple(counts),
            kept=self.order.kept(counts),
            name="stub",
            predicted_ms=self.price_ms(counts),
            measurement=tiny_session.fresh(took_ms),
            bound_ms=took_ms,
            binding=Verdict(
                constraint="latency",
                limit=self.budget_ms,
                found=took_ms,
                bound=took_ms,
                evidence="measured",
            ),
        )


@lru_cache(maxsize=1)
def left() -> Found:
    net = searched(resnet(20))
    scattered(net, 0)
    return likeliest(resnet(20), net, depths=net.depths(), step=1)


@pytest.mark.parametrize("used_share", [0.90, 0.93, 0.955, 1.0, 1.05])
def test_a_likely_structure_is_widened_or_narrowed_until_it_is_near_the_budget(
    used_share: float, tmp_path: Path
) -> None:
    found = left()
    order = cast(LikeliestOrder, found.order)
    price = cast(LatencyPrice, MacPrice(order.graph))
    likely_ms = float(price(torch.tensor(order.likeliest, dtype=torch.float64)))
    budget_ms = 1.005 * likely_ms * EXPECTED_RATIO
    table = tiny.latency_table(
        tiny.SPACE, networks=[], network_ms=lambda config: 1.0, origin="measured"
    )
    fitting = Stubbed(
        own=found.own,
        masked=found.masked,
        order=order,
        method="tas",
        target=Target(backend="onnxruntime-cpu", threads=1),
        constraints=Constraints(latency_ms=budget_ms),
        floors=[choices[0] for choices in order.choices],
        prices=DevicePrices(price=price, table=table, step=1, residual_ratio=0.01),
        reporter=Silent(),
    )
    fitting.factor = used_share * budget_ms / likely_ms
    assert fitting.time(order.likeliest).used_share == pytest.approx(used_share)
    low, high = NEAR_BUDGET
    assert low <= fitting.widest(memory=tmp_path / "chosen").used_share <= high


# -- what the page tells of it ---------------------------------------------------------


def history(
    *, left_whole: tuple[str, ...] = (), too_narrow: tuple[str, ...] = ()
) -> ShrinkHistory:
    lines = [
        {
            "epoch": epoch,
            "kept": [8, 1],
            "price_share": 0.6,
            "expected_share": 0.75 - 0.05 * epoch,
            "choices": [[4, 8, 16], [1, 2]],
            "probabilities": [[0.5, 0.3, 0.2], [0.99, 0.01]],
        }
        for epoch in (1, 2)
    ]
    return ShrinkHistory(
        method="tas",
        recipe={},
        weights_sha256="",
        groups=("stem", "row[0:2], blocks"),
        channels=(16, 2),
        search=tuple(lines),
        finetune=(),
        kept=(8, 1),
        left_whole=left_whole,
        too_narrow=too_narrow,
    )


def test_all_probabilities_are_drawn_epoch_by_epoch() -> None:
    (section,) = _chances(history())
    assert "Distributions" in section
    drawn_as = draw_chances(history())
    assert drawn_as.count("<rect") == 2 * (3 + 2)  # epochs, choices
    assert drawn_as.count("stem: 8 channels, 30%") == 2
    assert drawn_as.count("row[0:2], blocks: 1 blocks, 99%") == 2
    assert 'class="chance6"' in drawn_as
    assert _chances(replace(history(), method="pas")) == []


def test_a_long_search_is_drawn_in_few_columns_of_its_last_epochs() -> None:
    last = {**history().search[0], "probabilities": [[0.2, 0.5, 0.3], [0.01, 0.99]]}
    lines = (*(history().search[0],) * 249, last)
    drawn_as = draw_chances(replace(history(), search=lines))
    assert drawn_as.count("<rect") == 84 * (3 + 2)  # every third epoch, and the last
    assert drawn_as.count("stem: 8 channels, 50%") == 1


def test_a_stage_keeps_blocks_and_not_channels() -> None:
    drawn_as = draw_kept(history())
    assert "1 of 2 blocks" in drawn_as
    assert "8 of 16 channels" in drawn_as


def test_the_expected_price_is_drawn_beside_the_likeliest() -> None:
    section = _course(history())
    assert "expected: 65.0 % at the end" in section
    assert "all together: 60.0 % at the end" in section
    assert "the dashed one what is expected" in section
    lines = tuple(
        {k: v for k, v in line.items() if k != "expected_share"}
        for line in history().search
    )
    other = _course(replace(history(), method="pas", search=lines))
    assert "expected" not in other


def test_what_collapsed_and_came_back_is_told() -> None:
    plain = [{"epoch": 1, "kept": [8, 1], "price_share": 0.6, "collapses": []}]
    fallen = [*plain, {**plain[0], "collapses": ["stem"]}]
    searched = replace(history(), method="pas", search=tuple(fallen))
    assert "of what may go of stem went at once" in _course(searched)
    assert "at once" not in _course(replace(searched, search=tuple(plain)))
    often = [*fallen, {**plain[0], "collapses": ["stem", "last", "stem"]}]
    told = _course(replace(searched, search=tuple(often)))
    assert "of stem (2 times), last went at once" in told


def test_layers_are_left_whole_for_the_reason_that_is_told() -> None:
    assert _told_whole(history()) == ""
    assert _told_whole(history(left_whole=("a", "b"), too_narrow=("c",))) == (
        "Not all channels of these can be removed, because of what is behind them: "
        "a, b. These have no more channels than the runtime's kernels take at a time: "
        "c."
    )


def test_losses_that_are_no_numbers_have_no_place_on_a_plot() -> None:
    """A page that fails after hours of training would take the bundle with it."""
    lines = tuple({"evaluation": k, "best_loss": x} for k, x in enumerate([None, 5, 4]))
    ranked = replace(history(), method="legr", search=lines)
    assert "at the end 4.0000" in draw_losses(ranked)
    assert "Nothing was searched" in draw_losses(replace(ranked, search=lines[:1]))
    member = {"price": 1.0, "counts": [8, 1], "loss": None}
    family = (member, {**member, "price": 2.0, "loss": 0.5})
    (section,) = _family(replace(ranked, family=family))
    assert section.count("9 channels") == 1
    assert _family(replace(ranked, family=(member,))) == []
