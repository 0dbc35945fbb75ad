"""Laws of AutoPrune; P1 to P8 are numbered as in the method's specification."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ofa_deploy.errors import (
    InfeasibleBudget,
    SpaceError,
    TraceError,
    TrainingError,
)
from ofa_deploy.nn.memory_format import store_channels_last
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.shrink import methods
from ofa_deploy.shrink.autoprune import (
    AutoPrune,
    Deciding,
    only_trained,
    task_gradients,
    typical_gradient,
    wandering_rate,
)
from ofa_deploy.shrink.cost import MacPrice
from ofa_deploy.shrink.groups import Cut
from ofa_deploy.shrink.masks import (
    LEAK,
    THRESHOLD,
    BinaryMask,
    Estimator,
    MaskedInput,
    MaskedNetwork,
    Rule,
    estimated_slope,
    insert_masks,
    sign_product,
)
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.pas import MOST_PULL, PasSettings
from ofa_deploy.shrink.recipe import default_shrink_recipe
from ofa_deploy.shrink.size_fitting import SizeFitting
from ofa_deploy.shrink.sparse import (
    LOOK_STEPS,
    SparsityPull,
    SparsitySettings,
    finetune_weights,
    search_weights,
)
from ofa_deploy.shrink.weight_masks import indicated, initial_heights
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LoopProgress, TrainingLoop
from ofa_deploy.train.optimizer import HybridOptimizer
from ofa_deploy.train.recipe import Phase, Recipe
from tests.support import own_networks, tiny
from tests.support.searching import pulled
from tests.support.two_trainings import assert_trained_in_turn

SIZE = own_networks.SIZE
ESTIMATORS: tuple[Estimator, ...] = ("leaky_relu", "softplus")
seeds = st.integers(0, 10_000)
estimators = st.sampled_from(ESTIMATORS)


def masked(estimator: Estimator = "leaky_relu") -> tuple[nn.Module, MaskedNetwork]:
    torch.manual_seed(0)
    network = own_networks.ResidualNet()
    own = OwnNetwork.of(
        network,
        resolution=SIZE,
        normalisation=Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3),
        class_names=tuple("abcde"),
    )
    return own.module, insert_masks(
        own.module, own.graph, estimator=estimator, rule="sign"
    )


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    latent: Tensor, weights: Tensor, upstream: Tensor, estimator: Estimator
) -> tuple[Tensor, Tensor]:
    """Of the auxiliary parameters and of the weights, where `upstream` comes back."""
    mask = BinaryMask(len(latent), estimator=estimator)
    mask.latent.data = latent.clone()
    weights = weights.clone().requires_grad_()
    torch.autograd.backward(sign_product(weights, mask.binary), upstream)
    assert mask.latent.grad is not None
    assert weights.grad is not None
    return mask.latent.grad, weights.grad


def of_channels(rule: Rule, seed: int, estimator: Estimator) -> tuple[Tensor, ...]:
    """Of a masked layer: latents' gradients, its input, and what came back to that."""
    torch.manual_seed(seed)
    mask, layer = BinaryMask(4, estimator=estimator), nn.Conv2d(4, 3, 3)
    mask.latent.data = drawn(seed, 4)
    every = np.arange(4)
    cut = Cut(module="", side="in", group=0, positions=every, channels=every)
    reads = MaskedInput(layer, width=4, cuts=[cut], masks=[mask], rule=rule)
    x = drawn(seed + 1, 2, 4, 5, 5).relu()
    torch.autograd.backward(reads(x).square().sum())
    plain = (x * mask.binary.detach().view(-1, 1, 1)).requires_grad_()
    torch.autograd.backward(layer(plain).square().sum())
    assert mask.latent.grad is not None
    assert plain.grad is not None
    slope = estimated_slope(mask.latent.detach() - THRESHOLD, estimator)
    return mask.latent.grad, x, plain.grad, slope


# -- P1 to P4: the rule ----------------------------------------------------------------


