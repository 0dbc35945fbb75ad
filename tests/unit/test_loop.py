"""What a training of one network leaves on disk, and takes up again."""

from __future__ import annotations

import json
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofa_deploy.errors import TrainingError
from ofa_deploy.nn.memory_format import store_channels_last
from ofa_deploy.train.distill import knowledge_loss, supernet_loss
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.logits import logits_of
from ofa_deploy.train.loop import (
    CHECKPOINT_FILE,
    LOG_FILE,
    LoopProgress,
    TrainingLoop,
)
from ofa_deploy.train.recipe import Phase, Recipe, learning_rate
from tests.support import tiny

EPOCHS, FORMAT = 3, torch.channels_last


class Net(nn.Module):
    """A convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.features = nn.Sequential(self.first, self.norm)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(F.relu(self.features(x)).mean((2, 3)))
        return found


class Checkpointed(Net):
    """The same; what is between is not kept for the backward pass."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        between = checkpoint(
            self.features,
            x.requires_grad_() if self.use_reentrant else x,
            use_reentrant=self.use_reentrant,
        )
        found: Tensor = self.head(F.relu(between).mean((2, 3)))
        return found


def loop_of(
    network: nn.Module,
    folder: Path,
    *,
    momentum: float = 0.9,
    checkpoint_seconds: float = 60.0,
) -> TrainingLoop:
    phase = Phase(name="dense", epochs=EPOCHS, peak_learning_rate=0.01, distill=False)
    recipe = Recipe(phases=(phase,), batch_size=18, crop_padding=1, momentum=momentum)
    return TrainingLoop(
        network,
        images=TrainingImages(tiny.images(per_class=20, seed=11), recipe),
        recipe=recipe,
        resolution=tiny.IMAGE_SIZE,
        folder=folder,
        bf16=False,
        checkpoint_seconds=checkpoint_seconds,
    )


def stop(progress: LoopProgress) -> None:
    if progress.epoch == 2:
        raise KeyboardInterrupt


def epochs_logged(folder: Path) -> list[int]:
    lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["epoch"] for line in lines]


def test_an_epochs_loss_is_of_all_its_steps_whatever_came_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_of(Net(), tmp_path / "whole").run()
    cut = loop_of(Net(), tmp_path / "cut", checkpoint_seconds=0)
    train_step = cut._train_step

    def interrupted(step: int) -> float:
        if step == 4:  # of three in an epoch
            raise KeyboardInterrupt
        return train_step(step)

    monkeypatch.setattr(cut, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    loop_of(Net(), tmp_path / "cut").run()
    whole, resumed = (
        [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        for log in (tmp_path / name / LOG_FILE for name in ("whole", "cut"))
    )
    assert resumed == whole


def test_a_training_leaves_the_callers_generator_as_it_was(tmp_path: Path) -> None:
    loop = loop_of(Net(), tmp_path)
    before = torch.get_rng_state()
    loop.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_that_was_interrupted_at_its_end_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_of(Net(), tmp_path / "whole").run()
    cut = loop_of(Net(), tmp_path / "cut")

    def interrupted() -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cut, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cut.run()
    cut.run()
    whole, resumed = (
        [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        for log in (tmp_path / name / LOG_FILE for name in ("whole", "cut"))
    )
    assert resumed == whole


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_loop_that_was_interrupted_goes_on_by_itself(
    momentum: float, tmp_path: Path
) -> None:
    """As in a notebook; where the weights lie has changed in between."""
    whole, cut = Net(), Net()
    loop_of(whole, tmp_path / "whole", momentum=momentum).run()
    loop = loop_of(cut, tmp_path / "cut", momentum=momentum)
    with pytest.raises(KeyboardInterrupt):
        loop.run(stop)
    loop.run()
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_network_with_a_layer_under_two_names_goes_on(
    momentum: float, tmp_path: Path
) -> None:
    whole, cut, resumed = Net(), Net(), Net()
    loop_of(whole, tmp_path / "whole", momentum=momentum).run()
    with pytest.raises(KeyboardInterrupt):
        loop_of(cut, tmp_path / "cut", momentum=momentum).run(stop)
    loop_of(resumed, tmp_path / "cut", momentum=momentum).run()
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            whole.state_dict().values(), resumed.state_dict().values(), strict=True
        )
    )
    assert epochs_logged(tmp_path / "cut") == [1, 2, 3]


def test_epochs_that_no_checkpoint_holds_leave_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: TrainingLoop) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            loop_of(Net(), tmp_path).run()
    assert not (tmp_path / CHECKPOINT_FILE).exists()
    assert epochs_logged(tmp_path) == [1]
    loop_of(Net(), tmp_path).run()
    assert epochs_logged(tmp_path) == [1, 2, 3]


