from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import SpaceError, TrainingError
from ofa_deploy.nn.supernet import Supernet, new_supernet
from ofa_deploy.plan import NetworkPlan, lower
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import StoredSupernet, read_supernet, write_supernet
from ofa_deploy.train import finish, progressive
from ofa_deploy.train.checkpoint import Checkpoint, read_checkpoint
from ofa_deploy.train.finish import finish_supernet
from ofa_deploy.train.progressive import (
    CHECKPOINT_FILE,
    LOG_FILE,
    SPACE_FILE,
    SUPERNET_FOLDER,
    ProgressiveTraining,
    TrainingProgress,
)
from ofa_deploy.train.recipe import Phase, Recipe, default_recipe, restrict
from ofa_deploy.work_folder import LOCK_FILE
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from tests.support import tiny, train_tiny
from tests.support.train_tiny import RECIPE, STEPS_PER_EPOCH, training

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
TEACHER_FILE = f"phase-{RECIPE.phases[0].name}.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run") / "run"
    training(folder).run()
    return folder


def seeded() -> np.random.Generator:
    return np.random.default_rng(3)


def state(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / CHECKPOINT_FILE)


def assert_same_weights(found: Path, expected: Path) -> None:
    weights, others = state(found).weights, state(expected).weights
    assert weights.keys() == others.keys()
    different = [n for n in weights if not torch.equal(weights[n], others[n])]
    assert different == []


# -- recipes ---------------------------------------------------------------------------


def test_the_default_recipe_at_its_own_length_is_the_same_recipe() -> None:
    recipe, same = default_recipe(), default_recipe().scaled(1.0)
    for index in range(len(recipe.phases)):
        assert recipe.sha256(index) == same.sha256(index)


# -- interruptions ---------------------------------------------------------------------


