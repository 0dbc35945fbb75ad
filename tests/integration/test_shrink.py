"""A network of one's own, from training to a verified bundle, on the real runtimes."""

from __future__ import annotations

import copy
import errno
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ofa_deploy import Bundle, DeployError, InfeasibleBudget, specialize
from ofa_deploy.cli import main
from ofa_deploy.cli.shrinking import load_model
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import (
    BundleError,
    DataError,
    MeasurementError,
    SpaceError,
    TraceError,
    TrainingError,
)
from ofa_deploy.evidence import EXPECTED_RATIO, EXPECTED_RATIO_OTHERWISE
from ofa_deploy.exporting import compare_exported
from ofa_deploy.nn.cifar_resnet import Block
from ofa_deploy.nn.onnx_module import write_module
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.report.page import REPORT_FILE
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.shrink import by_channels, device_prices, fitting, methods, to_budget
from ofa_deploy.shrink.by_channels import ByChannels
from ofa_deploy.shrink.device_prices import DevicePrices, TimedForm
from ofa_deploy.shrink.finetuning import finetune, freeze
from ofa_deploy.shrink.fitting import Fitting
from ofa_deploy.shrink.methods import SEARCHING, _executor
from ofa_deploy.shrink.own_network import OwnNetwork, warn_if_by_chance
from ofa_deploy.shrink.pas import LatentOrder
from ofa_deploy.shrink.recipe import Method
from ofa_deploy.shrink.shrinking import Shrinking
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.to_budget import HISTORY_FILE
from ofa_deploy.target import Target
from ofa_deploy.train.checkpoint import read_checkpoint
from ofa_deploy.train.loop import CHECKPOINT_FILE, LoopProgress
from ofa_deploy.train.recipe import Phase, Recipe
from profilers.fresh import FreshMeasurement
from profilers.table import LatencyTable
from tests.support import own_networks, tiny, tiny_session
from tests.support.processes import is_running, waited_for
from tests.support.shrinking import (
    SIZE,
    ResidualNet,
    branched,
    call_of,
    data,
    made_up_prices,
    measured_as,
    measured_prices,
    own_network,
    priced_ms,
    recipe,
    time_quickly,
    train,
    trained_chain,
)

# Few images will do to see that they are used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:candidates are ranked on"),
    pytest.mark.usefixtures("quick_exports"),
]

GENEROUS_MS = 10_000.0