def test_weights_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    network = Net()
    # No output depends on it: the loss stays a number.
    network.register_buffer("spare", torch.zeros(1))

    def poison(progress: LoopProgress) -> None:
        if progress.epoch == 2:
            network.get_buffer("spare").fill_(float("nan"))

    with pytest.raises(TrainingError, match="weights are no numbers any more"):
        loop_of(network, tmp_path).run(poison)
    loop_of(network, tmp_path)  # loads the last good one
    assert network.get_buffer("spare").item() == 0.0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_computed_again_in_the_backward_pass_is_learned_alike(
    tmp_path: Path, use_reentrant: bool
) -> None:
    nets = Net(), Checkpointed(use_reentrant=use_reentrant)
    for net, name in zip(nets, ("kept", "again"), strict=True):
        assert loop_of(net, tmp_path / name)._train_step(0) > 0
    for kept, again in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(again, kept)


def test_networks_are_called_with_all_that_makes_training_fast() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(256, 256, 3, padding=1), nn.BatchNorm2d(7)

        def forward(self, x: Tensor, named: str) -> Tensor:
            product = self.conv(x)
            normed = self.norm(product[:, :7].contiguous(memory_format=FORMAT))
            found[named] = [type(one.grad_fn).__name__ for one in (product, normed)]
            assert normed.dtype == torch.bfloat16
            found_logits: Tensor = normed.view(len(x), -1)
            return found_logits

    found: dict[str, list[str]] = {}
    network = Looking()
    store_channels_last(network)
    x = torch.randn(512, 256, 2, 2).contiguous(memory_format=FORMAT)
    assert logits_of(network, x, "ours", bf16=True).dtype == torch.float32
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="view"),
    ):
        network(x, "torch's")
    assert all(map(operator.ne, found["ours"], found["torch's"]))


def test_modules_are_stored_as_others_expect_them_whatever_happens(
    tmp_path: Path,
) -> None:
    network = Net()
    with pytest.raises(KeyboardInterrupt):
        loop_of(network, tmp_path).run(stop)
    assert all(parameter.is_contiguous() for parameter in network.parameters())


def test_a_label_and_a_teacher_pull_as_their_cross_entropies() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64)
    targets = F.one_hot(torch.tensor([0, 3, 1, 1, 2]), 4).double()
    told = torch.randn(5, 4, dtype=torch.float64).softmax(1)
    chances = logits.exp() / logits.exp().sum(1, keepdim=True)
    smooth = 0.9 * targets + 0.1 / 4
    hard, soft = (-(one * chances.log()).sum(1).mean() for one in (smooth, told))
    found = supernet_loss(
        logits,
        targets,
        soft_targets=told,
        label_smoothing=0.1,
        distillation_ratio=0.7,
    )
    torch.testing.assert_close(found, hard + 0.7 * soft)
    alone = supernet_loss(
        logits, targets, soft_targets=None, label_smoothing=0.1, distillation_ratio=0.7
    )
    torch.testing.assert_close(alone, hard)


def test_a_rate_rises_and_falls_to_nothing() -> None:
    phase = Phase(
        name="one", epochs=10, warmup_epochs=2, peak_learning_rate=0.5, distill=False
    )
    rates = [learning_rate(phase, epoch) for epoch in np.linspace(0, 10, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)  # half way down
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) == rates[20]
    assert np.all(np.diff(rates[:21]) > 0)
    assert np.all(np.diff(rates[20:]) < 0)


@pytest.mark.parametrize("temperature", [None, 4.0])
def test_what_a_teacher_says_is_learned_and_it_stays_as_it_is(
    temperature: float | None,
) -> None:
    phase = Phase(name="dense", epochs=1, peak_learning_rate=0.01, distill=False)
    recipe = Recipe(
        phases=(phase,), batch_size=18, crop_padding=1, temperature=temperature
    )
    images = TrainingImages(tiny.images(per_class=20, seed=11), recipe)
    teacher = Net()
    with torch.no_grad():
        teacher.head.weight.mul_(30)
    teacher.train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}

    def first_loss(taught_by: nn.Module | None) -> float:
        loop = TrainingLoop(
            Net(),
            images=images,
            recipe=recipe,
            resolution=tiny.IMAGE_SIZE,
            folder=None,
            bf16=False,
            teacher=taught_by,
        )
        return loop._train_step(0)

    rng = np.random.default_rng([recipe.seed, 0, 0])
    inputs, targets = images.batch(0, 0, resolution=tiny.IMAGE_SIZE, rng=rng)
    logits, taught = Net().train()(inputs), teacher.eval()(inputs)
    if temperature is None:
        expected = supernet_loss(
            logits,
            targets,
            soft_targets=taught.softmax(1),
            label_smoothing=recipe.label_smoothing,
            distillation_ratio=recipe.distillation_ratio,
        )
    else:
        expected = knowledge_loss(
            logits,
            targets,
            taught,
            temperature=temperature,
            teacher_share=recipe.teacher_share,
            label_smoothing=recipe.label_smoothing,
        )
    found = first_loss(teacher.train())  # it answers in eval mode all the same
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found != pytest.approx(first_loss(None), rel=1e-3)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(before[name], tensor)