def kill_when_at(folder: Path, *, phase: int, step: int) -> None:
    """Train in another process, and kill it once it has saved this position."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.train_tiny", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < deadline:
            if (folder / CHECKPOINT_FILE).exists():
                position = state(folder).position
                if (position.phase, position.step) >= (phase, step):
                    return
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        pytest.fail(f"no position {phase}, {step} within {PATIENCE_S:g} s")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "step"),
    [(0, 3), (1, 2), (2, 1)],
    ids=["first phase", "kernel phase", "width phase"],
)
def test_a_killed_run_continues_to_the_same_weights(
    phase: int, step: int, tmp_path: Path, trained: Path
) -> None:
    folder = tmp_path / "run"
    kill_when_at(folder, phase=phase, step=step)
    training(folder, resume=True).run()
    assert_same_weights(folder, trained)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_goes_on_from_the_results_of_its_first_phases(
    count: int, tmp_path: Path, trained: Path
) -> None:
    for phase in RECIPE.phases[:count]:
        name = f"phase-{phase.name}.safetensors"
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    training(tmp_path, resume=True).run()
    assert_same_weights(tmp_path, trained)


def test_phases_to_come_may_still_change_and_past_ones_may_not(
    tmp_path: Path, trained: Path
) -> None:
    name = "phase-full.safetensors"
    (tmp_path / name).write_bytes((trained / name).read_bytes())
    full, kernel, width = RECIPE.phases
    later = replace(kernel, peak_learning_rate=0.01)
    training(tmp_path, resume=True, recipe=replace(RECIPE, phases=(full, later, width)))
    past = replace(full, peak_learning_rate=0.01)
    with pytest.raises(TrainingError, match="the recipe is not the one"):
        training(
            tmp_path, resume=True, recipe=replace(RECIPE, phases=(past, kernel, width))
        )


class Interrupted(Exception):
    """Stands for whatever ends a run from outside."""


def interrupt_after(folder: Path, passes: int, *, resume: bool) -> None:
    """Break off before the next training pass after so many."""
    run = training(folder, resume=resume)
    done = 0

    def count(module: object, arguments: object) -> None:
        nonlocal done
        if torch.is_grad_enabled():
            if done == passes:
                raise Interrupted
            done += 1

    run.supernet.register_forward_pre_hook(count)
    with pytest.raises(Interrupted):
        run.run()


def test_a_run_broken_off_again_and_again_comes_to_the_same_weights(
    tmp_path: Path, trained: Path
) -> None:
    folder = tmp_path / "run"
    interrupt_after(folder, 1, resume=False)
    for passes in (5, 4, 7, 3):
        interrupt_after(folder, passes, resume=True)
    training(folder, resume=True).run()
    assert_same_weights(folder, trained)


def test_a_run_stopped_after_each_phase_comes_to_the_same_weights(
    tmp_path: Path, trained: Path
) -> None:
    folder = tmp_path / "run"
    for index, phase in enumerate(RECIPE.phases):
        training(folder, resume=index > 0, stop_after=phase.name).run()
    assert_same_weights(folder, trained)


def test_a_run_that_stopped_stops_there_again(tmp_path: Path) -> None:
    stop = RECIPE.phases[0].name
    training(tmp_path, stop_after=stop).run()
    again = training(tmp_path, resume=True, stop_after=stop)
    again.run()
    assert not again.is_complete
    assert not again.settings.phase_result(RECIPE.phases[1]).exists()


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = replace(RECIPE, phases=RECIPE.phases[:1])
    training(folder, recipe=recipe).run()
    before = state(folder).weights
    again = training(folder, recipe=recipe, resume=True)
    assert again.is_complete
    again.run()
    after = state(folder).weights
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_equal_seeds_train_equal_supernets(tmp_path: Path, trained: Path) -> None:
    training(tmp_path / "again").run()
    assert_same_weights(tmp_path / "again", trained)


# -- refusals --------------------------------------------------------------------------


def refusal(folder: Path, **changes: Recipe | ImageSet | bool | str) -> str:
    with pytest.raises(TrainingError) as caught:
        training(folder, **changes)  # type: ignore[arg-type]
    return str(caught.value)


def test_resuming_with_another_recipe_is_refused(trained: Path) -> None:
    other = replace(RECIPE, weight_decay=1e-4)
    assert refusal(trained, resume=True, recipe=other) == (
        f"the recipe is not the one that {trained} was started with; resume with the "
        f"same (weight_decay {RECIPE.weight_decay} → 0.0001), or start a new folder"
    )


def test_a_phase_that_is_another_one_is_named(trained: Path) -> None:
    longer = replace(RECIPE.phases[0], epochs=RECIPE.phases[0].epochs + 1)
    other = replace(RECIPE, phases=(longer, *RECIPE.phases[1:]), batch_size=7)
    told = refusal(trained, resume=True, recipe=other)
    assert (
        f"(batch_size {RECIPE.batch_size} → 7, {longer.name}.epochs "
        f"{longer.epochs - 1} → {longer.epochs})"
    ) in told


def test_resuming_with_other_images_is_refused(trained: Path) -> None:
    other = tiny.images(per_class=30, seed=12)
    assert refusal(trained, resume=True, images=other) == (
        f"the training data is not the one that {trained} was started with; resume "
        "with the same, or start a new folder"
    )


def test_resuming_with_other_labels_is_refused(trained: Path) -> None:
    data = train_tiny.data()
    other = replace(data, labels=data.labels[::-1].copy())
    assert "the training data is not the one" in refusal(
        trained, resume=True, images=other
    )


def test_a_space_that_cannot_be_built_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    """Its smallest network would be met once the widths are trained."""
    first = replace(tiny.SPACE.stages[0], out_channels=20)
    second = replace(tiny.SPACE.stages[-1], block="mbconv", expands=(1, 2, 4))
    space = replace(tiny.SPACE, stages=(first, second))
    lower(space, space.largest())
    with pytest.raises(SpaceError, match="expand 1 of 20 channels"):
        ProgressiveTraining(
            space=space,
            data=train_tiny.data(),
            recipe=RECIPE,
            settings=progressive.RunSettings(folder=tmp_path / "run"),
            bf16=False,
        )
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_numbers_replace_no_checkpoint(tmp_path: Path) -> None:
    run = training(tmp_path)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    with torch.no_grad():
        next(run.supernet.parameters())[0] = float("nan")
    with pytest.raises(TrainingError, match="no numbers any more after step 0"):
        run._save()
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


def test_a_state_alone_tells_of_which_space_it_is(tmp_path: Path) -> None:
    """Of equal tensors are spaces that differ in a stride, too."""
    training(tmp_path)
    (tmp_path / SPACE_FILE).unlink()
    stages = tiny.SPACE.stages
    other = replace(stages[0], stride=3 - stages[0].stride)
    with pytest.raises(TrainingError, match="the space is not the one that"):
        ProgressiveTraining(
            space=replace(tiny.SPACE, stages=(other, *stages[1:])),
            data=train_tiny.data(),
            recipe=RECIPE,
            settings=progressive.RunSettings(folder=tmp_path, resume=True),
            bf16=False,
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"warmup_epochs": 1.0, "epochs": 1}, "warmup_epochs=1 of epochs=1"),
        ({"warmup_epochs": 5.0, "epochs": 3}, "warmup_epochs=5 of epochs=3"),
    ],
)
def test_a_phase_whose_rate_never_falls_is_refused(
    changes: dict[str, float], told: str
) -> None:
    with pytest.raises(TrainingError, match=told):
        replace(RECIPE.phases[0], **changes)  # type: ignore[arg-type]


def test_phases_of_one_name_are_refused() -> None:
    """Each would replace the other's result, which later ones may learn from."""
    first, second, *others = RECIPE.phases
    same = (first, replace(second, name=first.name), *others)
    with pytest.raises(TrainingError, match="two have one name"):
        replace(RECIPE, phases=same)


