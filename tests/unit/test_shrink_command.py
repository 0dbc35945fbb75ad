"""What the words of `ofa-deploy shrink` become, and what it shows meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ofa_deploy.cli.shrinking import drawn, normalisation
from ofa_deploy.errors import DataError
from ofa_deploy.train.loop import LoopProgress
from tests.support.called import given_by

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 3))
"""


@pytest.fixture
def given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Any]]:
    """What a call is given by a command's words, besides the network and the data."""
    (tmp_path / "net_of_words.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(words: str) -> dict[str, Any]:
        always = "--model net_of_words:build --data images --out out"
        return given_by(["shrink", *always.split(), *words.split()], monkeypatch)

    return run


def test_words_become_what_the_call_takes(
    given: Callable[[str], dict[str, Any]],
) -> None:
    found = given(
        "--latency-ms 2 --percentile 95 --size-bytes 9 --peak-memory-mb 3 --rate-hz 30 "
        "--sustained-s 4 --threads 2 --compressed-bytes 5 --min-accuracy 0.5 "
        "--device openvino-cpu --method legr --work here --eval-data more "
        "--mean 0.5,0.4,0.2 --std 0.2,0.2,0.4"
    )
    expected = {
        "device": "openvino-cpu",
        "method": "legr",
        "data": Path("images"),
        "out": Path("out"),
        "latency_ms": 2.0,
        "percentile": 95,
        "size_bytes": 9,
        "compressed_bytes": 5,
        "peak_memory_mb": 3.0,
        "min_accuracy": 0.5,
        "rate_hz": 30.0,
        "sustained_s": 4.0,
        "threads": 2,
        "work": Path("here"),
        "eval_data": Path("more"),
    }
    assert {name: found[name] for name in expected} == expected
    assert found["normalisation"].mean == pytest.approx((127.5, 102.0, 51.0))
    assert found["normalisation"].std == pytest.approx((51.0, 51.0, 102.0))
    assert type(found["model"]).__name__ == "Sequential"


def test_words_become_the_recipe(given: Callable[[str], dict[str, Any]]) -> None:
    plain = given("--latency-ms 2")
    assert plain["normalisation"] is None
    assert plain["recipe"].distill
    found = given(
        "--latency-ms 2 --search-epochs 3 --finetune-epochs 7 --batch-size 18 "
        "--evaluations 12 --lowest-share 0.4 --no-distill"
    )["recipe"]
    assert [phase.epochs for phase in found.search.phases] == [3]
    assert [phase.epochs for phase in found.finetune.phases] == [7]
    assert (found.search.batch_size, found.finetune.batch_size) == (18, 18)
    assert (found.legr.evaluations, found.legr.population) == (12, 12)
    assert found.lowest_share == 0.4
    assert not found.distill


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("0.5,0.5,0.5", None),
        (None, "0.5,0.5,0.5"),
        ("0.5,0.5", "0.5,0.5,0.5"),
        ("125,122,115", "64,61,66"),
        ("0.5,0.5,0.5", "0,0.5,0.5"),
        ("a,b,c", "0.5,0.5,0.5"),
    ],
)
def test_what_is_no_normalisation_is_refused(mean: str | None, std: str | None) -> None:
    with pytest.raises(DataError, match="give both --mean and --std, each as three"):
        normalisation(mean, std)


def test_what_each_group_keeps_is_shown_as_it_goes() -> None:
    progress = LoopProgress(
        epoch=2,
        epochs=10,
        step=15,
        steps=100,
        loss=0.5,
        images_per_s=1234.0,
        eta_s=60.0,
        accuracy=0.875,
        kept={"stem": (12, 32), "blocks.0": (48, 48)},
        remarks=("stem collapsed and was opened again",),
    )
    console = Console(width=100, record=True)
    console.print(drawn(progress))
    shown = console.export_text()
    for part in (
        "epoch 2/10",
        "loss 0.500",
        "87.50%",
        "1234 images/s",
        "stem collapsed and was opened again",
        "12/32",
        "48/48",
    ):
        assert part in shown
