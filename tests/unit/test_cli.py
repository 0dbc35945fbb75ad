from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console

from ofa_deploy import cli, device_bench, drift, pipeline, probe, table_files
from ofa_deploy.bundle import Bundle
from ofa_deploy.cli import main
from ofa_deploy.cli.progress import StageBar
from ofa_deploy.cli.tables import show_bundle, show_diagnosis
from ofa_deploy.errors import BundleError
from ofa_deploy.layers import BlockPlan
from ofa_deploy.plan import lower
from ofa_deploy.space import SubnetConfig
from ofa_deploy.space_file import encode_space
from ofa_deploy.stored import read_supernet, write_supernet
from ofa_deploy.train import finish
from ofa_deploy.work_folder import LOCK_FILE, working_alone
from profilers import MeasureSettings
from profilers.backends import get_backend
from profilers.device import this_device
from profilers.doctor import BackendStatus, Diagnosis, Finding
from profilers.steadiness import Steadiness, Throttling
from tests.support import tiny, tiny_bundle

COMMANDS = tuple(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, and what it told people."""

    code: int
    output: str
    told: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, as its entry point runs it."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ofa-deploy", *map(str, arguments)])
        monkeypatch.setattr(cli._console, "width", 1000)
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Outcome(code=code, output=captured.out, told=captured.err)

    return call


def assert_refused(outcome: Outcome, message: str, *, stages: str = "") -> None:
    assert outcome.told.strip() == f"{stages}error: {message}"
    assert (outcome.code, outcome.output) == (1, "")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; not to be changed."""
    return tiny_bundle.write_bundle(tmp_path_factory.mktemp("cli") / "bundle").path


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernet")
    write_supernet(folder, tiny.stored())
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of this machine and ONNX Runtime, by formula."""
    path = tmp_path_factory.mktemp("table") / "table.json"
    write_table(path)
    return path


def write_table(path: Path, *, slowness: float = 1.0) -> None:
    def block_ms(block: BlockPlan) -> float:
        return slowness * tiny.work_ms(block)

    def network_ms(config: SubnetConfig) -> float:
        return sum(block_ms(block) for block in lower(tiny.SPACE, config).blocks)

    tiny.latency_table(
        tiny.SPACE,
        networks=tiny.random_configs(tiny.SPACE, 20),
        network_ms=network_ms,
        block_ms=block_ms,
        device=this_device(),
        runtime=get_backend("onnxruntime-cpu").runtime(threads=1),
        origin="measured",
    ).save(path)


# -- help ------------------------------------------------------------------------------


def test_help_lists_every_command(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f" {command} " in outcome.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, run: Run) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert f"{command} [OPTIONS]" in outcome.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["check"],
        ["specialize", "--latency-ms", "fast", "--out", "x"],
        ["specialize", "--latency-ms", "1"],
        ["specialize", "--latency-ms", "1", "--out", "x", "--seed", "-1"],
        ["frontier", "--seed", "-1"],
        ["doctor", "--no-such-option"],
    ],
)
def test_wrong_usage_ends_with_code_two(arguments: list[str], run: Run) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.told


# -- check -----------------------------------------------------------------------------


def test_an_intact_bundle_is_said_to_be_intact(original: Path, run: Run) -> None:
    outcome = run("check", original)
    assert outcome.code == 0
    assert outcome.told.startswith(f"{original} is intact: every digest matches")


def test_a_check_in_json_is_nothing_but_json(original: Path, run: Run) -> None:
    outcome = run("check", original, "--json")
    assert outcome.told == ""
    assert json.loads(outcome.output)["top1_agreement"] == 1.0


def test_a_missing_bundle_is_refused(tmp_path: Path, run: Run) -> None:
    assert_refused(
        run("check", tmp_path / "none"),
        f"{tmp_path / 'none'} is not a bundle: it has no manifest.json; give a folder "
        "that `ofa-deploy specialize` wrote",
    )


def test_a_damaged_bundle_is_refused(original: Path, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(original, tmp_path / "bundle")
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    outcome = run("check", folder)
    assert outcome.code == 1
    assert outcome.told.startswith("error: model.onnx has sha256 ")


def test_brackets_in_a_message_are_printed_as_they_are(
    tmp_path: Path, run: Run
) -> None:
    outcome = run("check", tmp_path / "[red]none[/red]")
    assert "[red]none[/red] is not a bundle" in outcome.told


@pytest.mark.parametrize("name", ["[red]bundle[/red]", "[/x]", ":cat:"])
def test_a_path_like_markup_is_printed_as_it_is(
    name: str,
    original: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(original, tmp_path / name)
    assert run("check", folder).told.startswith(f"{folder} is intact: ")
    show_bundle(cli._console, Bundle.open(folder))
    assert capsys.readouterr().err.split()[:2] == ["bundle", str(folder)]


def test_a_bar_shows_its_stage_as_it_is() -> None:
    drawn = io.StringIO()
    with StageBar(Console(file=drawn, force_terminal=True, width=200)) as bar:
        bar.begin("reading [/x] [bold].zip")
    assert "reading [/x] [bold].zip" in drawn.getvalue()


def test_debugging_raises_the_error_itself(tmp_path: Path, run: Run) -> None:
    with pytest.raises(BundleError):
        run("--debug", "check", tmp_path)


# -- specialize ------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0", "-0.5", "nan", "inf"])
def test_a_budget_that_makes_no_sense_is_refused(
    budget: str, tmp_path: Path, run: Run
) -> None:
    assert_refused(
        run("specialize", "--latency-ms", budget, "--out", tmp_path / "bundle"),
        f"a latency budget of {float(budget)} ms makes no sense; give a finite number "
        "above 0, such as 0.5",
    )


@pytest.mark.parametrize("command", ["specialize", "frontier", "fleet"])
def test_a_stale_table_is_measured_anew_or_used_and_not_both(
    command: str, tmp_path: Path, run: Run
) -> None:
    needed = {
        "specialize": ["--latency-ms", "1"],
        "frontier": [],
        "fleet": ["--device", "openvino-cpu=1"],
    }
    words = [*needed[command], "--out", str(tmp_path / "out")]
    assert_refused(
        run(command, *words, "--reprofile", "--accept-drift"),
        "--reprofile measures a stale table anew, --accept-drift uses it as it is; "
        "give one of them",
    )


def test_an_output_folder_in_use_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(
        run("specialize", "--latency-ms", "1", "--out", tmp_path),
        f"{tmp_path} exists and is not an empty folder; name another output folder, "
        "or remove it first",
    )


def test_an_output_folder_that_cannot_be_made_is_refused_first(
    tmp_path: Path, run: Run
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    out = tmp_path / "notes.txt" / "out"
    refused = run("specialize", "--latency-ms", "1", "--out", out)
    assert refused.code == 1
    assert refused.told.strip().startswith(f"error: {out} cannot be made: ")
    assert "name a folder whose parent can be written" in refused.told


def test_a_demo_looks_at_its_output_folder_before_it_measures(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Specializer", lambda *_, **__: pytest.fail("begun"))
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(
        run("demo", "--out", tmp_path),
        f"{tmp_path} exists and is not an empty folder; name another output folder, "
        "or remove it first",
    )


def test_an_output_folder_that_cannot_be_looked_at_is_refused(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, **_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    out = tmp_path / "out"
    assert_refused(
        run("specialize", "--latency-ms", "1", "--out", out),
        f"{out} cannot be looked at: [Errno 13] Permission denied: '{out}'; name a "
        "folder that can be read",
    )


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, run: Run
) -> None:
    file = tmp_path / f"{'x' * 300}.svg"
    refused = run("probe", "--device", "onnxruntime-cpu", "--plot", file)
    assert refused.code == 1
    assert refused.told.startswith(f"error: --plot {file} cannot be written: ")
    assert refused.told.rstrip().endswith("; name another file")
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_is_told_what_to_set(
    supernet: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(name: str) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(table_files, "user_cache_path", nowhere)
    assert_refused(
        run(
            *("specialize", "--latency-ms", "1", "--out", tmp_path / "bundle"),
            *("--device", "onnxruntime-cpu", "--supernet", supernet),
        ),
        "there is no folder to keep latency tables in (Could not determine home "
        "directory.); set HOME, or XDG_CACHE_HOME, to a folder that can be written",
    )


def test_what_nobody_thought_of_is_told_in_a_line(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(Bundle, "open", broken)
    assert_refused(
        run("check", tmp_path),
        "ZeroDivisionError: division by zero. That should not happen: run it again "
        "with --debug to see where, and report that",
    )
    with pytest.raises(ZeroDivisionError):
        run("--debug", "check", tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_what_signals_do_is_the_commands_for_as_long_as_it_runs(
    before: signal.Handlers,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meanwhile: list[bool] = []

    def opened(*_: object, **__: object) -> None:
        meanwhile.append(callable(signal.getsignal(signal.SIGHUP)))
        raise BundleError("it is none")

    monkeypatch.setattr(Bundle, "open", opened)
    others = signal.signal(signal.SIGHUP, before)
    try:
        assert_refused(run("check", tmp_path), "it is none")
        # What nohup has ignored stays ignored.
        assert meanwhile == [before == signal.SIG_DFL]
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, others)


def test_an_output_folder_on_which_something_is_mounted_is_refused(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    assert_refused(
        run("specialize", "--latency-ms", "1", "--out", tmp_path),
        f"{tmp_path} is where something is mounted, so that nothing can be moved to "
        f"it; name a folder in it, such as {tmp_path / 'bundle'}",
    )


def test_an_unknown_device_is_refused(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "bundle"
    assert_refused(
        run("specialize", "--latency-ms", "1", "--out", out, "--device", "tpu"),
        "device 'tpu' is unknown; there are litert-cpu, onnxruntime-cpu, "
        "openvino-cpu, tensorrt-gpu, tensorrt-rtx-gpu, optionally with ?threads=N",
    )


def test_a_budget_that_nothing_meets_is_refused(
    supernet: Path, table: Path, tmp_path: Path, run: Run
) -> None:
    outcome = run(
        *("specialize", "--latency-ms", "1e-6", "--out", tmp_path / "bundle"),
        *("--device", "onnxruntime-cpu", "--supernet", supernet, "--table", table),
        "--accept-drift",
    )
    assert outcome.code == 1
    assert "error: no network of tiny meets 1e-06 ms on" in outcome.told
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported files are timed for half a second."""
    settings = MeasureSettings(
        visits=2,
        runs_per_visit=2,
        warmup_runs=1,
        warmup_windows=1,
        anchor_repeats=1,
        seed=0,
        target_relative_error=10.0,
        max_seconds=0.5,
    )
    monkeypatch.setattr(drift, "CONFIRM_SETTINGS", settings)
    monkeypatch.setattr(device_bench, "CERTIFY_SETTINGS", settings)
    monkeypatch.setattr(device_bench, "CERTIFY_PROCESSES", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_bundle_in_json_is_its_manifest_and_its_path(
    supernet: Path, table: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "bundle"
    outcome = run(
        *("specialize", "--latency-ms", "10000", "--out", out, "--json"),
        *("--device", "onnxruntime-cpu", "--supernet", supernet, "--table", table),
        "--accept-drift",
    )
    assert (outcome.code, outcome.told) == (0, "")
    manifest = json.loads((out / "manifest.json").read_text())
    assert json.loads(outcome.output) == {**manifest, "path": str(out)}


# -- demo ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_demo_in_json_is_nothing_but_its_bundle(
    supernet: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A table of a device so slow that what is in its middle is met on this one.
    table = tmp_path / "table.json"
    write_table(table, slowness=10_000)
    session = partial(pipeline.Specializer, supernet=supernet, table=table)
    monkeypatch.setattr(pipeline, "Specializer", session)
    monkeypatch.setattr(pipeline, "MAX_DRIFT_RATIO", None)
    out = tmp_path / "bundle"
    outcome = run("demo", "--out", out, "--device", "onnxruntime-cpu", "--json")
    assert (outcome.code, outcome.told) == (0, "")
    manifest = json.loads((out / "manifest.json").read_text())
    assert json.loads(outcome.output) == {**manifest, "path": str(out)}


# -- probe -----------------------------------------------------------------------------


SOME_OPERATORS = {"ReLU", "squeeze-and-excite"}


def test_a_probe_tells_and_draws_operators_widths_and_the_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = MeasureSettings(
        visits=2,
        runs_per_visit=1,
        warmup_runs=1,
        warmup_windows=1,
        anchor_repeats=1,
        seed=0,
        target_relative_error=10.0,
        max_seconds=1.0,
    )
    monkeypatch.setattr(MeasureSettings, "screen", lambda: quick)
    # That all of them run is shown where operators are probed.
    some = [p for p in probe.operator_probes() if p.name in SOME_OPERATORS]
    monkeypatch.setattr(probe, "operator_probes", lambda: some)
    outcome = run("probe", "--device", "onnxruntime-cpu", "--json")
    assert outcome.told == ""
    found = json.loads(outcome.output)
    assert {fact["name"] for fact in found["operators"]} == SOME_OPERATORS
    assert len(found["widths"]) > 20
    assert "channel_step" in found
    plot = tmp_path / "probe.svg"
    told = run("probe", "--device", "onnxruntime-cpu", "--plot", plot).told
    drawn = plot.read_text()
    assert all(name in drawn for name in ("squeeze-and-excite", "output channels"))
    assert "channels come in steps of" in told or "no steps" in told
    assert "squeeze-and-excite" in told


# -- doctor ----------------------------------------------------------------------------


def test_the_doctor_names_this_machine_in_json(run: Run) -> None:
    found = json.loads(run("doctor", "--json").output)
    assert found["device"]["cpu_model"] == this_device().cpu_model


def test_the_doctor_speaks_to_people(run: Run) -> None:
    assert this_device().cpu_model in run("doctor").told


def test_the_doctor_keeps_the_brackets_of_a_cure(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli._console, "width", 1000)
    cure = "Run: pip install 'ofa-deploy[openvino]'"
    diagnosis = Diagnosis(
        device=replace(tiny.DEVICE, cpu_model="A76 [/x]"),
        conditions=tiny_bundle.CONDITIONS,
        core_count=4,
        backends=(BackendStatus(name="openvino-cpu", version=None, problem=cure),),
        steadiness=Steadiness(
            spread_ratio=0.01,
            throttling=Throttling(event_count=None, active=()),
            new_throttle_events=0,
        ),
        findings=(Finding(severity="error", text="nothing [/x] runs", cure=cure),),
    )
    show_diagnosis(cli._console, diagnosis)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("A76 [/x] (aarch64), 4 usable cores")
    assert told[1:] == [
        f"  openvino-cpu: missing: {cure}",
        "error  nothing [/x] runs",
        f"    {cure}",
    ]


# -- train -----------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    images = tiny.images(per_class=20)
    np.savez(path, images=images.images, labels=images.labels)
    return path


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(encode_space(tiny.SPACE)))
    return path


def train(run: Run, data: Path, out: Path, *more: str | Path) -> Outcome:
    return run("train", "--data", data, "--out", out, "--threads", "1", *more)


def test_a_run_is_trained_by_one_command_at_a_time(
    data: Path, space_file: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "run"
    with working_alone(out):
        refused = train(run, data, out, "--space", space_file, "--batch-size", "4")
    assert refused.code == 1
    assert f"error: another call is at work in {out}; wait for it" in refused.told
    assert [file.name for file in out.iterdir()] == [LOCK_FILE]


def test_a_run_among_the_images_is_refused(tmp_path: Path, run: Run) -> None:
    images = tmp_path / "images"
    images.mkdir()
    refused = train(run, images, images / "run")
    assert refused.code == 1
    assert f"error: out={images / 'run'} is in the folder of the images" in refused.told
    assert list(images.iterdir()) == []


def test_missing_training_data_is_refused(tmp_path: Path, run: Run) -> None:
    assert_refused(
        train(run, tmp_path / "none", tmp_path / "run"),
        f"{tmp_path / 'none'} does not exist; give a folder, .zip or .npz of images",
        stages="reading none\n",
    )


def test_an_unknown_space_is_refused(data: Path, tmp_path: Path, run: Run) -> None:
    assert_refused(
        train(run, data, tmp_path / "run", "--space", "huge"),
        "'huge' is neither a space (mbv3-small, mbv3-imagenet-w1.0, "
        "mbv3-imagenet-w1.2, repvgg-small) nor a .json file",
    )


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b'{"name": "x"}'])
def test_a_space_file_that_is_none_is_refused(
    content: bytes, data: Path, tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "space.json"
    path.write_bytes(content)
    outcome = train(run, data, tmp_path / "run", "--space", path)
    assert outcome.code == 1
    assert outcome.told.strip().startswith("error: ")


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "-inf"])
def test_a_scale_that_makes_no_sense_is_refused(
    scale: str, data: Path, tmp_path: Path, run: Run
) -> None:
    outcome = train(run, data, tmp_path / "run", "--epochs-scale", scale)
    assert_refused(
        outcome,
        f"epochs scale {float(scale)} must be a finite number above 0; 1 is the "
        "recipe's own length",
    )