def test_resuming_with_another_space_is_refused(trained: Path, tmp_path: Path) -> None:
    wider = replace(tiny.SPACE, head=replace(tiny.SPACE.head, expand_channels=40))
    with pytest.raises(TrainingError, match=f"^{trained} holds a run of another space"):
        ProgressiveTraining(
            space=wider,
            data=train_tiny.data(),
            recipe=RECIPE,
            settings=progressive.RunSettings(folder=trained, resume=True),
            bf16=False,
        )


def test_resuming_with_a_space_that_differs_in_a_stride_is_refused(
    tmp_path: Path,
) -> None:
    training(tmp_path)
    stages = tiny.SPACE.stages
    other = replace(stages[0], stride=3 - stages[0].stride)
    space = replace(tiny.SPACE, stages=(other, *stages[1:]))
    with pytest.raises(TrainingError, match="holds a run of another space"):
        ProgressiveTraining(
            space=space,
            data=train_tiny.data(),
            recipe=RECIPE,
            settings=progressive.RunSettings(folder=tmp_path, resume=True),
            bf16=False,
        )


def test_what_a_kill_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    training(tmp_path)
    leftovers = [tmp_path / f".{name}.abc" for name in (CHECKPOINT_FILE, TEACHER_FILE)]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    training(tmp_path, resume=True)
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_kill_in_the_first_checkpoint_leaves_a_folder_to_start_in(
    tmp_path: Path,
) -> None:
    (tmp_path / f".{CHECKPOINT_FILE}.abc").write_bytes(b"half")
    (tmp_path / LOCK_FILE).touch()
    training(tmp_path)
    assert (tmp_path / CHECKPOINT_FILE).exists()
    assert not list(tmp_path.glob(f".{CHECKPOINT_FILE}.*"))


def test_a_kill_before_the_space_was_written_leaves_it_to_be_written(
    tmp_path: Path,
) -> None:
    training(tmp_path)
    kept = (tmp_path / SPACE_FILE).read_bytes()
    (tmp_path / SPACE_FILE).unlink()
    training(tmp_path, resume=True)
    assert (tmp_path / SPACE_FILE).read_bytes() == kept


def test_what_a_damaged_line_of_the_log_hides_is_that_line(
    tmp_path: Path, trained: Path
) -> None:
    training(tmp_path, stop_after=RECIPE.phases[0].name).run()
    log = tmp_path / LOG_FILE
    lines = log.read_text().splitlines(keepends=True)
    log.write_bytes(b'{"phase": "fu\xff' + "".join(["\n", *lines]).encode())
    training(tmp_path, resume=True)
    assert log.read_text() == "".join(lines)


def test_a_damaged_checkpoint_that_nothing_came_before_is_the_end_of_its_folder(
    tmp_path: Path,
) -> None:
    training(tmp_path)
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half")
    message = refusal(tmp_path, resume=True)
    assert message.endswith("; start again in a new folder")


