"""What a bundle says of its accuracy, its latency, and where it was made."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.assembly import (
    ANCHOR_SAMPLES_FILE,
    SAMPLES_FILE,
    assemble_bundle,
    measured_latency,
    predicted_accuracy,
)
from ofa_deploy.constraints import Constraints
from ofa_deploy.verify import ParityReport, accuracy_interval
from profilers import Visit
from profilers.backends.base import installed_version
from profilers.stats import percentile_ms
from tests.support import made_up_bench, tiny
from tests.support.tiny_session import fresh


def test_a_package_under_another_name_loses_no_bundle() -> None:
    """Such as onnxruntime-openvino, whose module is imported as any other's."""
    assert installed_version("no-such-distribution") == "unknown"
    assert installed_version("numpy") == version("numpy")


# -- accuracy --------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.data())
def test_an_interval_holds_its_accuracy_and_ends_at_0_and_1(
    count: int, data: st.DataObject
) -> None:
    value = data.draw(st.integers(0, count)) / count
    low, high = accuracy_interval(value, count)
    assert 0 <= low <= value <= high <= 1
    assert low < high  # however many were right, so few do not tell


@pytest.mark.parametrize("accuracy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [50, 2000])
def test_an_interval_holds_the_true_accuracy_as_often_as_it_says(
    accuracy: float, count: int
) -> None:
    right = np.random.default_rng(0).binomial(count, accuracy, 4000)
    ends = [accuracy_interval(n / count, count) for n in right]
    held = np.mean([low <= accuracy <= high for low, high in ends])
    # A count is no continuous number; of a rare error in few images most steps.
    assert 0.91 <= held <= 0.99


def test_a_known_interval() -> None:
    low, high = accuracy_interval(0.9, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_a_predicted_accuracy_is_within_what_its_predictor_is_off_by() -> None:
    stored = tiny.stored()
    predictor = replace(tiny.predictor(), residual_std=0.01)
    config = tiny.SPACE.smallest()
    bench = made_up_bench.MadeUpBench(
        predictors=made_up_bench.chooser().predictors,
        constraints=Constraints(latency_ms=1e3),
        quiet=lambda config: 1.0,
    )
    exported = bench.certify(config).exported
    found = predicted_accuracy(replace(stored, accuracy=predictor), exported)
    value = float(predictor.predict(tiny.SPACE.encode(config)[None])[0])
    assert 0.1 < value < 0.9
    assert found.kind == "predicted"
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx((value - 0.0196, value + 0.0196))


# -- latency ---------------------------------------------------------------------------


def visits(*samples_ns: int) -> tuple[Visit, ...]:
    (visit,) = fresh(1.0).visits
    return (replace(visit, samples_ns=samples_ns),)


def test_a_manifest_keeps_the_percentiles_of_all_runs() -> None:
    samples_ns = list(range(1_000_000, 1_000_700))
    measurement = replace(fresh(1.0), visits=visits(*samples_ns))
    found = measured_latency(measurement)
    assert found.p99_ms == percentile_ms(samples_ns, 99)
    assert found.p99_ms is not None
    assert found.sample_count == 700
    assert measured_latency(replace(measurement, visits=visits(1))).p99_ms is None


def test_a_bundle_keeps_the_raw_runs_of_both_models(tmp_path: Path) -> None:
    bench = made_up_bench.MadeUpBench(
        predictors=made_up_bench.chooser().predictors,
        constraints=Constraints(latency_ms=1e3),
        quiet=lambda config: 1.0,
    )
    network = bench.certify(tiny.SPACE.smallest())
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.onnx").write_bytes(b"a model")
    own, anchors = visits(5, 6, 7), visits(8, 9)
    network = replace(
        network,
        exported=replace(network.exported, folder=tmp_path / "files"),
        measurement=replace(network.measurement, visits=own, anchor_visits=anchors),
    )
    bundle = assemble_bundle(
        tmp_path / "out",
        network,
        parity=ParityReport(
            image_count=1, max_relative_error=0.0, top1_agreement=1.0, tolerance=1e-4
        ),
        source=replace(tiny.stored(), sha256="0" * 64),
        extra_files={},
    )
    for name, kept in ((SAMPLES_FILE, own), (ANCHOR_SAMPLES_FILE, anchors)):
        assert name in bundle.manifest.files
        (content,) = json.loads((bundle.path / name).read_text())
        assert tuple(content["samples_ns"]) == kept[0].samples_ns