@pytest.mark.parametrize("threads", ["0", "-1", "1025"])
def test_threads_that_make_no_sense_are_refused(
    threads: str, data: Path, tmp_path: Path, run: Run
) -> None:
    outcome = train(run, data, tmp_path / "run", "--threads", threads)
    assert_refused(outcome, f"threads={threads} must be from 1 to 1024")


def test_an_image_that_is_left_out_is_named_as_it_is(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "data"
    for name in ("blue", "[", "[red]"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 7)).save(root / name / "1.png")  # refused, once read
    (root / "[" / "[bold].png").write_bytes(b"x")
    outcome = train(run, root, tmp_path / "run", "--skip-bad")
    assert "left out 1 unreadable images: [/[bold].png\n" in outcome.told


def test_images_that_are_not_square_are_refused(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "wide.npz"
    images: Any = np.zeros((4, 8, 12, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array([0, 1, 0, 1]))
    assert_refused(
        train(run, path, tmp_path / "run"),
        "images are 12×8; training needs square ones: crop them first",
        stages="reading wide.npz\n",
    )


def test_resuming_nothing_is_refused(
    data: Path, space_file: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    outcome = train(
        run, data, out, "--resume", "--space", space_file, "--batch-size", "12"
    )
    assert_refused(
        outcome,
        f"{out} holds no run to resume; start it without --resume, in a new or empty "
        "folder",
    )


@pytest.mark.slow
def test_training_stops_after_a_phase_and_resumes(
    data: Path, space_file: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "[" / "x]"  # markup, to who takes it for that
    options = (
        *("--space", space_file, "--batch-size", "12", "--epochs-scale", "0.05"),
    )
    first = train(run, data, out, *options, "--stop-after", "full")
    again = train(run, data, out, *options, "--stop-after", "kernel", "--resume")
    assert (first.code, again.code) == (0, 0)
    assert (out / "phase-kernel.safetensors").is_file()
    assert f"results in {out}" in again.told


@pytest.mark.slow
def test_training_in_json_is_a_line_per_epoch_and_one_for_the_supernet(
    data: Path,
    space_file: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = partial(finish.finish_supernet, calibration_count=4, sample_count=20)
    monkeypatch.setattr(finish, "finish_supernet", quick)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where bars are drawn
    out = tmp_path / "run"
    options = ("--space", space_file, "--batch-size", "12", "--epochs-scale", "0.05")
    stopped = train(run, data, out, *options, "--stop-after", "kernel", "--json")
    *epochs, last = map(json.loads, stopped.output.splitlines())
    assert (stopped.code, stopped.told, last) == (0, "", {"supernet": None})
    places = [(line["phase"], line["epoch"]) for line in epochs]
    assert places == [("full", 1), ("full", 2), ("kernel", 1)]
    for line in epochs:
        assert line.keys() == {"phase", "epoch", "loss", "validation", "elapsed_s"}
        assert line["validation"].keys() == {"largest", "smallest"}
    finished = train(run, data, out, *options, "--resume", "--json")
    last = json.loads(finished.output.splitlines()[-1])
    assert (finished.code, finished.told) == (0, "")
    assert last == {"supernet": str(out / "supernet")}
    assert read_supernet(out / "supernet").accuracy is not None


def test_a_warning_is_told_without_the_line_that_gave_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn() -> None:
        warnings.warn("few images", stacklevel=1)

    monkeypatch.setattr("ofa_deploy.cli.app", warn)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        main()
    told = capsys.readouterr().err
    assert told.strip() == "warning: few images"