@pytest.mark.parametrize("left", ["half a line", "an epoch of no checkpoint"])
def test_the_log_says_nothing_of_what_is_trained_again(
    left: str, tmp_path: Path, trained: Path
) -> None:
    lines = (trained / LOG_FILE).read_text().splitlines(keepends=True)
    epochs = len(lines)
    training(tmp_path, stop_after=RECIPE.phases[0].name).run()
    log = tmp_path / LOG_FILE
    here = log.read_text().splitlines(keepends=True)
    assert 0 < len(here) < epochs
    further = lines[len(here)]
    log.write_text("".join(here) + (further[:20] if left == "half a line" else further))
    training(tmp_path, resume=True).run()
    told = [json.loads(line) for line in log.read_text().splitlines()]
    wanted = [json.loads(line) for line in lines]
    assert [(line["phase"], line["epoch"], line["loss"]) for line in told] == [
        (line["phase"], line["epoch"], line["loss"]) for line in wanted
    ]


def test_a_file_in_the_runs_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert refusal(tmp_path / "run") == (
        f"{tmp_path / 'run'} is a file; name a folder for the run"
    )


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    training(tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    content = path.read_bytes()
    version = b'"format_version":"1"'
    assert version in content
    path.write_bytes(content.replace(version, b'"format_version":"9"'))
    assert "format version 9, not 1" in refusal(tmp_path, resume=True)


def test_images_too_small_to_shift_are_refused(tmp_path: Path) -> None:
    data = train_tiny.data()
    size = RECIPE.crop_padding
    small = replace(data, images=data.images[:, :size, :size].copy())
    assert refusal(tmp_path, images=small) == (
        f"images of {size}×{size} pixels cannot be shifted by {size}; give larger ones"
    )


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert refusal(tmp_path) == (
        f"{tmp_path} is not empty; pass --resume to continue the run in it, or name "
        "another folder"
    )


def test_a_refused_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refusal(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, resume=True) == (
        f"{tmp_path} holds no run to resume; start it without --resume, in a new or "
        "empty folder"
    )


@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "one byte of header"])
@pytest.mark.parametrize("name", [CHECKPOINT_FILE, TEACHER_FILE])
def test_a_damaged_state_is_refused(
    damage: str, name: str, tmp_path: Path, trained: Path
) -> None:
    for file in (CHECKPOINT_FILE, TEACHER_FILE):
        (tmp_path / file).write_bytes((trained / file).read_bytes())
    content = (tmp_path / name).read_bytes()
    damaged = {
        "cut off": content[: len(content) // 2],
        "empty": b"",
        "text": b"not a checkpoint at all",
        "one byte of header": content[:20] + b"\xff" + content[21:],
    }[damage]
    (tmp_path / name).write_bytes(damaged)
    message = refusal(tmp_path, resume=True)
    assert message.startswith(f"{tmp_path / name} is damaged, or of another version (")
    cure = "the run goes on from phase-full.safetensors"
    if name == TEACHER_FILE:
        cure = "put an undamaged copy in its place, or start again in a new folder"
    assert message.endswith(cure)


def test_a_missing_teacher_is_refused(tmp_path: Path, trained: Path) -> None:
    checkpoint = (trained / CHECKPOINT_FILE).read_bytes()
    (tmp_path / CHECKPOINT_FILE).write_bytes(checkpoint)
    assert refusal(tmp_path, resume=True).startswith(f"{tmp_path / TEACHER_FILE} ")


def test_data_of_another_class_count_is_refused(tmp_path: Path) -> None:
    data = train_tiny.data()
    two = replace(data, labels=data.labels.clip(max=1), class_names=("a", "b"))
    message = (
        "space tiny has 3 classes, the data 2; write the data's number as "
        "head.class_count of the space's file"
    )
    assert refusal(tmp_path / "run", images=two) == message


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "run", recipe=replace(RECIPE, batch_size=100)) == (
        "81 images to train on are fewer than one batch of 100; give more images, a "
        "smaller batch_size, or another share where they are parted"
    )


def test_a_phase_that_is_not_in_the_recipe_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "run", stop_after="depth9") == (
        "no phase 'depth9'; the recipe has full, kernel, width"
    )


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    explosive = replace(RECIPE.phases[0], peak_learning_rate=1e30)
    recipe = replace(RECIPE, phases=(explosive,))
    with pytest.raises(TrainingError, match=r"^the loss is (nan|inf) at step \d+"):
        training(tmp_path / "run", recipe=recipe).run()


