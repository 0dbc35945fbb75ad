"""Laws of what is made of a user's network before it is searched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    spectral_norm,
    weight_norm,
)
from torch.utils.checkpoint import checkpoint

from ofa_deploy.batches import evaluation_batch
from ofa_deploy.constraints import Constraints
from ofa_deploy.errors import (
    DataError,
    ParityError,
    SpaceError,
    TraceError,
    TrainingError,
)
from ofa_deploy.exporting import ExportedNetwork, compare_exported
from ofa_deploy.shrink import candidates
from ofa_deploy.shrink.autoprune import Deciding, task_gradients
from ofa_deploy.shrink.by_channels import ByChannels
from ofa_deploy.shrink.by_weights import ByWeights
from ofa_deploy.shrink.candidates import CandidateImages, CandidateJob, validation_loss
from ofa_deploy.shrink.legr import STATE_FILE
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.recipe import Method, default_shrink_recipe
from ofa_deploy.shrink.user_module import plain_copy, run
from ofa_deploy.target import Target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LOG_FILE
from ofa_deploy.train.recipe import Phase, Recipe
from ofa_deploy.train.views import ViewsInAnyOrder
from ofa_deploy.work_folder import working_alone
from tests.support import tiny
from tests.support.shrinking import (
    SIZE,
    call_of,
    data,
    made_up_prices,
    measured_as,
    own_network,
    train,
)

pytestmark = pytest.mark.usefixtures("quick_exports")

RECIPE = Recipe(
    phases=(Phase(name="once", epochs=1, peak_learning_rate=0.01, distill=False),),
    batch_size=18,
    crop_padding=1,
)


class Net(nn.Module):
    """Two convolutions and a classifier, between which something may be done."""

    def __init__(
        self, between: Callable[[Tensor, nn.Module], Tensor] = lambda x, _: x
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.norm(self.first(x))), self)
        found: Tensor = self.head(F.relu(self.second(x)).mean((2, 3)))
        return found


class Flattening(nn.Module):
    """Flattens its maps by a view, as maps in channels-last memory have none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.second = nn.Conv2d(16, 24, 3, 2, 1, bias=False)
        self.head = nn.Linear(24 * (SIZE // 4) ** 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return cast(Tensor, self.head(x.view(x.size(0), -1)))


def written(images: TrainingImages, folder: Path, *, count: int) -> CandidateImages:
    return CandidateImages.written(
        images,
        held_out=images.validation,
        resolution=SIZE,
        training_count=count,
        validation_count=10,
        folder=folder,
    )


# -- views -----------------------------------------------------------------------------


def test_maps_are_flattened_as_they_would_be_in_any_order() -> None:
    maps = torch.randn(2, 5, 4, 3)
    stored = maps.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        stored.view(2, -1)
    with ViewsInAnyOrder():
        torch.testing.assert_close(stored.view(2, -1), maps.view(2, -1))
        torch.testing.assert_close(stored.view(size=(10, 12)), maps.view(10, 12))
        torch.testing.assert_close(
            stored.view_as(torch.empty(10, 12)), maps.view(10, 12)
        )
        assert maps.view(2, -1).data_ptr() == maps.data_ptr()
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            stored.view(7, 7)


@pytest.fixture(scope="module")
def flattening() -> OwnNetwork:
    own = own_network(train(Flattening()))
    assert [group.name for group in own.graph.groups] == ["first", "second"]
    return own


def test_masks_of_a_network_that_flattens_by_a_view_have_gradients(
    flattening: OwnNetwork,
) -> None:
    masked = flattening.masked()
    images = TrainingImages(data(), RECIPE)
    deciding = Deciding.of(images, RECIPE, resolution=SIZE)
    latents = [mask.latent for mask in masked.masks]
    assert min(task_gradients(masked.module, latents, deciding)) > 0


def test_a_candidate_that_flattens_by_a_view_is_judged(
    flattening: OwnNetwork, tmp_path: Path
) -> None:
    kept = [torch.arange(0, group.channels, 2) for group in flattening.graph.groups]
    judged = written(TrainingImages(data(), RECIPE), tmp_path, count=100)
    job = CandidateJob(module=flattening.candidate(kept), images=judged)
    assert math.isfinite(validation_loss(job))


def test_what_flattens_by_a_view_is_written_as_it_was_trained(
    flattening: OwnNetwork, tmp_path: Path
) -> None:
    kept = [torch.arange(0, group.channels, 2) for group in flattening.graph.groups]
    narrow = train(flattening.candidate(kept), epochs=1)
    exported = flattening.export(
        narrow,
        kept,
        method="legr",
        target=Target(backend="onnxruntime-cpu", threads=1),
        folder=tmp_path,
    )
    # Raises, where the file computes something else.
    compare_exported(exported, data().images[:3], normalisation=tiny.NORMALISATION)


# -- the copy --------------------------------------------------------------------------


class Tied(Net):
    """Two convolutions of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.stem = nn.Conv2d(3, 16, 1)
        self.first.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x))


def normed(norm: Callable[[nn.Module], object]) -> nn.Module:
    network = Net()
    norm(network.first)
    norm(network.head)
    return network


def pruned(network: nn.Module) -> None:
    prune.l1_unstructured(network, "weight", amount=0.5)  # type: ignore[no-untyped-call]


def kept_activation() -> nn.Module:
    def keep(x: Tensor, net: nn.Module) -> Tensor:
        net.last = x
        return x

    network = Net(keep)
    network(torch.zeros(1, 3, SIZE, SIZE))
    return network


def called(network: nn.Module) -> nn.Module:
    """What hooks compute before a call is of that call."""
    with torch.no_grad():
        network(torch.zeros(1, 3, SIZE, SIZE))
    return network


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "weight norm by a hook": lambda: normed(weight_norm),
    "spectral norm by a hook": lambda: normed(spectral_norm),
    "pruned": lambda: normed(pruned),
    "pruned and called": lambda: called(normed(pruned)),
    "keeps what it computed": kept_activation,
    "weight norm": lambda: normed(parametrizations.weight_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "tied": Tied,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", UNUSUAL)
def test_layers_of_a_copy_are_plain_and_compute_the_same(name: str) -> None:
    network = UNUSUAL[name]().eval()
    before = copy.deepcopy(network.state_dict())
    copied = plain_copy(network)
    inputs = torch.randn(2, 3, SIZE, SIZE).numpy()
    assert run(copied, inputs) == pytest.approx(run(network, inputs), abs=1e-6)
    assert not any(map(parametrize.is_parametrized, copied.modules()))
    owners = [id(p) for m in copied.modules() for p in m.parameters(recurse=False)]
    assert len(set(owners)) == len(owners)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[key])


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", UNUSUAL)
def test_channels_of_such_layers_go_exactly(name: str) -> None:
    own = own_network(UNUSUAL[name]().eval())
    assert {"first", "second"} <= {group.name for group in own.graph.groups}


def test_a_layer_under_two_names_stays_one() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    network.append(network[0])
    copied = cast(nn.Sequential, plain_copy(network))
    assert copied[2] is copied[0]


def test_statistics_of_all_batches_follow_what_is_left() -> None:
    """Torch's own, `1 / batches seen`, would stay where a long training left them."""
    network = Net()
    network.norm.momentum = cast(Any, None)
    network.norm.num_batches_tracked = torch.tensor(100_000)
    copied = cast(Net, plain_copy(network))
    before = cast(Tensor, copied.norm.running_var).clone()
    copied.train()(torch.randn(4, 3, SIZE, SIZE))
    assert (cast(Tensor, copied.norm.running_var) - before).abs().min() > 0.01


def kept_list() -> nn.Module:
    def keep(x: Tensor, net: nn.Module) -> Tensor:
        vars(net)["all"] = [x]
        return x

    network = Net(keep)
    network(torch.zeros(1, 3, SIZE, SIZE))
    return network


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_copied_is_refused_with_the_cure() -> None:
    traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
        nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 8, 8)
    )
    for network, cure in (
        (kept_list(), "call it once within torch.no_grad"),
        (nn.Sequential(nn.LazyConv2d(4, 1)), "call it once on images"),
        (traced, "TorchScript; give the module"),
    ):
        with pytest.raises(TraceError, match=cure):
            plain_copy(network)


