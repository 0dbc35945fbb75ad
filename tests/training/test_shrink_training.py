"""Trainings by which networks are shrunk, on devices of made-up prices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ofa_deploy.errors import InfeasibleBudget, TrainingError
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.shrink import methods, sparse
from ofa_deploy.shrink.autoprune import Deciding
from ofa_deploy.shrink.by_channels import ByChannels
from ofa_deploy.shrink.cost import MacPrice, full_counts
from ofa_deploy.shrink.finetuning import TrainingCallback, ignore_progress
from ofa_deploy.shrink.methods import Search
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import ChannelMethod, Method, ShrinkRecipe
from ofa_deploy.shrink.shrinking import Shrunk
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.tas_price import ExpectedPrice
from ofa_deploy.target import Target
from ofa_deploy.train.checkpoint import read_checkpoint
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import CHECKPOINT_FILE, LoopProgress, TrainingLoop
from ofa_deploy.train.recipe import Phase, Recipe
from ofa_deploy.verify import run_one_by_one
from profilers.backends import get_backend
from tests.support import own_networks, tiny
from tests.support.searching import owned, searched
from tests.support.shrinking import (
    SIZE,
    ResidualNet,
    branched,
    call_of,
    data,
    measured_as,
    own_network,
    recipe,
    trained_chain,
)

pytestmark = pytest.mark.usefixtures("quick_exports")


@pytest.fixture(scope="module")
def dense() -> StaticNet:
    return trained_chain()


def test_a_search_that_was_killed_goes_on_to_the_same_masks(
    dense: StaticNet, tmp_path: Path
) -> None:
    def search(folder: Path, *, stop_after: int | None) -> list[Tensor]:
        own = OwnNetwork.of(
            dense,
            resolution=SIZE,
            normalisation=tiny.NORMALISATION,
            class_names=tiny.CLASS_NAMES,
        )

        def told(stage: str, progress: LoopProgress) -> None:
            if stop_after is not None and progress.step >= stop_after:
                raise KeyboardInterrupt

        settings = recipe()
        found = Search(
            own=own,
            price=MacPrice(own.graph),
            share=0.5,
            step=4,
            recipe=settings,
            images=TrainingImages(data(), settings.search),
            held_out=data(),
            folder=folder,
            on_progress=told,
        ).run("pas")
        return found.masked.latents()

    whole = search(tmp_path / "whole", stop_after=None)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", stop_after=12)
    assert (tmp_path / "cut" / CHECKPOINT_FILE).exists()
    resumed = search(tmp_path / "cut", stop_after=None)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize(
    ("kind", "method"),
    [(branched, "pas"), (ResidualNet, "pas"), (ResidualNet, "tas")],
)
def test_a_call_that_was_killed_while_it_fine_tuned_ends_as_any_other(
    kind: Callable[[], nn.Module],
    method: ChannelMethod,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured_as(monkeypatch, factor=1.0)
    torch.manual_seed(0)
    network = kind()

    def run(
        folder: Path, on_progress: TrainingCallback
    ) -> tuple[Shrunk, Mapping[str, Tensor]]:
        call, prices = call_of(network, folder, budget_share=0.6, method=method)
        with ExitStack() as stack:
            shrinking = ByChannels(
                call=replace(call, on_progress=on_progress),
                method=method,
                prices=prices,
                stack=stack,
            )
            found = shrinking.run()
        return found, read_checkpoint(found.trainings[-1] / CHECKPOINT_FILE).weights

    def kill(stage: str, progress: LoopProgress) -> None:
        if stage == "fine-tuning" and progress.epoch == 3:
            raise KeyboardInterrupt

    whole, weights = run(tmp_path / "whole", ignore_progress)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill)
    stages: list[str] = []
    again, same = run(tmp_path / "killed", lambda stage, _: stages.append(stage))
    assert set(stages) == {"fine-tuning"}  # what was searched is there
    assert again.kept == whole.kept
    assert sum(whole.kept) < sum(whole.had)
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.items())


@pytest.mark.parametrize(
    ("method", "least"),
    [("tas", "the narrowest widths, and the fewest blocks"), ("pas", "floor=4 keep")],
)
def test_the_latency_that_a_refusal_names_is_taken_and_no_less(
    method: ChannelMethod,
    least: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured_as(monkeypatch, factor=1.0)

    class Begun(Exception):
        pass

    def begin(stage: str, progress: LoopProgress) -> None:
        raise Begun

    row = nn.Sequential(*(own_networks.Residual(16, 16, 1) for _ in range(2)))
    ending = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    network = nn.Sequential(own_networks.conv(3, 16), row, *ending)
    whole, prices = call_of(network, tmp_path, budget_share=1.0, method=method)
    full_ms = float(prices.price(full_counts(prices.price.graph)))

    def ask(latency_ms: float) -> None:
        share = latency_ms / full_ms
        call, prices = call_of(network, tmp_path, budget_share=share, method=method)
        with ExitStack() as stack:
            ByChannels(
                call=replace(call, on_progress=begin),
                method=method,
                prices=prices,
                stack=stack,
            ).run()

    with pytest.raises(InfeasibleBudget) as caught:
        ask(1e-3 * full_ms)
    named_ms = caught.value.fastest_ms
    assert named_ms is not None
    assert least in str(caught.value)
    with pytest.raises(InfeasibleBudget, match="no form of Sequential meets"):
        ask(0.999 * named_ms)
    with pytest.raises(Begun):
        ask(1.001 * named_ms)
    if method == "tas":  # with all blocks the narrowest widths cost more
        distributions = searched(whole.own, step=4)
        narrowest = [one.choices[0] for one in distributions.width_distributions]
        price = ExpectedPrice(distributions, prices.price)
        assert named_ms < price.settled(narrowest, [2])


def begin_search(
    method: Method, images: TrainingImages, settings: ShrinkRecipe
) -> None:
    own = own_network(ResidualNet())
    if method == "autoprune-weights":
        sparse.search_weights(
            own.module,
            target_share=0.5,
            settings=settings.sparsity,
            estimator=settings.estimator,
            deciding_share=settings.deciding_share,
            resolution=SIZE,
            images=images,
            recipe=settings.search,
            folder=None,
        )
        return
    own = searched_by_tas(own, step=4) if method == "tas" else own
    Search(
        own=own,
        price=MacPrice(own.graph),
        share=0.5,
        step=4,
        recipe=settings,
        images=images,
        held_out=data(),
        folder=None,
    ).run(method)


@pytest.mark.parametrize("method", ["pas", "autoprune"])
def test_channels_of_all_layers_wander_as_far(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the task says, whatever it says of each; within a bound."""
    seen: dict[str, Any] = {}

    class Noted(Exception):
        pass

    def loop(*args: Any, regulariser: Any, **others: Any) -> None:
        seen["rates"] = getattr(regulariser, "pull", regulariser).latent_rates
        raise Noted

    def rates(gradients: list[float]) -> list[float]:
        monkeypatch.setattr(methods, "task_gradients", lambda *_: gradients)
        settings = recipe()
        with pytest.raises(Noted):
            begin_search(method, TrainingImages(data(), settings.search), settings)
        return list(seen["rates"])

    monkeypatch.setattr(methods, "TrainingLoop", loop)
    groups = own_network(ResidualNet()).graph.groups
    typical = rates([1.0] * len(groups))
    assert len(set(typical)) == 1
    # Half as loud, twice as fast; and what is hardly heard is no faster than tenfold.
    gradients = [1.0, 0.5, *[1.0] * (len(groups) - 2)]
    found = rates(gradients)
    assert found == pytest.approx([typical[0] / one for one in gradients])
    *loud, quiet = rates([*gradients[:-1], 1e-9])
    heard = math.sqrt(
        sum(
            group.channels * one**2
            for group, one in zip(groups, [*gradients[:-1], 1e-9], strict=True)
        )
        / sum(group.channels for group in groups)
    )
    assert loud == pytest.approx(found[:-1])
    assert quiet == pytest.approx(10 * typical[0] / heard)
    # Of what is not heard at all nobody knows how fast is fast.
    *loud, silent = rates([*gradients[:-1], 0.0])
    assert loud == pytest.approx(found[:-1])
    assert min(loud) <= silent <= max(loud)