# -- what is trained -------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_the_colours(tmp_path: Path) -> None:
    longer = replace(RECIPE.phases[0], epochs=6, peak_learning_rate=0.05)
    seen: list[TrainingProgress] = []
    run = training(tmp_path / "run", recipe=replace(RECIPE, phases=(longer,)))
    run.run(seen.append)
    losses = [p.loss for p in seen if p.step % STEPS_PER_EPOCH == 0]
    assert losses[-1] < losses[0] - 0.2
    assert seen[-1].accuracies["largest"] >= 0.8


@pytest.mark.parametrize("index", range(len(RECIPE.phases)))
def test_a_phase_trains_only_its_own_choices(index: int, tmp_path: Path) -> None:
    phase = RECIPE.phases[index]
    folder = tmp_path / "run"
    if index:
        before = RECIPE.phases[index - 1].name
        training(folder, stop_after=before).run()
    run = training(folder, resume=index > 0, stop_after=phase.name)
    trained: set[SubnetConfig] = set()

    def note(module: Supernet, arguments: tuple[Tensor, NetworkPlan]) -> None:
        if module.training and torch.is_grad_enabled():
            trained.add(arguments[1].config)

    run.supernet.register_forward_pre_hook(note)
    run.run()
    allowed = restrict(tiny.SPACE, phase)
    assert trained
    for config in trained:
        allowed.validate(config)


def test_a_sandwich_trains_both_ends_in_every_step(tmp_path: Path) -> None:
    full, _, width = RECIPE.phases
    recipe = replace(RECIPE, phases=(full, replace(width, sandwich=True)))
    training(tmp_path / "run", recipe=recipe, stop_after=full.name).run()
    run = training(tmp_path / "run", recipe=recipe, resume=True)
    trained: list[SubnetConfig] = []

    def note(module: Supernet, arguments: tuple[Tensor, NetworkPlan]) -> None:
        if module.training and torch.is_grad_enabled():
            trained.append(arguments[1].config)

    run.supernet.register_forward_pre_hook(note)
    run.run()
    space = restrict(tiny.SPACE, recipe.phases[1])
    ends = [space.largest(), space.smallest()]
    assert len(trained) == 2 * STEPS_PER_EPOCH
    for number, config in enumerate(trained):
        assert config == replace(ends[number % 2], resolution=config.resolution)


def test_a_step_sums_the_gradients_of_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progressive shrinking adds the sub-networks' gradients, it does not average."""
    run = training(tmp_path)
    phase = replace(RECIPE.phases[0], subnet_count=2)
    config = tiny.SPACE.largest()
    monkeypatch.setattr(run._optimizer, "step", lambda: None)

    def gradients(configs: list[SubnetConfig]) -> dict[str, Tensor]:
        monkeypatch.setattr(progressive, "_sample", lambda *_: configs)
        run._train_step(phase, 0)
        return {
            name: parameter.grad.clone()
            for name, parameter in run.supernet.named_parameters()
            if parameter.grad is not None
        }

    once, twice = gradients([config]), gradients([config, config])
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient, rtol=1e-4, atol=1e-6)


def taught_twice() -> Recipe:
    """The recipe with two teachers in its last phase."""
    last = replace(RECIPE.phases[2], teachers=("full", "kernel"))
    return replace(RECIPE, phases=(*RECIPE.phases[:2], last))


def test_several_teachers_tell_the_mean_of_their_probabilities(tmp_path: Path) -> None:
    recipe = taught_twice()
    training(tmp_path, recipe=recipe, stop_after="kernel").run()
    run = training(tmp_path, recipe=recipe, resume=True)
    resolution = tiny.SPACE.resolutions[-1]
    inputs, _ = run.images.batch(2, 0, resolution=resolution, rng=seeded())
    plan = lower(tiny.SPACE, replace(tiny.SPACE.largest(), resolution=resolution))
    told = []
    for name in ("full", "kernel"):
        teacher = new_supernet(tiny.SPACE)
        weights = read_checkpoint(tmp_path / f"phase-{name}.safetensors").weights
        teacher.load_state_dict(weights)
        with torch.no_grad():
            told.append(teacher.train()(inputs, plan).softmax(1))
    assert not torch.equal(told[0], told[1])
    torch.testing.assert_close(run._teach(inputs, resolution), (told[0] + told[1]) / 2)