# -- what is refused, or left whole ----------------------------------------------------


def test_logits_that_depend_on_the_batch_are_refused() -> None:
    network = Net()
    network.norm = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(TraceError, match="other logits beside another than alone"):
        own_network(network)


def written_into(x: Tensor, _: nn.Module) -> Tensor:
    x.view(len(x), -1).mul_(0.5)
    return x


def test_writing_into_views_of_maps_is_refused() -> None:
    with pytest.raises(TraceError, match="writes into views of them"):
        own_network(Net(written_into))


def checkpointed(x: Tensor, _: nn.Module) -> Tensor:
    def flat(x: Tensor) -> Tensor:
        return F.relu(x.view(len(x), -1))

    return cast(Tensor, checkpoint(flat, x, use_reentrant=False)).view(x.shape)


def test_what_the_backward_pass_cannot_compute_again_is_refused() -> None:
    with pytest.raises(TraceError, match="cannot be trained on images of shape"):
        own_network(Net(checkpointed))


@pytest.mark.parametrize("outputs", ["squeezed", "scalar"])
def test_outputs_that_are_no_logits_are_told_by_their_shape(outputs: str) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x.squeeze() if outputs == "squeezed" else x.mean()

    with pytest.raises(DataError, match="gives outputs of shape"):
        own_network(Odd())