@pytest.mark.parametrize("method", ["autoprune", "tas", "autoprune-weights"])
def test_what_decides_learns_from_images_that_no_weights_are_trained_on(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted(Exception):
        pass

    seen: dict[str, TrainingImages] = {}
    original = Deciding.of

    def of(images: TrainingImages, *args: Any, **others: Any) -> Deciding:
        seen["choices"] = images
        return original(images, *args, **others)

    def loop(*args: Any, images: TrainingImages, **others: Any) -> None:
        seen["weights"] = images
        raise Noted

    monkeypatch.setattr(Deciding, "of", of)
    monkeypatch.setattr(methods, "TrainingLoop", loop)
    monkeypatch.setattr(sparse, "TrainingLoop", loop)
    settings = recipe()
    images = TrainingImages(data(), settings.search)
    with pytest.raises(Noted):
        begin_search(method, images, settings)
    first, second = (
        {image.tobytes() for image in one.training.images} for one in seen.values()
    )
    assert not first & second
    share = 0.5 if method == "tas" else settings.deciding_share
    assert len(seen["choices"].training) == pytest.approx(
        share * len(images.training), abs=2
    )


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    network = branched()
    phase = Phase(name="dense", epochs=3, peak_learning_rate=0.01, distill=False)
    settings = Recipe(phases=(phase,), batch_size=18, crop_padding=1)
    loop = TrainingLoop(
        network,
        images=TrainingImages(data(), settings),
        recipe=settings,
        resolution=SIZE,
        folder=tmp_path,
        bf16=False,
    )

    def poison(progress: LoopProgress) -> None:
        if progress.epoch == 2:
            with torch.no_grad():
                next(network.parameters()).fill_(float("nan"))

    with pytest.raises(TrainingError, match="last good checkpoint is kept"):
        loop.run(poison)
    weights = read_checkpoint(tmp_path / CHECKPOINT_FILE).weights
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize("name", ["dense", "padded", "mobilenet", "gated"])
def test_a_file_computes_what_is_left_of_a_network_with_batch_norms_folded(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    own = owned(
        own_networks.randomise(own_networks.ALL[name]()),
        resolution=own_networks.SIZE,
        class_count=5,
    )
    kept = [torch.arange(0, group.channels, 2) for group in own.graph.groups]
    target = Target(backend="onnxruntime-cpu", threads=1)
    file = tmp_path / own.write(kept, target=target, folder=tmp_path)
    nodes = onnx.load(file).graph.node
    readers = Counter(name for node in nodes for name in node.input)
    of_convolutions = {n.output[0] for n in nodes if n.op_type == "Conv"}
    norms = [node for node in nodes if node.op_type == "BatchNormalization"]
    # What others read, too, can have nothing folded into it.
    read = [norm.input[0] for norm in norms if readers[norm.input[0]] == 1]
    assert not of_convolutions.intersection(read)
    inputs = torch.randn(3, 3, own_networks.SIZE, own_networks.SIZE)
    with torch.no_grad():
        left = own.candidate(kept).eval()(inputs)
    with get_backend(target.backend).load(file, threads=1) as session:
        found = run_one_by_one(session, inputs.numpy())
    np.testing.assert_allclose(
        found, left, rtol=1e-4, atol=1e-5 * float(left.abs().max())
    )