def test_a_run_with_two_teachers_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = taught_twice()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training(whole, recipe=recipe).run()
    training(parts, recipe=recipe, stop_after="kernel").run()
    training(parts, recipe=recipe, resume=True).run()
    assert_same_weights(parts, whole)


def test_teachers_are_part_of_a_phase_and_of_no_earlier_one() -> None:
    one, two = RECIPE, taught_twice()
    assert one.sha256(1) == two.sha256(1)
    assert one.sha256(2) != two.sha256(2)


def test_a_teacher_that_comes_later_is_refused() -> None:
    early = replace(RECIPE.phases[1], teachers=("full", "width"))
    with pytest.raises(TrainingError) as caught:
        replace(RECIPE, phases=(RECIPE.phases[0], early, RECIPE.phases[2]))
    assert str(caught.value) == (
        "phase kernel: teachers width are no earlier phases; there are full"
    )


def test_a_sandwich_of_one_network_is_refused() -> None:
    with pytest.raises(TrainingError, match="subnet_count=1; a sandwich has at least"):
        replace(RECIPE.phases[0], sandwich=True)


def test_the_first_phase_holds_one_network_per_resolution() -> None:
    allowed = restrict(tiny.SPACE, RECIPE.phases[0])
    assert allowed.count() == len(tiny.SPACE.resolutions)


def test_the_last_phase_of_the_default_recipe_holds_the_whole_space() -> None:
    """However many choices a space has: what is not trained would be found."""
    many = tuple(
        replace(stage, kernels=(3, 5, 7, 9), depths=(1, 2, 3, 4), expands=(1, 2, 3, 4))
        for stage in tiny.SPACE.stages
    )
    for space in (tiny.SPACE, replace(tiny.SPACE, stages=many)):
        assert restrict(space, default_recipe().phases[-1]) == space


def test_runs_of_when_three_choices_were_all_can_be_continued() -> None:
    def explicit(count: int | None) -> int:
        return 3 if count is None else count

    before = replace(
        default_recipe(),
        phases=tuple(
            replace(
                phase,
                kernel_choices=explicit(phase.kernel_choices),
                depth_choices=explicit(phase.depth_choices),
                expand_choices=explicit(phase.expand_choices),
            )
            for phase in default_recipe().phases
        ),
    )
    last = len(before.phases) - 1
    assert default_recipe().sha256(last) == before.sha256(last)


def test_phases_of_the_default_recipe_only_ever_widen_the_choices() -> None:
    counts = [restrict(tiny.SPACE, p).count() for p in default_recipe().phases]
    assert counts == sorted(counts)


def test_bfloat16_trains_too(tmp_path: Path) -> None:
    recipe = replace(RECIPE, phases=RECIPE.phases[:1])
    run = training(tmp_path / "run", recipe=recipe, bf16=True)
    run.run()
    assert run.is_complete


def test_a_scaled_recipe_keeps_at_least_an_epoch_a_phase() -> None:
    scaled = default_recipe().scaled(0.01)
    assert {phase.epochs for phase in scaled.phases} == {1}


def test_a_recipe_whose_first_phase_has_a_teacher_is_refused() -> None:
    with pytest.raises(TrainingError) as caught:
        Recipe(phases=(Phase(name="full", epochs=1, peak_learning_rate=0.1),))
    assert str(caught.value) == (
        "the first phase trains the teacher and cannot have one itself"
    )


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(TrainingError) as caught:
        replace(RECIPE, batch_size=1)
    assert str(caught.value) == (
        "batch_size=1 must be at least 2: batch norm needs more than one image"
    )


# -- the stored supernet, and what comes after -----------------------------------------


def test_the_stored_supernet_is_the_last_state_rounded(trained: Path) -> None:
    stored = read_supernet(trained / SUPERNET_FOLDER)
    for name, tensor in state(trained).weights.items():
        rounded = tensor.numpy().astype(np.float16).astype(np.float32)
        assert np.array_equal(stored.weights[name], rounded), name