def test_a_network_of_one_image_at_a_time_is_refused() -> None:
    network = nn.Sequential(Reshaping(), nn.Linear(3 * SIZE**2, 3))
    network.insert(0, nn.Conv2d(3, 3, 1))
    with pytest.raises(TraceError, match="takes one image, and not two at once"):
        own_network(network)


class Reshaping(nn.Module):
    """As if there were but one image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)


def test_logits_that_are_drawn_are_refused() -> None:
    network = Net(lambda x, _: F.dropout(x, training=True))
    with pytest.raises(TraceError, match="draws at random in eval mode"):
        own_network(network)


class Halves(Net):
    """Half of the channels go one way, by their number, and half another."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.third = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        half = x.shape[1] // 2
        y = self.second(x[:, :half]) + self.third(x[:, half:])
        found: Tensor = self.head(F.relu(y).mean((2, 3)))
        return found


def test_any_counts_of_what_is_not_left_whole_go_exactly() -> None:
    own = own_network(Halves().eval())
    counts = [group.channels for group in own.graph.groups]
    assert counts == [16]  # of the sum; halves would have to stay equal
    for group in range(len(counts)):
        kept = [torch.arange(c // (1 + (k == group))) for k, c in enumerate(counts)]
        masked = own.masked()
        for mask, indices in zip(masked.masks, kept, strict=True):
            mask.keep_only(indices)
        assert own.computes_what_is_left(masked.module, kept)


def dropped_channels(x: Tensor, network: nn.Module) -> Tensor:
    if not network.training:
        return x
    return x * torch.empty(1, 16, 1, 1).bernoulli_(0.9)


def test_what_could_not_be_trained_once_narrow_is_left_whole() -> None:
    own = own_network(Net(dropped_channels).eval())
    assert [group.name for group in own.graph.groups] == ["second"]


# -- judging candidates ----------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 11, 12])
def test_statistics_are_those_of_all_images(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they are parted: no batch is one of few images."""
    monkeypatch.setattr(candidates, "evaluation_batch", lambda resolution: 5)
    images = TrainingImages(data(), RECIPE)
    judged = written(images, tmp_path, count=count)
    batches = [inputs for inputs, _ in judged.batches("training")]
    sizes = [len(inputs) for inputs in batches]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    whole = torch.cat(batches)
    module = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    validation_loss(CandidateJob(module=module, images=judged))
    norm = cast(nn.BatchNorm2d, module[0])
    assert norm.running_mean is not None
    error = (norm.running_mean - whole.mean((0, 2, 3))).abs().max()
    assert error < 0.05


def test_the_larger_images_are_the_fewer_are_seen_at_a_time() -> None:
    counts = [evaluation_batch(size) for size in (32, 64, 128, 224, 512)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (250, 16)
    assert counts[3] * 224**2 <= 250 * 64**2


# -- before hours of training ----------------------------------------------------------


@pytest.mark.parametrize("method", ["legr", "autoprune-weights"])
def test_a_file_that_would_compute_something_else_is_known_before_the_search(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = train(Net())
    call, prices = call_of(network, tmp_path, budget_share=0.6, method="legr")
    if method == "autoprune-weights":
        own = own_network(network, narrowed=False)
        asked = Constraints(compressed_bytes=2000)
        call = replace(call, own=own, method=method, constraints=asked)
        prices = made_up_prices(own)
    export = OwnNetwork.export

    def wrong(self: OwnNetwork, *args: Any, **kwargs: Any) -> ExportedNetwork:
        exported = export(self, *args, **kwargs)
        return replace(exported, reference=lambda inputs: run(network, inputs) + 1)

    monkeypatch.setattr(OwnNetwork, "export", wrong)
    measured_as(monkeypatch, factor=1.0)
    with ExitStack() as stack:
        shrinking = (
            ByWeights(call=call, prices=prices, stack=stack)
            if method == "autoprune-weights"
            else ByChannels(call=call, method="legr", prices=prices, stack=stack)
        )
        with pytest.raises(ParityError):
            shrinking.run()
    assert not list(tmp_path.rglob(LOG_FILE))
    assert not list(tmp_path.rglob(STATE_FILE))


def test_two_calls_are_not_at_work_in_one_folder(tmp_path: Path) -> None:
    call, prices = call_of(Net(), tmp_path, budget_share=0.6, method="legr")
    again, _ = call_of(Net(), tmp_path, budget_share=0.6, method="legr")
    shrinking = ByChannels(call=again, method="legr", prices=prices, stack=ExitStack())
    refused = pytest.raises(TrainingError, match="another call is at work in")
    with working_alone(call.work), refused:
        shrinking.run()
    with working_alone(again.work):
        pass


@pytest.mark.parametrize("method", ["legr", "autoprune-weights"])
def test_a_step_is_kept_where_it_was_measured(method: Method, tmp_path: Path) -> None:
    """Single weights have none: another method would take theirs for the machine's."""
    call, prices = call_of(Net(), tmp_path, budget_share=0.6, method="legr")
    if method == "autoprune-weights":
        call = replace(call, own=replace(call.own, graph=call.own.graph.only([])))
    for step, kept in ((None, method == "legr"), (4, False)):
        work = tmp_path / f"work-{step}"
        asked = replace(call, work=work, recipe=replace(call.recipe, step=step))
        with asked.at_work(prices):
            assert len(list(work.glob("own-*.json"))) == 1
            assert bool(list(work.glob("channel-step_*.json"))) == kept


@pytest.mark.parametrize("method", ["legr", "pas"])
def test_what_a_search_does_not_use_begins_none_anew(
    method: Method, tmp_path: Path
) -> None:
    call, prices = call_of(Net(), tmp_path, budget_share=0.6, method=method)
    changed = default_shrink_recipe(batch_size=9, search_epochs=3)
    changed = replace(
        changed, **{k: getattr(call.recipe, k) for k in ("legr", "floor", "step")}
    )
    same = replace(call, recipe=changed).name(prices) == call.name(prices)
    assert same == (method == "legr")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(SpaceError, match="give a number above 0"):
        default_shrink_recipe(rate=rate)


def test_what_is_trained_from_nothing_learns_at_twice_the_rate() -> None:
    (tuned,), (fresh,) = (
        default_shrink_recipe(method=method).finetune.phases
        for method in ("legr", "tas")
    )
    assert fresh.peak_learning_rate == 2 * tuned.peak_learning_rate


def test_a_rate_scales_both_trainings() -> None:
    whole, tenth = default_shrink_recipe(), default_shrink_recipe(rate=0.1)
    for part in ("search", "finetune"):
        (slow,), (fast,) = getattr(tenth, part).phases, getattr(whole, part).phases
        assert slow.peak_learning_rate == pytest.approx(0.1 * fast.peak_learning_rate)