def test_masks_that_keep_everything_change_no_bit() -> None:
    network, net = masked()
    x = drawn(0, 4, 3, SIZE, SIZE)
    one, other = net.module(x), network(x)
    assert torch.equal(one, other)
    found = []
    for output in (one, other):
        network.zero_grad()
        torch.autograd.backward(output.square().sum())
        found.append([cast(Tensor, p.grad).clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@settings(max_examples=30, deadline=None)
@given(seeds, estimators)
def test_the_gradient_is_by_the_signs_of_the_weights(
    seed: int, estimator: Estimator
) -> None:
    latent, weights, upstream = (drawn(seed + k, 12) for k in range(3))
    found, of_weights = gradients(latent, weights, upstream, estimator)
    slope = estimated_slope(latent - THRESHOLD, estimator)
    torch.testing.assert_close(found, upstream * weights.sign() * slope)
    assert torch.equal(of_weights, upstream * (latent > THRESHOLD))
    # However large the weights are.
    scaled = weights * (drawn(seed + 3, 12).abs() + 0.1)
    assert torch.equal(gradients(latent, scaled, upstream, estimator)[0], found)


@settings(max_examples=20, deadline=None)
@given(seeds, estimators)
def test_a_channel_adds_up_the_signs_of_all_its_pixels(
    seed: int, estimator: Estimator
) -> None:
    found, x, upstream, slope = of_channels("sign", seed, estimator)
    assert (x == 0).any()  # what is silent has no sign
    wanted = (upstream * x.sign()).sum((0, 2, 3)) * slope
    torch.testing.assert_close(found, wanted)
    # As others do it, large values make masks restless.
    found, *_ = of_channels("product", seed, estimator)
    product = (upstream * x).sum((0, 2, 3)) * slope
    torch.testing.assert_close(found, product)
    assert not torch.allclose(product, wanted)


def test_a_search_for_channels_follows_the_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stopped(Exception):
        pass

    def inserted(*_: object, rule: Rule, estimator: Estimator) -> None:
        assert (rule, estimator) == ("sign", "softplus")
        raise Stopped

    monkeypatch.setattr(methods, "insert_masks", inserted)
    network, _ = masked()
    one = SimpleNamespace(
        own=SimpleNamespace(module=network, graph=None), recipe=default_shrink_recipe()
    )
    with pytest.raises(Stopped):
        methods._autoprune(cast(methods.Search, one))


@settings(max_examples=30, deadline=None)
@given(seeds, estimators)
def test_a_parameter_rises_where_a_larger_weight_lowers_the_loss(
    seed: int, estimator: Estimator
) -> None:
    latent, weights, upstream = (drawn(seed + k, 12) for k in range(3))
    found, _ = gradients(latent, weights, upstream, estimator)
    assert torch.equal((-found).sign(), (-upstream * weights.sign()).sign())


@settings(max_examples=30, deadline=None)
@given(seeds, estimators)
def test_the_direction_is_within_90_degrees_of_the_products(
    seed: int, estimator: Estimator
) -> None:
    latent, weights, upstream = (drawn(seed + k, 12) for k in range(3))
    found, _ = gradients(latent, weights, upstream, estimator)
    slope = estimated_slope(latent - THRESHOLD, estimator)
    assert float(found @ (upstream * weights * slope)) >= 0


# -- P5, P6: what was removed keeps its weights, and may come back -------------------


def test_what_was_removed_is_not_trained_and_comes_back_as_it_was() -> None:
    network, net = masked()
    net.module.eval()
    x = drawn(0, 4, 3, SIZE, SIZE)
    place = [group.name for group in net.graph.groups].index("blocks.0.first")
    before = net.module(x).detach()
    latent = net.masks[place].latent
    latent.data[2] = 0.0
    assert not torch.equal(net.module(x).detach(), before)
    conv = cast(nn.Conv2d, network.get_submodule("blocks.0.first"))
    torch.autograd.backward(net.module(x).square().sum())
    assert conv.weight.grad is not None
    assert not conv.weight.grad[2].any()
    assert conv.weight.grad[0].any()
    before_weights = conv.weight.detach().clone()
    torch.optim.SGD([conv.weight], lr=0.1).step()
    assert torch.equal(conv.weight[2].detach(), before_weights[2])
    assert latent.grad is not None
    # Back in its place it does what it did, now that the others are as they were, too.
    conv.weight.data = before_weights
    latent.data[2] = 1.0
    assert torch.equal(net.module(x).detach(), before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_was_removed_returns_where_it_is_missed(estimator: Estimator) -> None:
    mask = BinaryMask(1, estimator=estimator)
    mask.latent.data.fill_(0.4)
    optimizer = torch.optim.SGD([mask.latent], lr=0.1)
    steps = 0
    while not len(mask.kept()):
        optimizer.zero_grad()
        torch.autograd.backward(-sign_product(torch.ones(1), mask.binary).sum())
        optimizer.step()
        steps += 1
        assert steps <= 2 * 0.1 / (0.1 * LEAK)


def test_no_estimator_is_flat_where_channels_are_removed() -> None:
    # As a rectifier's slope is: what fell below the threshold would never return.
    heights = torch.linspace(-1.0, 1.0, 101)
    for estimator in ESTIMATORS:
        assert (estimated_slope(heights, estimator) > 0).all()
    around = torch.tensor([-0.1, 0.1])
    assert estimated_slope(around, "leaky_relu").tolist() == pytest.approx([LEAK, 1.0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.floats(-1, 0.5))
def test_behind_a_rectifier_what_was_removed_never_returns(
    gradients: list[float], latent: float
) -> None:
    mask = BinaryMask(1, estimator="relu")
    mask.latent.data.fill_(latent)
    optimizer = torch.optim.SGD([mask.latent], lr=1.0, momentum=0.9)
    for gradient in gradients:
        optimizer.zero_grad()
        torch.autograd.backward(gradient * mask.binary.sum())
        optimizer.step()
        assert not len(mask.kept())
    kept = BinaryMask(1, estimator="relu")
    torch.autograd.backward(kept.binary.sum())
    assert kept.latent.grad is not None
    assert kept.latent.grad.item() == 1.0


# -- P7, P8: alone with the price, and on a toy ------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_a_task_the_share_never_rises(estimator: Estimator) -> None:
    _, net = masked(estimator)
    pull = pulled(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=0.3, floor=1, step=1, steps_to_flip=60),
    )
    for index, mask in enumerate(net.masks):
        mask.latent.data += 0.2 * drawn(index, len(mask.latent))
    optimizer = torch.optim.SGD([mask.latent for mask in net.masks], lr=0.02)
    shares = [pull.current_share()]
    for _ in range(4000):
        optimizer.zero_grad()
        torch.autograd.backward(pull.loss())
        optimizer.step()
        shares.append(pull.current_share())
    falling = [a >= b for a, b in itertools.pairwise(shares)]
    assert all(falling[: shares.index(min(shares))])
    assert min(shares) < 0.45


def test_a_useful_weight_stays_and_a_useless_one_goes() -> None:
    x = drawn(0, 256, 2)
    y = 2.0 * x[:, 0]
    weights = nn.Parameter(torch.tensor([1.5, 0.3]))
    mask = BinaryMask(2, estimator="softplus")
    weight_steps = torch.optim.SGD([weights], lr=0.05)
    mask_steps = torch.optim.SGD([mask.latent], lr=0.01)
    kept = []
    for _ in range(1200):
        for optimizer, price in ((weight_steps, 0.0), (mask_steps, 0.2)):
            optimizer.zero_grad()
            found = x @ sign_product(weights, mask.binary)
            loss = (found - y).square().mean() + price * mask.count
            torch.autograd.backward(loss)
            optimizer.step()
            weights.grad = mask.latent.grad = None
        kept.append(mask.kept().tolist())
    # Once it fits, nothing but the price is felt: it falls, is missed, and is back.
    assert kept[900:].count([0]) > 0.8 * 300
    assert kept[900:].count([0]) + kept[900:].count([]) == 300
    assert float(weights[0].detach()) == pytest.approx(2.0, abs=0.05)


# -- as a regulariser of a training ----------------------------------------------------


def training(
    folder: Path | None = None, latent_rates: Sequence[float] | None = None
) -> tuple[TrainingLoop, AutoPrune, MaskedNetwork]:
    torch.manual_seed(0)
    data = tiny.images(per_class=60, seed=4)
    phase = Phase(name="search", epochs=15, peak_learning_rate=0.02, distill=False)
    recipe = Recipe(phases=(phase,), batch_size=18, crop_padding=1)
    images = TrainingImages(data, recipe)
    of_weights, of_masks = images.parted(0.4)
    own = OwnNetwork.of(
        chain(),
        resolution=SIZE,
        normalisation=images.normalisation,
        class_names=images.training.class_names,
    )
    net = insert_masks(own.module, own.graph, estimator="leaky_relu", rule="sign")
    pull = pulled(
        net,
        price=MacPrice(net.graph),
        settings=PasSettings(target_share=0.5, floor=4, step=4, steps_to_flip=8),
        latent_rates=latent_rates,
    )
    deciding = Deciding(
        images=of_masks, resolution=SIZE, label_smoothing=0.0, bf16=False
    )
    method = AutoPrune(pull, deciding=deciding)
    loop = TrainingLoop(
        net.module,
        images=of_weights,
        recipe=recipe,
        resolution=SIZE,
        folder=folder,
        bf16=False,
        regulariser=method,
    )
    return loop, method, net


def chain() -> nn.Module:
    return nn.Sequential(
        *own_networks.conv(3, 16),
        *own_networks.conv(16, 24, stride=2),
        *own_networks.conv(24, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def test_weights_and_masks_are_trained_in_turn() -> None:
    loop, method, net = training()
    assert_trained_in_turn(loop, method, [mask.latent for mask in net.masks])


def test_both_trainings_draw_by_chance_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noise that both see, such as what TAS draws, is drawn anew for each of them."""
    loop, _, net = training()
    drawn: list[float] = []
    net.module.register_forward_pre_hook(lambda *_: drawn.append(float(torch.rand(()))))
    for step in range(3):
        loop._train_step(step)
    assert len(drawn) == len(set(drawn)) == 6


def test_a_gradient_of_changing_sign_wanders_as_far_as_the_rate_was_made_for() -> None:
    way, steps, gradient, momentum = 0.125, 400, 3.0, 0.9
    rate = wandering_rate(gradient, way=way, steps=steps, momentum=momentum)
    latents = nn.Parameter(torch.zeros(4000))
    optimizer = torch.optim.SGD([latents], lr=rate, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        signs = torch.randint(0, 2, latents.shape, generator=generator) * 2.0 - 1
        latents.grad = gradient * signs
        optimizer.step()
    # Momentum gathers at first, and spends what it has only later.
    found = float(latents.detach().square().mean().sqrt())
    assert found == pytest.approx(way, rel=0.05)


def test_masks_are_trained_on_images_that_weights_never_see() -> None:
    loop, method, _ = training()
    weights, masks = loop.images.training, method.deciding.images.training
    seen = {image.tobytes() for image in weights.images}
    assert not any(image.tobytes() in seen for image in masks.images)
    assert len(weights) > len(masks) > 0


def test_the_tasks_gradients_are_of_the_task_alone_and_move_nothing() -> None:
    _, method, net = training()
    net.module.train()
    state = {name: one.clone() for name, one in net.module.state_dict().items()}
    flags = [one.requires_grad for one in net.module.parameters()]
    latents = [mask.latent for mask in net.masks]
    found = task_gradients(net.module, latents, method.deciding)
    assert min(found) > 0
    assert net.module.training
    assert [one.requires_grad for one in net.module.parameters()] == flags
    assert all(one.grad is None for one in net.module.parameters())
    after = net.module.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in state.items())
    # Of a classifier that looks at nothing, no mask feels anything.
    (head,) = (one for one in net.module.modules() if isinstance(one, nn.Linear))
    nn.init.zeros_(head.weight)
    assert task_gradients(net.module, latents, method.deciding) == [0] * len(latents)


def test_the_tasks_gradients_are_of_each_layer() -> None:
    _, method, net = training()
    latents = [mask.latent for mask in net.masks]
    found = task_gradients(net.module, latents, method.deciding, batches=1)
    net.module.eval()
    with only_trained(net.module, latents):
        loss = method.deciding.loss(net.module, 0)
        gradients = torch.autograd.grad(loss, latents)
    expected = [float(one.square().mean().sqrt()) for one in gradients]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == len(found)


def test_a_task_whose_gradients_are_no_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, method, net = training()
    latents = [mask.latent for mask in net.masks]
    original = Deciding.loss
    monkeypatch.setattr(Deciding, "loss", lambda *args: 1e38 * (1e38 * original(*args)))
    with pytest.raises(TrainingError, match="are no numbers"):
        task_gradients(net.module, latents, method.deciding)


def test_latents_of_each_layer_are_stepped_at_their_own_rate() -> None:
    rates = (0.3, 0.02, 0.005)
    _, method, net = training(latent_rates=rates)
    before = net.latents()
    with only_trained(net.module, method.pull.latents):
        loss = method.deciding.loss(net.module, 0) + method.pull.loss()
        gradients = torch.autograd.grad(loss, method.pull.latents)
    method.after_step()
    for rate, gradient, old, new in zip(
        rates, gradients, before, net.latents(), strict=True
    ):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(new, old - rate * gradient)


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_the_typical_gradient_is_of_all_that_the_task_tells_something(
    seed: int, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, 3, generator=generator) for size in sizes]
    latents = [nn.Parameter(one) for one in [*drawn, torch.zeros(5)]]
    gradients = [float(one.square().mean().sqrt()) for one in drawn]
    found = typical_gradient([*gradients, 0.0], latents)
    every = torch.cat([one.flatten() for one in drawn])
    assert found == pytest.approx(float(every.square().mean().sqrt()))
    assert typical_gradient([0.0] * len(latents), latents) == 0


def test_a_search_prunes_and_still_learns() -> None:
    loop, method, net = training()
    accuracy = loop.run()
    assert accuracy > 0.6
    assert sum(len(kept) for kept in net.kept()) < 0.9 * (16 + 24 + 24)
    assert cast(int, method.facts()["flips"]) > 0
    assert not any(mask.latent.requires_grad for mask in net.masks)


def test_a_search_that_was_killed_goes_on_to_the_same_masks(tmp_path: Path) -> None:
    whole, _, net = training()
    whole.run()
    cut, *_ = training(tmp_path)

    def stop(progress: LoopProgress) -> None:
        if progress.step >= 11:
            cut._save()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(stop)
    resumed, _, again = training(tmp_path)
    resumed.run()
    for one, other in zip(net.masks, again.masks, strict=True):
        assert torch.equal(one.latent, other.latent)


def test_a_loss_of_the_masks_that_is_no_number_stops_the_search() -> None:
    _, method, net = training()
    next(iter(net.module.parameters())).data.fill_(float("nan"))
    before = [mask.latent.detach().clone() for mask in net.masks]
    with pytest.raises(TrainingError, match="images that decide is nan at step 0"):
        method.after_step()
    for mask, latent in zip(net.masks, before, strict=True):
        assert torch.equal(mask.latent, latent)


def test_a_search_of_another_method_is_not_continued() -> None:
    _, method, _ = training()
    with pytest.raises(TrainingError, match="another method"):
        method.restore(method.pull.state())


# -- weight by weight ------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, estimators)
def test_single_weights_follow_the_same_rule(seed: int, estimator: Estimator) -> None:
    weight, latent, upstream = (drawn(seed + k, 4, 3) for k in range(3))
    weight[0, 0] = 0.0
    weight.requires_grad_()
    latent.requires_grad_()
    torch.autograd.backward(indicated(weight, latent, estimator=estimator), upstream)
    signs = torch.where(weight < 0, -1.0, 1.0)  # zero has a sign, too
    slope = estimated_slope(latent.detach() - THRESHOLD, estimator)
    assert latent.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(latent.grad, upstream * signs * slope)
    assert torch.equal(weight.grad, upstream * (latent > THRESHOLD))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_single_weight_returns_where_it_is_missed(estimator: Estimator) -> None:
    weight, latent = torch.ones(1), nn.Parameter(torch.full((1,), 0.4))
    optimizer = torch.optim.SGD([latent], lr=0.1)
    steps = 0
    while not latent > THRESHOLD:
        optimizer.zero_grad()
        missed = -indicated(weight, latent, estimator=estimator).sum()
        torch.autograd.backward(missed)
        optimizer.step()
        steps += 1
        assert steps <= 2 * 0.1 / (0.1 * LEAK)


def test_masks_of_single_weights_that_keep_everything_change_no_bit() -> None:
    network = chain()
    x = drawn(0, 4, 3, SIZE, SIZE)
    pull = sparsity(copy.deepcopy(network))
    found = []
    for module in (network, pull.module):
        output = module(x)
        torch.autograd.backward(output.square().sum())
        gradients = {
            name.replace(".parametrizations.weight.original", ".weight"): p.grad
            for name, p in module.named_parameters()
            if not name.endswith(".latent")
        }
        found.append((output, gradients))
    (output, of_weights), (masked_output, of_masked) = found
    assert torch.equal(output, masked_output)
    assert of_weights.keys() == of_masked.keys()
    for name, gradient in of_weights.items():
        assert torch.equal(cast(Tensor, gradient), cast(Tensor, of_masked[name]))


def test_single_weights_that_are_removed_stay_as_they_were() -> None:
    """Momentum of what was stepped before would move them, and decay."""
    pull = sparsity(chain())
    recipe = Recipe(
        phases=(Phase(name="x", epochs=1, peak_learning_rate=0.1, distill=False),)
    )
    store_channels_last(pull.module)
    optimizer = HybridOptimizer(pull.module, recipe, rates={})
    optimizer.set_learning_rate(0.1)
    name, mask = next(iter(pull.masks.items()))
    original = dict(pull.module.named_parameters())[
        f"{name}.parametrizations.weight.original"
    ]

    def train(steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            logits = pull.module.train()(drawn(step, 8, 3, SIZE, SIZE))
            torch.autograd.backward(logits.square().mean() + pull.weights_loss())
            optimizer.step()
            pull.after_step()

    train(2)
    gone = drawn(0, *mask.latent.shape) < 0
    mask.latent.data[gone] = 0.0
    pull.after_step()
    before = original.detach().clone()
    train(3)
    assert torch.equal(original.detach()[gone], before[gone])
    assert not torch.equal(original.detach()[~gone], before[~gone])


STEPS = 15 * 8


def sparsity(network: nn.Module, share: float = 0.1) -> SparsityPull:
    return SparsityPull(
        network, target_share=share, steps=STEPS, settings=SparsitySettings()
    )


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.01, 1.0))
def test_the_pull_alone_takes_the_smallest_weights_in_the_time_that_is_set(
    seed: int, share: float
) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    weights = [p.detach().clone() for p in network.parameters() if p.ndim > 1]
    pull = sparsity(network, share)
    pull.scale_to(0.01)
    steps = torch.optim.SGD(
        pull.latents, lr=pull.latent_rates[0], momentum=pull.momentum
    )
    taken = 0
    while pull.current_share() > share and taken < 3 * STEPS:
        steps.zero_grad()
        torch.autograd.backward(pull.loss())
        steps.step()
        taken += 1
    # Momentum has to gather first.
    assert taken <= 1.1 * pull.settings.fall_share * STEPS + 20
    for weight, mask in zip(weights, pull.masks.values(), strict=True):
        kept = mask.latent.detach() > THRESHOLD
        if kept.any() and not kept.all():
            assert weight.abs()[kept].min() >= weight.abs()[~kept].max()


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.booleans())
def test_parameters_begin_in_the_order_of_lamp(
    seed: int, sizes: list[int], has_zeros: bool
) -> None:
    torch.manual_seed(seed)
    weights = {
        f"layer{index}": torch.randn(size, 3) * 10.0**index
        for index, size in enumerate(sizes)
    }
    if has_zeros:
        weights["layer0"][0, 0] = 0
    heights = initial_heights(weights)
    scores, found = [], []
    for name, weight in weights.items():
        squares = weight.double().flatten().square()
        left = [squares[squares >= one].sum() for one in squares]
        scores += [float(one / rest) for one, rest in zip(squares, left, strict=True)]
        assert heights[name].shape == weight.shape
        found += heights[name].flatten().tolist()
    assert min(found) > 0
    # The largest of each layer are alike: each is all that its layer would have left.
    decided = [index for index, score in enumerate(scores) if score < 1 - 1e-9]
    by_score = sorted(decided, key=scores.__getitem__)
    assert by_score == sorted(decided, key=found.__getitem__)
    others = [height for index, height in enumerate(found) if index not in decided]
    assert min(others) > max((found[index] for index in decided), default=0)


def test_masks_settle_after_the_fall() -> None:
    pull = sparsity(chain())
    pull.scale_to(0.01)
    rates = [pull.latent_rates[0]]
    for _ in range(STEPS):
        pull.after_step()
        rates.append(pull.latent_rates[0])
    fall = STEPS // 2
    assert rates[: fall + 1] == [rates[0]] * (fall + 1)
    assert rates[fall:] == sorted(rates[fall:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12 * rates[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_task_that_resists_is_pulled_at_harder(estimator: Estimator) -> None:
    """What is left is missed the more, the less it is; the share still comes down."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    steps = 60 * LOOK_STEPS
    pull = SparsityPull(
        network,
        target_share=0.1,
        steps=steps,
        settings=SparsitySettings(),
        estimator=estimator,
    )
    pull.scale_to(0.01)
    first = pull._strength
    by_step = torch.optim.SGD(
        pull.latents, lr=pull.latent_rates[0], momentum=pull.momentum
    )
    shares, strengths = [], []
    for _ in range(steps):
        # Twice as strong as the pull is at first.
        held = [
            (latent * estimated_slope(latent.detach() - THRESHOLD, estimator)).sum()
            for latent in pull.latents
        ]
        by_step.zero_grad()
        torch.autograd.backward(pull.loss() - 2 * first * torch.stack(held).sum())
        by_step.step()
        pull.after_step()
        shares.append(pull.current_share())
        strengths.append(pull._strength)
    assert pull.path == 0.1
    assert min(shares) <= 0.1
    assert max(shares[-2 * LOOK_STEPS :]) < 0.15
    assert first < max(strengths) <= MOST_PULL * first


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0.01, 0.99), estimators)
def test_the_path_goes_down_from_all_weights_to_the_share(
    seed: int, share: float, estimator: Estimator
) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    pull = SparsityPull(
        network,
        target_share=share,
        steps=STEPS,
        settings=SparsitySettings(),
        estimator=estimator,
    )
    pull.scale_to(0.01)
    path = [pull.path]
    for _ in range(STEPS):
        pull.after_step()
        path.append(pull.path)
    assert path[0] == 1
    assert path == sorted(path, reverse=True)
    assert path[STEPS // 2 :] == [share] * (STEPS // 2 + 1)


def test_without_a_task_single_weights_go_and_never_return() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    shares: list[list[float]] = []
    for stronger in (1.0, 2.0):
        copied = copy.deepcopy(network)
        pull = sparsity(copied, 1 / 256)  # of the 256 weights one
        pull.scale_to(0.01)
        pull._strength *= stronger
        steps = torch.optim.SGD(
            pull.latents, lr=pull.latent_rates[0], momentum=pull.momentum
        )
        found = [pull.current_share()]
        for _ in range(2 * STEPS):
            steps.zero_grad()
            # In the end nothing pulls, which has no gradient of its own.
            torch.autograd.backward(pull.loss() + 0 * pull.latents[0].sum())
            steps.step()
            found.append(pull.current_share())
        shares.append(found)
    for found in shares:
        assert all(later <= earlier for earlier, later in itertools.pairwise(found))
        assert found[-1] <= 1 / 256
    assert all(more <= less for less, more in zip(*shares, strict=True))
    assert shares[0] != shares[1]


def test_a_larger_gradient_of_the_task_makes_a_smaller_rate_and_a_stronger_pull() -> (
    None
):
    pull = sparsity(chain())
    found = []
    for gradient in (0.01, 0.1):
        pull.scale_to(gradient)
        price = torch.autograd.grad(pull.loss(), pull.latents[0])[0].abs().max()
        found.append((pull.latent_rates[0], float(price)))
    (rate, weak), (slower, strong) = found
    assert rate / slower == pytest.approx(10)
    assert strong / weak == pytest.approx(10)


def sparse(
    folder: Path | None = None, told: Callable[..., None] = lambda *_: None
) -> tuple[SparsityPull, nn.Module]:
    torch.manual_seed(0)
    phase = Phase(name="x", epochs=15, peak_learning_rate=0.05, distill=False)
    recipe = Recipe(phases=(phase,), batch_size=18, crop_padding=1)
    images = TrainingImages(tiny.images(per_class=60, seed=4), recipe)
    pull = search_weights(
        chain(),
        target_share=0.1,
        settings=SparsitySettings(),
        estimator="softplus",
        deciding_share=0.2,
        resolution=SIZE,
        images=images,
        recipe=recipe,
        folder=None if folder is None else folder / "search",
        on_progress=told,
    )
    pull.freeze(round(0.1 * pull.weight_count))
    trained = finetune_weights(
        pull,
        resolution=SIZE,
        images=images,
        recipe=recipe,
        folder=None if folder is None else folder / "finetune",
        on_progress=told,
    )
    return pull, trained


@pytest.fixture(scope="module")
def pruned() -> tuple[SparsityPull, nn.Module]:
    return sparse()


def test_the_share_of_weights_is_kept_and_the_rest_is_zero(
    pruned: tuple[SparsityPull, nn.Module],
) -> None:
    pull, trained = pruned
    weights = [
        layer.weight
        for layer in trained.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    assert sum(w.numel() for w in weights) == pull.weight_count
    kept = [int(w.count_nonzero()) for w in weights]
    assert kept == [count for count, _ in pull.kept().values()]
    assert sum(kept) <= 0.1 * pull.weight_count + 1
    # It learnt what there is to learn, with a tenth of the weights.
    phase = Phase(name="x", epochs=1, peak_learning_rate=0.05, distill=False)
    recipe = Recipe(phases=(phase,), batch_size=18, crop_padding=1)
    images = TrainingImages(tiny.images(per_class=60, seed=4), recipe)
    loop = TrainingLoop(
        trained,
        images=images,
        recipe=recipe,
        resolution=SIZE,
        folder=None,
        bf16=False,
    )
    assert loop.validate() > 0.6
    # Ordinary layers, that export and load like any others.
    assert set(trained.state_dict()) == set(chain().state_dict())


def test_narrowing_leaves_the_search_as_it_was() -> None:
    pull = sparsity(chain())
    before = [latent.detach().clone() for latent in pull.latents]
    network = pull.narrowed_to(50)
    kept = sum(
        int(layer.weight.count_nonzero())
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    )
    assert kept == 50
    for one, other in zip(before, pull.latents, strict=True):
        assert torch.equal(one, other)


def test_a_search_for_weights_goes_on_where_it_was_killed(
    pruned: tuple[SparsityPull, nn.Module], tmp_path: Path
) -> None:
    def stop_at(kind: str) -> Callable[[str, LoopProgress], None]:
        def stop(stage: str, progress: LoopProgress) -> None:
            if stage.startswith(kind) and progress.step > 30:
                raise KeyboardInterrupt

        return stop

    for kind in ("searching", "fine-tuning"):
        with pytest.raises(KeyboardInterrupt):
            sparse(tmp_path, stop_at(kind))
    _, resumed = sparse(tmp_path)
    _, whole = pruned
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_of_weights_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(SpaceError, match="above 0 and at most 1"):
        sparsity(chain(), share)
    with pytest.raises(SpaceError, match="above 0 and below 1"):
        SparsitySettings(fall_share=share)


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(TraceError, match="no convolution and no linear"):
        sparsity(nn.ReLU())


# -- how many weights a file may have --------------------------------------------------


def made_up_bytes(count: int) -> int:
    return 900 + int(4.7 * count + 40 * count**0.6)


@settings(max_examples=100, deadline=None)
@given(st.integers(2_000, 5_000_000), st.floats(0.02, 0.95))
def test_as_many_weights_stay_as_the_limit_has_room_for(
    weight_count: int, share: float
) -> None:
    full = made_up_bytes(weight_count)
    limit = max(int(share * full), made_up_bytes(max(1, weight_count // 500)))
    written: list[int] = []

    def compressed(count: int) -> int:
        written.append(count)
        return made_up_bytes(count)

    fitting = SizeFitting(limit_bytes=limit, weight_count=weight_count, full_bytes=full)
    found = fitting.most(compressed)
    assert 0.95 * limit <= made_up_bytes(found) <= limit
    assert len(written) <= 8


def test_a_limit_below_what_names_and_norms_take_is_refused() -> None:
    fitting = SizeFitting(limit_bytes=800, weight_count=10_000, full_bytes=50_000)
    with pytest.raises(InfeasibleBudget, match="Ask for at least 1,"):
        fitting.most(made_up_bytes)