def finished(folder: Path, sample_count: int = 12) -> StoredSupernet:
    run = training(folder, resume=True)
    return finish_supernet(
        folder,
        training=run.images.training,
        validation=run.images.validation,
        backend=OnnxRuntimeCpu(),
        threads=1,
        seed=0,
        calibration_count=6,
        sample_count=sample_count,
    )


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A finished training that a test may change."""
    target = tmp_path / "run"
    (target / SUPERNET_FOLDER).mkdir(parents=True)
    for file in trained.rglob("*.*"):
        if file.is_file():
            (target / file.relative_to(trained)).write_bytes(file.read_bytes())
    return target


def test_finishing_adds_all_that_specialising_needs(copied: Path) -> None:
    supernet = finished(copied)
    assert supernet.calibration is not None
    assert supernet.calibration.shape == (6, 12, 12, 3)
    assert supernet.accuracy is not None
    assert supernet.samples is not None
    assert len(supernet.samples.genomes) == 12


def test_measured_accuracies_are_of_different_networks_and_the_extremes(
    copied: Path,
) -> None:
    samples = finished(copied).samples
    assert samples is not None
    configs = [tiny.SPACE.decode(row) for row in samples.genomes]
    assert len(set(configs)) == 12
    assert {tiny.SPACE.largest(), tiny.SPACE.smallest()} <= set(configs)
    assert samples.image_count == 9


def cut_off(folder: Path) -> None:
    """Leave a finished folder as if it had been killed in its eighth accuracy."""
    supernet = read_supernet(folder / SUPERNET_FOLDER)
    write_supernet(
        folder / SUPERNET_FOLDER, replace(supernet, accuracy=None, samples=None)
    )
    journal = folder / finish.SAMPLES_JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 12
    journal.write_text("".join(lines[:7]) + lines[7][:15])


def test_finishing_goes_on_after_its_journal_was_cut_off(copied: Path) -> None:
    whole = finished(copied)
    cut_off(copied)
    again = finished(copied)
    assert whole.samples is not None
    assert again.samples is not None
    assert np.array_equal(whole.samples.genomes, again.samples.genomes)
    assert np.array_equal(whole.samples.accuracy, again.samples.accuracy)


def test_a_cut_off_journal_is_whole_after_going_on(copied: Path) -> None:
    finished(copied)
    cut_off(copied)
    finished(copied)
    names = set()
    for line in (copied / finish.SAMPLES_JOURNAL).read_text().splitlines():
        try:
            names.add(json.loads(line)["id"])
        except ValueError:
            continue
    assert len(names) == 12


def test_accuracies_of_other_weights_do_not_count(copied: Path) -> None:
    whole = finished(copied)
    cut_off(copied)
    journal = copied / finish.SAMPLES_JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()[:7]]
    others = [{**line, "accuracy": 2.0, "subject": "another"} for line in lines]
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in others))
    again = finished(copied)
    assert whole.samples is not None
    assert again.samples is not None
    assert np.array_equal(whole.samples.accuracy, again.samples.accuracy)


def test_finishing_again_measures_nothing_again(copied: Path) -> None:
    finished(copied)
    journal = copied / finish.SAMPLES_JOURNAL
    before = journal.read_text()
    finished(copied)
    assert journal.read_text() == before


def test_resuming_a_finished_run_leaves_its_supernet_as_it_is(copied: Path) -> None:
    sha256 = finished(copied).sha256
    training(copied, resume=True).run()
    assert read_supernet(copied / SUPERNET_FOLDER).sha256 == sha256


def test_stopping_after_the_last_phase_is_finishing(tmp_path: Path) -> None:
    run = training(tmp_path / "run", stop_after=RECIPE.phases[-1].name)
    run.run()
    assert run.is_complete
    read_supernet(tmp_path / "run" / SUPERNET_FOLDER)


@pytest.mark.parametrize("most_kept_bytes", [2**31, 0])
def test_a_sampled_accuracy_is_that_of_the_network(
    copied: Path, monkeypatch: pytest.MonkeyPatch, most_kept_bytes: int
) -> None:
    from ofa_deploy import evaluation
    from ofa_deploy.evaluation import Evaluator

    monkeypatch.setattr(evaluation, "MOST_KEPT_BYTES", most_kept_bytes)
    supernet = finished(copied)
    assert supernet.samples is not None
    run = training(copied, resume=True)
    evaluator = Evaluator(
        supernet,
        data=run.images.validation,
        calibration=supernet.calibration,
        backend=OnnxRuntimeCpu(),
        threads=1,
    )
    for row, expected in zip(
        supernet.samples.genomes[:3], supernet.samples.accuracy[:3], strict=True
    ):
        plan = lower(tiny.SPACE, tiny.SPACE.decode(row))
        assert evaluator.accuracy(plan) == expected