@pytest.fixture(scope="module", autouse=True)
def _quick_timing() -> Iterator[None]:
    """Few runs: how precise the timing is, is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        time_quickly(patch)
        torch.set_num_threads(1)
        yield


def with_infinite_weight() -> nn.Module:
    network = own_networks.Vgg()
    parameter = next(network.parameters())
    with torch.no_grad():
        parameter.view(-1)[0] = float("inf")
    return network


@pytest.fixture(scope="module")
def dense() -> StaticNet:
    return trained_chain()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prices measured by one test serve the others."""
    folder = tmp_path_factory.mktemp("prices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_budget, "cache_folder", lambda: folder)
        yield folder


@pytest.mark.parametrize("backend", ["openvino-cpu", "onnxruntime-cpu", "litert-cpu"])
def test_a_network_that_keeps_its_budget_is_shown_to_and_left_as_it_is(
    backend: str, dense: StaticNet, caches: Path, tmp_path: Path
) -> None:
    bundle = specialize(
        backend,
        model=dense,
        data=data(),
        out=tmp_path / "out",
        latency_ms=GENEROUS_MS,
        recipe=recipe(),
        on_training_progress=lambda stage, progress: pytest.fail(
            "nothing is to be trained"
        ),
    )
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert history["kept"] == history["channels"]
    assert bundle.manifest.binding.met
    assert bundle.check().agrees
    assert "Nothing was trained" in (bundle.path / REPORT_FILE).read_text()


def at_a_steady_time(attempt: Callable[[int], Bundle], caches: Path) -> Bundle:
    """What a call gives whose prices still hold when its file is certified.

    The networks take 20 µs: a shared host that slows down in between has them refused,
    as it should. Then everything is measured anew, twice at most.
    """
    for number in range(2):
        with suppress(InfeasibleBudget):
            return attempt(number)
        for table in caches.glob("own-*.json"):
            table.unlink()
    return attempt(2)


# On OpenVINO so small a network takes as long with a third of its channels.
@pytest.mark.quiet
@pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("onnxruntime-cpu", "pas"),
        ("litert-cpu", "pas"),
        ("onnxruntime-cpu", "legr"),
        ("onnxruntime-cpu", "autoprune"),
    ],
)
def test_a_budget_that_binds_leaves_a_verified_chain_of_fewer_channels(
    backend: str, method: Method, dense: StaticNet, caches: Path, tmp_path: Path
) -> None:
    seen: list[LoopProgress] = []
    before = dense.weights()

    def attempt(number: int) -> Bundle:
        seen.clear()
        return specialize(
            backend,
            model=dense,
            data=data(),
            # The dozen that is held out tells one accuracy from another by chance.
            eval_data=tiny.images(per_class=40, seed=12),
            out=tmp_path / f"out-{number}",
            # Of so small a network much is the call itself, which nothing narrows.
            latency_ms=0.9 * priced_ms(own_network(dense), caches, backend=backend),
            method=method,
            recipe=recipe(),
            on_training_progress=lambda stage, progress: seen.append(progress),
        )

    bundle = at_a_steady_time(attempt, caches)
    manifest = bundle.manifest
    assert manifest.binding.met
    assert manifest.accuracy.kind == "measured"
    beside_ms = manifest.measured.anchor_model_ms
    assert (beside_ms is not None) == manifest.measured.conditions.shared_host
    assert bundle.check().agrees
    assert manifest.config_id.startswith(f"{method}-")
    assert all(np.array_equal(before[k], v) for k, v in dense.weights().items())
    assert any(progress.kept for progress in seen) == (method != "legr")
    assert "Kept channels" in (bundle.path / REPORT_FILE).read_text()
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert sum(history["kept"]) < sum(history["channels"])
    assert all(count >= 4 and count % 4 == 0 for count in history["kept"])
    assert len(history["search"]) == (8 if method == "legr" else 6)
    assert bundle.manifest.cost.mac_count < dense.plan.mac_count
    assert bundle.manifest.accuracy.value > 0.6
    if backend == "litert-cpu":
        return  # its file is no graph of operators that onnx reads
    nodes = onnx.load(bundle.path / "model.onnx").graph.node
    kinds = {node.op_type for node in nodes}
    assert kinds == {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"}


@pytest.mark.parametrize("backend", ["openvino-cpu", "onnxruntime-cpu", "litert-cpu"])
def test_a_network_with_skips_keeps_them(
    backend: str, caches: Path, tmp_path: Path
) -> None:
    network = train(ResidualNet())
    own = own_network(network)
    masked = own.masked()
    counts = [group.channels // 2 for group in own.graph.groups]
    freeze(masked, [torch.arange(count) for count in counts])
    exported = own.export(
        own.remainder(masked, masked.kept()),
        masked.kept(),
        method="pas",
        target=Target(backend=backend, threads=1),
        folder=tmp_path,
    )
    parity = compare_exported(exported, data().images, normalisation=tiny.NORMALISATION)
    assert parity.agrees
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    kinds = {node.op_type for node in nodes}
    assert "Add" in kinds
    assert "BatchNormalization" not in kinds
    bundle = specialize(
        backend,
        model=network,
        data=data(),
        out=tmp_path / "out",
        latency_ms=GENEROUS_MS,
        recipe=recipe(),
    )
    assert bundle.check().agrees
    assert bundle.manifest.space_name == "ResidualNet"


@pytest.mark.quiet
@pytest.mark.parametrize("method", ["pas", "legr", "autoprune", "tas"])
def test_what_is_left_of_a_network_with_skips_is_narrow_while_it_is_trained(
    method: Method, caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = train(ResidualNet())
    own = own_network(network)
    latency_ms = 0.8 * priced_ms(own, caches)
    taught: list[tuple[nn.Module | None, Recipe]] = []

    def noted(*args: Any, **others: Any) -> float:
        taught.append((others["teacher"], others["recipe"]))
        return finetune(*args, **others)

    monkeypatch.setattr(by_channels, "finetune", noted)
    bundle = shrunk(network, method, latency_ms, tmp_path)
    for teacher, learned in taught:  # by the network that was brought
        assert teacher is not None
        same = teacher.state_dict()
        assert all(torch.equal(same[k], v) for k, v in network.state_dict().items())
        published = (4.0, 0.9)  # of tas
        assert method != "tas" or (
            (learned.temperature, learned.teacher_share) == published
        )
        assert (learned.temperature is None) == (method != "tas")
    assert taught
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert sum(history["kept"]) < sum(history["channels"])
    trained = trained_weights(bundle, tmp_path)
    assert trained["inner.weight"].shape[0] == history["kept"][1]


def shrunk(
    network: nn.Module,
    method: Method,
    latency_ms: float,
    folder: Path,
    *,
    reporter: Reporter | None = None,
) -> Bundle:
    """A network shrunk on ONNX Runtime, in a folder of its own."""
    bundle = specialize(
        "onnxruntime-cpu",
        model=network,
        data=data(),
        out=folder / "out",
        latency_ms=latency_ms,
        method=method,
        recipe=recipe(),
        work=folder / "work",
        reporter=reporter,
    )
    assert bundle.manifest.binding.met
    assert bundle.check().agrees
    return bundle


def copied_prices(own: OwnNetwork, caches: Path, folder: Path) -> Path:
    """A table that a test may damage, of prices that were measured for others."""
    priced_ms(own, caches)
    forms = device_prices.timed_forms(own, step=4)
    digest = device_prices._digest(own, forms, step=4)[:12]
    (table,) = caches.glob(f"own-{digest}_*_onnxruntime-cpu-*.json")
    folder.mkdir()
    return Path(shutil.copy(table, folder))


@pytest.mark.quiet
def test_a_call_goes_on_by_its_own_prices_once_the_cache_is_gone(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a container's, whose folder of work is on a disk that stays."""
    network = ResidualNet()
    own = own_network(network)
    copied_prices(own, caches, tmp_path / "cache")
    monkeypatch.setattr(to_budget, "cache_folder", lambda: tmp_path / "cache")
    latency_ms = 0.8 * priced_ms(own, tmp_path / "cache")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(by_channels, "finetune", stop)
    with ThreadPoolExecutor(1) as executor, suppress(KeyboardInterrupt):
        monkeypatch.setattr(methods, "_executor", lambda _: nullcontext(executor))
        shrunk(network, "legr", latency_ms, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    # Neither is anything measured, nor a candidate judged again.
    monkeypatch.setattr(device_prices, "_measure", lambda *_, **__: pytest.fail("anew"))
    monkeypatch.setattr(methods, "_executor", lambda _: nullcontext(Ended()))
    with pytest.raises(KeyboardInterrupt):
        shrunk(network, "legr", latency_ms, tmp_path)


class Called(Exception):
    """With what."""

    def __init__(self, call: Shrinking) -> None:
        super().__init__()
        self.call = call


@pytest.mark.parametrize("backend", ["openvino-cpu", "onnxruntime-cpu", "litert-cpu"])
def test_layers_of_any_shape_are_timed_as_they_are(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = TimedForm.write

    def counted(form: TimedForm, *, target: Target, folder: Path) -> str:
        written.append(str(form.counts.tolist()))
        return write(form, target=target, folder=folder)

    monkeypatch.setattr(TimedForm, "write", counted)
    own = OwnNetwork.of(
        own_networks.randomise(own_networks.OblongNet()),
        resolution=own_networks.SIZE,
        normalisation=tiny.NORMALISATION,
        class_names=tuple("abcde"),
    )
    prices = measured_prices(own, tmp_path, backend=backend)
    names = " ".join(prices.table.blocks)
    for told in ("k1x5-s1x2", "k3x1-s2x1", "k3x3-s1x1-d2x2"):
        assert told in names
    # Once each, in however many processes they are timed.
    assert len(written) == len(set(written)) == len(prices.table.networks)
    whole = next(iter(prices.table.networks.values()))
    fitted_ms = priced_ms(own, tmp_path, backend=backend)
    assert fitted_ms == pytest.approx(whole.quiet_ms, rel=1.0)


@pytest.mark.parametrize("method", ["pas", "legr"])
@pytest.mark.parametrize("own_images", [True, False])
def test_an_accuracy_is_told_by_images_that_chose_nothing(
    own_images: bool,
    method: Method,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of LeGR one half of what is held out ranks, and the other tells."""

    def called(call: Shrinking, **_: object) -> None:
        raise Called(call)

    monkeypatch.setattr(to_budget, "_bundle", called)
    judging = tiny.images(per_class=7, seed=12) if own_images else None
    with pytest.raises(Called) as found:
        specialize(
            "onnxruntime-cpu",
            model=ResidualNet(),
            data=data(),
            eval_data=judging,
            out=tmp_path / "out",
            latency_ms=1.0,
            method=method,
            recipe=recipe(),
        )
    call = found.value.call
    held_out = digests(call.images.validation)
    ranked_on, evaluation = digests(call.ranked_on), digests(call.evaluation)
    if judging is not None:
        assert evaluation == digests(judging)
        assert ranked_on == held_out
    elif method == "legr":
        assert not ranked_on & evaluation
        assert ranked_on | evaluation == held_out
        assert min(len(ranked_on), len(evaluation)) > 0.4 * len(held_out)
    else:
        assert ranked_on == evaluation == held_out


def digests(images: ImageSet) -> set[bytes]:
    found = {image.tobytes() for image in images.images}
    assert len(found) == len(images)
    return found


@pytest.mark.parametrize(
    "changes", [{"origin": "synthetic"}, {"space_sha256": "0" * 64}]
)
def test_prices_that_are_not_those_of_the_network_are_refused(
    changes: dict[str, str], caches: Path, tmp_path: Path
) -> None:
    own = own_network(ResidualNet())
    path = copied_prices(own, caches, tmp_path / "cache")
    replace(LatencyTable.load(path), **changes).save(path)  # type: ignore[arg-type]
    with pytest.raises(MeasurementError) as caught:
        priced_ms(own, path.parent)
    assert str(caught.value) == (
        f"{path} is not what was measured of this network here; delete it, and make "
        "the same call again: prices are measured anew"
    )


def test_damaged_prices_are_told_of_with_their_folder(
    caches: Path, tmp_path: Path
) -> None:
    own = own_network(ResidualNet())
    path = copied_prices(own, caches, tmp_path / "cache")
    path.write_text("")
    with pytest.raises(MeasurementError) as caught:
        priced_ms(own, path.parent)
    assert str(caught.value).startswith(
        f"{path.parent}: {path.name}: this is not valid JSON"
    )
    assert str(caught.value).endswith("call again: prices are measured anew")


@pytest.mark.parametrize(
    ("folders", "kind", "told"),
    [
        (
            {"out": "small", "work": "small/work"},
            BundleError,
            r"^work=.* is in the folder of the bundle, .*, which must be empty",
        ),
        ({"out": "images/small"}, DataError, r"^out=.* is in the folder of the images"),
        (
            {"out": "small", "work": "images/work"},
            DataError,
            r"^work=.* is in the folder of the images",
        ),
    ],
)
def test_folders_in_each_others_way_are_refused_before_anything_is_read(
    folders: dict[str, str], kind: type[DeployError], told: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(kind, match=told):
        specialize(
            "onnxruntime-cpu",
            model=ResidualNet(),
            data=tmp_path / "images",
            latency_ms=1.0,
            method="legr",
            out=tmp_path / folders["out"],
            work=tmp_path / folders["work"] if "work" in folders else None,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.quiet
def test_a_full_disk_is_told_with_where_and_what_next(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ResidualNet()
    latency_ms = 0.8 * priced_ms(own_network(network), caches)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ByChannels, "run", full)
    with pytest.raises(BundleError) as caught:
        shrunk(network, "legr", latency_ms, tmp_path)
    assert str(caught.value) == (
        "what is found cannot be written: [Errno 28] No space left on device. See that "
        f"there is space, and that these can be written: {tmp_path / 'out'}, "
        f"{tmp_path / 'work'}, {caches}, {tempfile.gettempdir()}. Then make the same "
        "call again: it goes on"
    )


def trained_weights(bundle: Bundle, folder: Path) -> Mapping[str, Tensor]:
    """As fine-tuning left them."""
    name = bundle.manifest.config_id
    (checkpoint,) = (folder / "work").glob(f"*/{name}-*/{CHECKPOINT_FILE}")
    return read_checkpoint(checkpoint).weights


class RowOfBlocks(nn.Module):
    """Three blocks whose shortcuts are modules, behind a layer of a few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.stem, self.norm = nn.Conv2d(4, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(16, 16, 16, 1) for _ in range(3)))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(self.few(x)))))
        return cast(Tensor, self.head(x.mean((2, 3))))


@pytest.mark.quiet
def test_depth_and_the_widths_along_shortcuts_are_searched_and_certified(
    caches: Path, tmp_path: Path
) -> None:
    network = train(RowOfBlocks())
    own = searched_by_tas(own_network(network), step=4)
    latency_ms = 0.7 * priced_ms(own, caches)
    stages: list[str] = []

    class Noting(Silent):
        """Notes what begins."""

        def begin(self, stage: str) -> None:
            stages.append(stage)

    bundle = shrunk(network, "tas", latency_ms, tmp_path, reporter=Noting())
    (told,) = [one for one in stages if one.startswith(f"{SEARCHING}: ")]
    assert re.fullmatch(
        rf"{SEARCHING}: about \d+ (s|min)( and \d+ MB of memory more)?; then at most "
        r"\d+ (s|min) to train what is found, and again should its file miss the "
        "budget",
        told,
    )
    assert bundle.manifest.supernet_sha256 == own_network(network).sha256
    page = (bundle.path / REPORT_FILE).read_text()
    assert "Distributions" in page
    assert "kernels take at a time: few.0." in page
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert (history["left_whole"], history["too_narrow"]) == ([], ["few.0"])
    assert history["groups"] == [
        "stem", *(f"blocks.{k}.{c}" for k in range(3) for c in ("first", "second")),
        "blocks[0:3], blocks",
    ]  # fmt: skip
    *widths, depth = history["kept"]
    gone = widths[1 + 2 * depth :]
    assert not any(gone)
    assert all(widths[: 1 + 2 * depth])
    trained = trained_weights(bundle, tmp_path)
    read = [widths[0], *widths[2 : 2 * depth : 2]]
    written = widths[2 : 1 + 2 * depth : 2]
    projected = [f"blocks.{k}.shortcut.0.weight" in trained for k in range(depth)]
    assert projected == [a != b for a, b in zip(read, written, strict=True)]


@pytest.mark.quiet
def test_budgets_above_the_lowest_are_cut_from_one_search(
    caches: Path, tmp_path: Path
) -> None:
    network = train(ResidualNet())
    own = own_network(network)
    full_ms = priced_ms(own, caches)
    judged: list[int] = []

    class Counting(Silent):
        """Counts what is judged."""

        stage = ""

        def begin(self, stage: str) -> None:
            self.stage = stage

        def advance(self, done: int, total: int) -> None:
            if self.stage == SEARCHING:
                judged.append(done)

    for share in (0.75, 0.9):
        bundle = specialize(
            "onnxruntime-cpu",
            model=network,
            data=data(),
            out=tmp_path / f"{share}",
            latency_ms=share * full_ms,
            method="legr",
            recipe=recipe(lowest_share=0.7),
            work=tmp_path / "work",
            reporter=Counting(),
        )
        assert bundle.manifest.binding.met
        assert judged == list(range(1, 9))  # by the first call alone
        history = json.loads((bundle.path / HISTORY_FILE).read_text())
        assert len(history["family"]) == 4
        page = (bundle.path / REPORT_FILE).read_text()
        assert "Other budgets of the same ranking" in page


class Unwritten(ResidualNet):
    """With an operator that is not written as .tflite."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


@pytest.mark.skipif(
    find_spec("litert_torch") is not None, reason="the converter is there"
)
def test_an_operator_that_cannot_be_written_is_told_before_anything_is_timed(
    caches: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeployError, match=r"Sin \(.*litert-torch"):
        specialize(
            "litert-cpu",
            model=Unwritten(),
            data=data(),
            out=tmp_path / "out",
            latency_ms=GENEROUS_MS,
            recipe=recipe(),
        )
    assert not list(caches.glob("own-*.journal"))


def test_a_plan_for_other_images_is_refused(dense: StaticNet) -> None:
    with pytest.raises(DataError, match=f"for images of {SIZE} pixels"):
        OwnNetwork.of(
            dense,
            resolution=SIZE + 4,
            normalisation=tiny.NORMALISATION,
            class_names=tiny.CLASS_NAMES,
        )


@pytest.mark.parametrize("backend", ["openvino-cpu", "onnxruntime-cpu", "litert-cpu"])
def test_a_compressed_file_is_as_small_as_is_asked_for(
    backend: str, caches: Path, tmp_path: Path
) -> None:
    network = train(ResidualNet())
    before = [p.detach().clone() for p in network.parameters()]
    limit = 30_000
    bundle = specialize(
        backend,
        compressed_bytes=limit,
        model=network,
        method="autoprune-weights",
        data=data(),
        out=tmp_path / "bundle",
        recipe=recipe(),
    )
    model = bundle.path / bundle.manifest.model_file
    files = [model, model.with_suffix(".bin")]
    sent = sum(len(lzma.compress(f.read_bytes())) for f in files if f.is_file())
    verdict = bundle.manifest.binding
    assert (verdict.constraint, verdict.bound) == ("compressed", sent)
    assert 0.9 * limit <= sent <= limit
    assert bundle.manifest.parity.agrees
    assert bundle.manifest.accuracy.value > 0.6
    assert all(
        torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)
    )
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert sum(history["kept"]) < 0.5 * sum(history["channels"])
    if backend != "litert-cpu":  # whose file onnx does not read
        weights = onnx.load(bundle.path / "model.onnx").graph.initializer
        zeros = [float((onnx.numpy_helper.to_array(w) == 0).mean()) for w in weights]
        assert max(zeros) > 0.5
    page = (bundle.path / REPORT_FILE).read_text()
    assert "Kept weights" in page
    assert "of all layers together" in page


def test_a_chain_of_branches_is_as_small_as_is_asked_for_on_litert(
    dense: StaticNet, caches: Path, tmp_path: Path
) -> None:
    limit = 60_000
    bundle = specialize(
        "litert-cpu",
        compressed_bytes=limit,
        model=dense,
        method="autoprune-weights",
        data=data(),
        out=tmp_path / "bundle",
        recipe=recipe(),
    )
    model = bundle.path / bundle.manifest.model_file
    assert len(lzma.compress(model.read_bytes())) <= limit
    assert bundle.manifest.parity.agrees
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert sum(history["kept"]) < 0.8 * sum(history["channels"])


def test_a_compressed_file_that_is_small_enough_is_left_as_it_is(
    caches: Path, tmp_path: Path
) -> None:
    bundle = specialize(
        "onnxruntime-cpu",
        compressed_bytes=10**7,
        model=ResidualNet().eval(),
        method="autoprune-weights",
        data=data(),
        out=tmp_path / "bundle",
        recipe=recipe(),
    )
    history = json.loads((bundle.path / HISTORY_FILE).read_text())
    assert history["kept"] == history["channels"]
    assert history["search"] == []


@pytest.mark.parametrize(
    ("limits", "error", "told"),
    [
        ({"latency_ms": 1.0}, SpaceError, "give compressed_bytes"),
        ({"compressed_bytes": 300}, InfeasibleBudget, "Ask for at least"),
        (
            {"compressed_bytes": 30_000, "latency_ms": 1e-6},
            InfeasibleBudget,
            "latency .* asked for 1e-06 ms",
        ),
    ],
)
def test_what_fewer_weights_do_not_mend_is_refused(
    limits: dict[str, Any],
    error: type[Exception],
    told: str,
    caches: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=told):
        specialize(
            "onnxruntime-cpu",
            model=ResidualNet().eval(),
            method="autoprune-weights",
            data=data(),
            out=tmp_path / "bundle",
            recipe=recipe(),
            **limits,
        )
    assert not (tmp_path / "bundle").exists()


# -- what is timed corrects what is chosen ---------------------------------------------


def fitting_of(network: nn.Module, work: Path) -> Fitting:
    """To three fifths of what a network is priced at, by made-up prices."""
    call, prices = call_of(network, work, budget_share=0.6)
    own = call.own
    masked = own.masked()
    generator = torch.Generator().manual_seed(0)
    for mask in masked.masks:
        mask.latent.data = torch.rand(len(mask.latent), generator=generator)
    order = LatentOrder(
        latents=masked.latents(),
        step=4,
        floors=call.recipe.floors(own.graph, method="pas", step=4),
    )
    return call.fitting(masked, order, prices, floors=order.floors)


def test_files_are_timed_alone_where_nobody_else_runs(
    dense: StaticNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = beside(dense, tmp_path, monkeypatch, shared_host=False, now_ms=3.0)
    assert found.anchor_model is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("now_ms", "level_ms"), [(2.09, 2.0), (2.2, 2.2), (1.8, 1.8)])
def test_files_are_held_against_one_level_on_shared_hosts(
    now_ms: float,
    level_ms: float,
    dense: StaticNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table's, of 2 ms; or that of now, where the machine is another one."""
    found = beside(dense, tmp_path, monkeypatch, shared_host=True, now_ms=now_ms)
    assert found.anchor_model is not None
    assert found.anchor_model.quiet_ms == level_ms
    assert found.anchor_model.path.is_file()


def beside(
    network: nn.Module,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    shared_host: bool,
    now_ms: float,
) -> DevicePrices:
    """Prices whose table says 2 ms of the whole network, which takes `now_ms` now."""
    own = own_network(network)
    prices = made_up_prices(own)
    names = device_prices.calibration_counts(own, step=prices.step)
    networks = {name: tiny.measurement(name, 2.0) for name in names}
    prices = replace(prices, table=replace(prices.table, networks=networks))
    conditions = replace(tiny.CONDITIONS, shared_host=shared_host)
    monkeypatch.setattr(device_prices, "read_conditions", lambda: conditions)

    def measure(*_: Any, **__: Any) -> FreshMeasurement:
        return tiny_session.fresh(now_ms)

    monkeypatch.setattr(device_prices, "measure_in_fresh_process", measure)
    target = Target(backend="onnxruntime-cpu", threads=1)
    return prices.beside(own, target=target, folder=folder, reporter=Silent())


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
def test_a_structure_just_below_the_budget_is_found_whatever_prices_say(
    factor: float,
    dense: StaticNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fitting, "NEAR_BUDGET", (0.9, 0.99))
    monkeypatch.setattr(fitting, "AIMED_SHARE", 0.978)
    measured_as(monkeypatch, factor=factor)
    call, memory = fitting_of(dense, tmp_path), tmp_path / "chosen.json"
    found = call.widest(memory=memory)
    assert 0.8 < found.used_share <= 1.0
    assert isinstance(call.order, LatentOrder)
    for latent, kept in zip(call.order.latents, found.kept, strict=True):
        assert latent[kept].min() >= latent.topk(len(kept)).values.min()
    # A call that was killed goes on with what was chosen.
    again = fitting_of(dense, tmp_path)
    assert again.widest(memory=memory).counts == found.counts
    assert len(again.timed) == 1
    # However that is timed now, within what moments differ by.
    measured_as(monkeypatch, factor=1.02 * factor)
    assert fitting_of(dense, tmp_path).widest(memory=memory).counts == found.counts
    # Unless the device has become slower since.
    measured_as(monkeypatch, factor=1.5 * factor)
    slower = fitting_of(dense, tmp_path).widest(memory=memory)
    assert slower.used_share <= 1.0
    assert sum(slower.counts) < sum(found.counts)
    # A file that misses after fine-tuning is followed by a narrower one.
    memory = tmp_path / "narrower.json"
    narrower = call.narrower(found, used_share=1.5, memory=memory)
    assert narrower is not None
    assert narrower.used_share <= 1.0
    assert sum(narrower.counts) < sum(found.counts)
    # Whatever was measured of that one: a call that was killed goes on with the same.
    resumed = fitting_of(dense, tmp_path)
    same = resumed.narrower(found, used_share=1.2, memory=memory)
    assert same is not None
    assert same.counts == narrower.counts


def test_a_call_that_goes_on_asks_for_the_same_share(
    dense: StaticNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, progress: LoopProgress) -> None:
        raise KeyboardInterrupt

    # By its price the whole network keeps the budget; by its file it does not.
    for factor in (1.3, 1.7):
        call, prices = call_of(dense, tmp_path / "work", budget_share=1.1)
        measured_as(monkeypatch, factor=factor)
        with ExitStack() as stack:
            shrinking = ByChannels(
                call=replace(call, on_progress=stop),
                method="pas",
                prices=prices,
                stack=stack,
            )
            with pytest.raises(KeyboardInterrupt):
                shrinking.run()
    assert len(list((tmp_path / "work").glob("*/search"))) == 1


def test_a_ranking_on_other_images_is_another_one(
    dense: StaticNet, tmp_path: Path
) -> None:
    call, prices = call_of(dense, tmp_path, budget_share=0.5)
    names = set()
    for ranked_on in (data(), data(), tiny.images(per_class=3, seed=1)):
        with ExitStack() as stack:
            shrinking = ByChannels(
                call=replace(call, ranked_on=ranked_on),
                method="legr",
                prices=prices,
                stack=stack,
            )
            names.add(shrinking._name(0.5))
    assert len(names) == 2


def test_how_what_is_found_is_trained_decides_no_search(
    dense: StaticNet, tmp_path: Path
) -> None:
    call, prices = call_of(dense, tmp_path, budget_share=0.5)
    slower = replace(call.recipe.finetune, momentum=0.5)
    other = replace(call, recipe=replace(call.recipe, finetune=slower, distill=False))
    assert other.name(prices) == call.name(prices)
    named = {
        one.tuned_name("found")
        for one in (call, other, replace(call, recipe=recipe(distill=False)))
    }
    assert len(named) == 3
    narrow = replace(call, recipe=recipe(floor=8))
    assert narrow.name(prices) != call.name(prices)


def test_what_was_frozen_is_trained_and_the_users_network_is_left_alone() -> None:
    network = branched().requires_grad_(False)
    own = own_network(network)
    assert all(parameter.requires_grad for parameter in own.module.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_half_precision_is_shrunk_as_float32() -> None:
    own = own_network(branched().half())
    kinds = {p.dtype for p in own.module.parameters()}
    assert kinds == {torch.float32}


def test_files_do_not_tell_whose_lines_they_come_from(tmp_path: Path) -> None:
    target = Target(backend="onnxruntime-cpu", threads=1)
    name = write_module(
        ResidualNet().eval(), resolution=SIZE, target=target, folder=tmp_path
    )
    content = (tmp_path / name).read_bytes()
    for told in (Path(__file__).name, "forward", "nn_module", "fx_node"):
        assert told.encode() not in content, told


def test_a_limit_that_only_the_file_tells_is_asked_before_the_search(
    dense: StaticNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_as(monkeypatch, factor=1.0)
    call, prices = call_of(dense, tmp_path, budget_share=0.9, size_bytes=1000)
    told = r"nearest has a size of [\d,]+ bytes, and 1,000 bytes is asked for"
    with ExitStack() as stack:
        shrinking = ByChannels(call=call, method="pas", prices=prices, stack=stack)
        with pytest.raises(InfeasibleBudget, match=told):
            shrinking.run()
    assert not list(tmp_path.glob("*/search"))


def test_a_ranking_below_its_safeguards_is_refused_before_it_is_learned(
    dense: StaticNet, tmp_path: Path
) -> None:
    call, prices = call_of(dense, tmp_path, budget_share=0.9)
    low = replace(call.recipe, lowest_share=0.001)
    with ExitStack() as stack:
        shrinking = ByChannels(
            call=replace(call, recipe=low), method="legr", prices=prices, stack=stack
        )
        with pytest.raises(SpaceError, match=r"lowest_share=0\.001.* give at least"):
            shrinking.run()
    assert not list(tmp_path.glob("*/search"))


def test_a_chain_of_branches_is_not_searched_by_tas(dense: StaticNet) -> None:
    with pytest.raises(TraceError, match="take pas, legr or autoprune"):
        searched_by_tas(own_network(dense))


@pytest.mark.parametrize(
    ("floor", "step", "least"), [(8, 16, 16), (8, 3, 9), (8, 4, 8)]
)
def test_floors_are_multiples_of_the_runtimes_step(
    floor: int, step: int, least: int
) -> None:
    assert recipe(floor=floor).aligned_floor(step) == least


@pytest.mark.parametrize("part", ["search", "finetune"])
@pytest.mark.parametrize("epochs", [(0,), (1, 1)])
def test_a_recipe_whose_trainings_are_not_of_one_phase_is_refused(
    part: str, epochs: tuple[int, ...]
) -> None:
    phases = tuple(
        Phase(name=f"{k}", epochs=count, peak_learning_rate=0.1, distill=False)
        for k, count in enumerate(epochs)
    )
    other = replace(recipe().search, phases=phases)
    with pytest.raises(SpaceError, match=f"{part} has phases of .* give one phase"):
        recipe(**{part: other})


def test_floors_that_leave_nothing_to_remove_refuse_what_the_whole_misses(
    dense: StaticNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, prices = call_of(dense, tmp_path, budget_share=1.1)
    call = replace(call, recipe=replace(call.recipe, floor=1000))
    measured_as(monkeypatch, factor=1.3)
    with ExitStack() as stack:
        shrinking = ByChannels(call=call, method="pas", prices=prices, stack=stack)
        with pytest.raises(InfeasibleBudget, match="does not keep all limits"):
            shrinking.run()
    assert not list(tmp_path.glob("*/search"))


def test_nothing_is_narrower_than_the_floors(
    dense: StaticNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_as(monkeypatch, factor=100.0)
    call = fitting_of(dense, tmp_path)
    least = call.time(call.floors)
    memory = tmp_path / "narrower.json"
    assert call.narrower(least, used_share=2.0, memory=memory) is None


# What a certified bound is expected to be of a price, by the percentile.
RATIOS = {50: EXPECTED_RATIO, 90: EXPECTED_RATIO_OTHERWISE}


def test_a_budget_that_no_form_keeps_is_refused(
    dense: StaticNet, caches: Path, tmp_path: Path
) -> None:
    told: list[float] = []
    for percentile in (50, 90):  # slow runs take more room
        with pytest.raises(InfeasibleBudget, match="Ask for at least") as caught:
            specialize(
                "onnxruntime-cpu",
                model=dense,
                data=data(),
                out=tmp_path / "out",
                latency_ms=1e-4,
                percentile=percentile,
                recipe=recipe(),
            )
        told.append(caught.value.fastest_ms or 0.0)
        assert f"still priced at {told[-1] / RATIOS[percentile]:.4g} ms" in str(
            caught.value
        )
    assert told[1] / told[0] == pytest.approx(RATIOS[90] / RATIOS[50])
    assert told[0] > 1e-4
    assert not (tmp_path / "out").exists()


# -- the command -----------------------------------------------------------------------

NET = """
from dataclasses import replace
from ofa_deploy.families import repvgg
from ofa_deploy.nn.static import StaticNet
from ofa_deploy.plan import lower

def build():
    space = repvgg.small(class_count=3)
    stages = (repvgg.stage(32, depths=(1,)), repvgg.stage(48, depths=(1,)))
    stem = replace(space.stem, out_channels=16)
    space = replace(space, resolutions=(12,), stem=stem, stages=stages)
    return StaticNet(lower(space, space.largest()))
"""


def test_the_command_shrinks_a_network_of_a_file(
    dense: StaticNet,
    caches: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "net.py").write_text(NET)
    tensors = {name: t.contiguous() for name, t in dense.state_dict().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    images = data()
    np.savez(
        tmp_path / "data.npz",
        images=images.images,
        labels=images.labels,
        class_names=np.array(images.class_names),
    )
    words = ["--model", f"{tmp_path / 'net.py'}:build", "--latency-ms", "1000"]
    words += ["--weights", str(tmp_path / "net.safetensors")]
    words += ["--data", str(tmp_path / "data.npz"), "--device", "onnxruntime-cpu"]
    words += ["--search-epochs", "1", "--finetune-epochs", "1"]
    words += ["--batch-size", "18", "--out", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr("sys.argv", ["ofa-deploy", "shrink", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["config_id"].startswith("pas-")
    assert Bundle.open(tmp_path / "out").check().agrees


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--latency-ms 1 --percentile 51", "percentile=51 is not one of"),
        ("--latency-ms 1 --size-bytes 0", "size_bytes=0 makes no sense"),
        ("--latency-ms 1 --peak-memory-mb 0", "peak_memory_mb=0.0 makes no sense"),
        ("--latency-ms 1 --rate-hz 5000", "runs would pile up"),
        ("--latency-ms 1 --sustained-s -1", "sustained_s=-1.0 makes no sense"),
        ("--latency-ms 1 --threads 0", "must be a whole number from 1 to"),
    ],
)
def test_the_command_takes_every_limit(
    words: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "net.py").write_text(NET)
    where = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    model = ["--model", f"{tmp_path / 'net.py'}:build", *words.split()]
    monkeypatch.setattr("sys.argv", ["ofa-deploy", "shrink", *model, *where])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code != 0
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one name are other modules in every test."""
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in ("net", "of_mine", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)


MINE = """
from torch import nn
from beside import WIDTH

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file with a class of its own, and another one beside it."""
    (tmp_path / "of_mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("WIDTH = 40")
    return tmp_path / "of_mine.py"


def test_other_processes_judge_a_network_of_a_file(mine: Path) -> None:
    network = load_model(f"{mine}:Mine", None)
    with _executor(None) as executor:
        other = executor.submit(copy.deepcopy, network).result()
    assert type(other) is type(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_processes_that_judge_end_with_what_they_judge_for() -> None:
    """What is queued is for nobody once the call has failed, or was interrupted."""
    with suppress(KeyboardInterrupt), _executor(None) as executor:
        judge = executor.submit(os.getpid).result()
        for _ in range(8):
            executor.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert waited_for(lambda: not is_running(judge), limit_s=60)


def test_a_file_with_the_name_of_another_module_is_refused(mine: Path) -> None:
    path = mine.with_name("json.py")
    path.write_text(MINE)
    with pytest.raises(DataError, match=r"has the name of another module.*rename it"):
        load_model(f"{path}:Mine", None)


class Ended(Executor):
    """Processes that the system has killed."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise BrokenExecutor("A process was terminated abruptly")


@pytest.mark.quiet
def test_processes_that_end_are_told_of(caches: Path, tmp_path: Path) -> None:
    network = ResidualNet()
    with pytest.raises(TrainingError, match="judges candidates ended: A process was"):
        specialize(
            "onnxruntime-cpu",
            model=network,
            data=data(),
            out=tmp_path / "out",
            latency_ms=0.8 * priced_ms(own_network(network), caches),
            method="legr",
            recipe=recipe(),
            executor=Ended(),
        )


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    save_file(ResidualNet().state_dict(), tmp_path / "net.safetensors")
    name = f"{tmp_path / 'net.py'}:build"
    with pytest.raises(DataError, match="weights of another network"):
        load_model(name, tmp_path / "net.safetensors")
    (tmp_path / "net.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot be read as \.safetensors"):
        load_model(name, tmp_path / "net.safetensors")


# -- bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        (
            {"method": "magic"},
            SpaceError,
            "method='magic'; give one of pas, legr, autoprune, tas, autoprune-weights",
        ),
        (
            {"latency_ms": None, "min_accuracy": 0.5},
            SpaceError,
            "no latency is asked for; pas shrinks a network to one: give latency_ms",
        ),
        (
            {"latency_ms": None, "method": "autoprune-weights"},
            SpaceError,
            "or, for autoprune-weights, compressed_bytes",
        ),
        (
            {"method": "autoprune-weights"},
            SpaceError,
            "and a network no faster: give compressed_bytes",
        ),
        (
            {"model": with_infinite_weight()},
            DataError,
            r"features\.0\.weight is not finite",
        ),
        (
            {"normalisation": Normalisation(mean=(0.5,) * 3, std=(0.2,) * 3)},
            DataError,
            "which are of pixels of 0 to 1",
        ),
        ({"seed": 3}, SpaceError, "seed: these are for supernets"),
        ({"executor": Executor()}, SpaceError, "executor: these are for method='legr'"),
        ({"data": None}, DataError, "give labelled images as data="),
        ({"device": "abacus"}, DeployError, "device 'abacus' is unknown"),
    ],
    ids=[
        "method",
        "latency",
        "nothing",
        "weights",
        "numbers",
        "pixels",
        "seed",
        "executor",
        "data",
        "device",
    ],
)
def test_what_cannot_be_shrunk_is_refused_with_a_reason(
    changes: dict[str, Any],
    kind: type[Exception],
    told: str,
    dense: StaticNet,
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {
        "device": "onnxruntime-cpu",
        "model": dense,
        "data": data(),
        "out": tmp_path / "out",
        "latency_ms": GENEROUS_MS,
        "recipe": recipe(),
        **changes,
    }
    with pytest.raises(kind, match=told):
        specialize(**given)
    assert not (tmp_path / "out").exists()


def test_a_network_that_knows_nothing_of_the_images_is_warned_of(
    dense: StaticNet,
) -> None:
    images = tiny.images(per_class=100)
    names = images.class_names
    warn_if_by_chance(own_network(dense), images)
    # Outputs in another order than the folders' names.
    moved = replace(images, labels=(images.labels + 1) % len(names))
    with pytest.warns(UserWarning, match=rf"which must be {', '.join(names)}, at the"):
        warn_if_by_chance(own_network(dense), moved)
    few = moved.take(np.arange(len(moved)) < 50)
    warn_if_by_chance(own_network(dense), few)  # that tells nothing
    # Whoever always says the most frequent class knows nothing.
    constant = copy.deepcopy(dense)
    with torch.no_grad():
        *_, weight, bias = constant.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    mostly = (images.labels == 1) | (np.arange(len(images)) < 30)
    with pytest.warns(UserWarning, match=r"33\.3% of 120 .* a guess 33\.3%"):
        warn_if_by_chance(own_network(constant), images.take(mostly))


def test_a_call_warns_of_such_a_network_before_anything_is_measured(
    dense: StaticNet, tmp_path: Path
) -> None:
    images = tiny.images(per_class=400)
    moved = replace(images, labels=(images.labels + 1) % 3)
    with pytest.raises(UserWarning, match="nothing to keep of what it knows"):
        specialize(
            "onnxruntime-cpu",
            model=dense,
            data=moved,
            out=tmp_path / "out",
            latency_ms=GENEROUS_MS,
            recipe=recipe(),
            normalisation=tiny.NORMALISATION,
        )


def test_data_of_another_number_of_classes_is_refused(
    dense: StaticNet, tmp_path: Path
) -> None:
    images = data()
    fewer = images.take(images.labels < 2)
    fewer = replace(fewer, class_names=fewer.class_names[:2])
    with pytest.raises(DataError, match=r"outputs of shape \(1, 3\).* 2 classes"):
        specialize(
            "onnxruntime-cpu",
            model=dense,
            data=fewer,
            out=tmp_path / "out",
            latency_ms=GENEROUS_MS,
            recipe=recipe(),
        )


def test_a_network_without_removable_channels_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 3))
    with pytest.raises(TraceError, match="no channels that could be removed"):
        specialize(
            "onnxruntime-cpu",
            model=network,
            data=data(),
            out=tmp_path / "out",
            latency_ms=GENEROUS_MS,
            recipe=recipe(),
        )


def test_what_belongs_to_a_network_is_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="data: these are for a network of your own"):
        specialize(  # type: ignore[call-overload]
            "onnxruntime-cpu", out=tmp_path, latency_ms=1.0, data=data()
        )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nothing", "names no network"),
        ("net.py:missing", "cannot be built: AttributeError"),
        ("net.py:number", "gives int"),
        ("net.py:broken", "cannot be built: ZeroDivisionError"),
    ],
)
def test_a_file_that_builds_no_network_is_refused(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(
        "def number():\n    return 1\ndef broken():\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=told):
        load_model(text, None)
