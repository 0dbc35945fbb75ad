"""The RepVGG family as a once-for-all supernet: trained, finished, specialised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from ofa_deploy import Specializer, device_bench, drift
from ofa_deploy.families import repvgg
from ofa_deploy.report.page import REPORT_FILE
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.train.finish import finish_supernet
from ofa_deploy.train.progressive import ProgressiveTraining, RunSettings
from ofa_deploy.train.recipe import Phase, Recipe
from profilers.backends import get_backend
from profilers.device import this_device
from tests.support import tiny, train_tiny
from tests.support.quick import QUICK

BACKEND = "onnxruntime-cpu"
RECIPE = Recipe(
    phases=(
        Phase(name="full", epochs=2, peak_learning_rate=0.05, distill=False),
        Phase(
            name="width",
            epochs=1,
            peak_learning_rate=0.02,
            subnet_count=2,
            sandwich=True,
            depth_choices=2,
            expand_choices=3,
            sorted_expands=1,
        ),
    ),
    batch_size=12,
    crop_padding=2,
)
SPACE = replace(
    repvgg.small(class_count=3),
    name="tiny-repvgg",
    resolutions=(8, 12),
    stem=replace(repvgg.small().stem, out_channels=8),
    stages=(repvgg.stage(16, depths=(1, 2)), repvgg.stage(24, depths=(1,))),
)


@pytest.fixture(scope="module", autouse=True)
def _quick_timing() -> Iterator[None]:
    """Few runs: how precise the timing is, is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "CONFIRM_SETTINGS", QUICK)
        patch.setattr(device_bench, "CERTIFY_SETTINGS", QUICK)
        patch.setattr(device_bench, "CERTIFY_PROCESSES", 1)
        yield


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> StoredSupernet:
    folder = tmp_path_factory.mktemp("run") / "run"
    training = ProgressiveTraining(
        space=SPACE,
        data=train_tiny.data(),
        recipe=RECIPE,
        settings=RunSettings(folder=folder),
        bf16=False,
    )
    training.run()
    return finish_supernet(
        folder,
        training=training.images.training,
        validation=training.images.validation,
        backend=get_backend(BACKEND),
        threads=1,
        seed=0,
        calibration_count=30,
        sample_count=12,
    )


def test_a_network_of_it_becomes_a_bundle_of_plain_convolutions(
    supernet: StoredSupernet, tmp_path: Path
) -> None:
    runner = get_backend(BACKEND)
    table = tiny.latency_table(
        SPACE,
        networks=tiny.random_configs(SPACE, 12),
        network_ms=lambda config: 1.0,
        device=this_device(accelerator=runner.accelerator()),
        runtime=runner.runtime(threads=1),
        origin="measured",
    )
    path = tmp_path / "table.json"
    table.save(path)
    session = Specializer(BACKEND, supernet=supernet, table=path, on_drift="accept")
    bundle = session.specialize(10_000.0, out=tmp_path / "out")
    assert bundle.check().agrees
    assert "Where the milliseconds go" in (bundle.path / REPORT_FILE).read_text()
    kinds = {node.op_type for node in onnx.load(bundle.model_path).graph.node}
    assert kinds == {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"}
