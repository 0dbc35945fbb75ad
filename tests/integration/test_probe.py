"""Probes of the real runtimes say what everybody knows of them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.families.mbv3 import squeeze_excite
from ofa_deploy.layers import BlockPlan
from ofa_deploy.probe import (
    OperatorFact,
    OperatorProbe,
    Prober,
    WidthFact,
    channel_step,
    operator_probes,
)
from profilers.backends import get_backend
from profilers.measurement import MeasureSettings
from tests.support.gpu import every_backend

QUICK = MeasureSettings(
    visits=4,
    runs_per_visit=5,
    warmup_runs=2,
    warmup_windows=1,
    anchor_repeats=2,
    seed=0,
    target_relative_error=10.0,
    max_seconds=5.0,
)


def prober(name: str) -> Prober:
    return Prober(backend=get_backend(name), threads=1, settings=QUICK)


@lru_cache
def operator_facts(name: str) -> list[OperatorFact]:
    """Of all operators; a runtime is asked once."""
    return prober(name).probe_operators()


@pytest.mark.parametrize("name", every_backend())
def test_every_operator_of_the_spaces_runs_everywhere(name: str) -> None:
    facts = operator_facts(name)
    assert [fact.name for fact in facts] == [p.name for p in operator_probes()]
    assert {fact.problem for fact in facts} == {""}
    dense = next(fact for fact in facts if fact.name == "dense 3x3")
    assert dense.extra_ms is not None


def test_what_a_runtime_fuses_is_seen() -> None:
    facts = {fact.name: fact.fused for fact in operator_facts("openvino-cpu")}
    assert facts["ReLU"] is True
    assert facts["hard-swish"] is True
    assert facts["dense 3x3"] is False
    assert facts["squeeze-and-excite"] is False


@pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="no LiteRT")
def test_an_operator_that_ends_a_model_outside_of_its_delegate_is_seen() -> None:
    """XNNPACK has no hard-swish in int8; the delegate has one piece all the same."""
    facts = {fact.name: fact.fallback for fact in operator_facts("litert-cpu")}
    assert "last operators outside of the XNNPACK delegate" in facts["hard-swish, int8"]
    assert facts["hard-swish"] == facts["ReLU, int8"] == ""


def test_what_a_runtime_does_not_run_is_told_with_the_reason() -> None:
    good = operator_probes()[0]
    # A gate over other channels than there are: no runtime runs that.
    first, *_ = good.block.layers
    broken: BlockPlan = replace(
        good.block,
        layers=(first, squeeze_excite("se", 48, 28), first),
    )
    probe = OperatorProbe(name="broken", block=broken, without=good.without)
    facts = prober("onnxruntime-cpu").probe_operators([good, probe])
    assert [bool(fact.problem) for fact in facts] == [False, True]
    assert facts[1].extra_ms is None


SWEEP = range(8, 137, 4)


def sweep(step: int, noise: float, seed: int) -> list[WidthFact]:
    """Latency that grows by whole steps of channels."""
    errors = np.random.default_rng(seed).normal(0, noise, len(SWEEP))
    return [
        WidthFact(
            channels=channels,
            quiet_ms=(50 + -(-channels // step) * step) / 100 * (1 + error),
            error_ms=0.001,
            dominated_by=None,
        )
        for channels, error in zip(SWEEP, errors, strict=True)
    ]


@pytest.mark.parametrize("step", [8, 16, 32])
@given(seed=st.integers(0, 1000))
def test_a_staircase_is_told_through_the_noise(step: int, seed: int) -> None:
    assert channel_step(sweep(step, noise=0.0075, seed=seed)) == step


@pytest.mark.parametrize("step", [8, 16, 32])
def test_a_staircase_is_nearly_always_told_through_more_noise(step: int) -> None:
    # With a percent of noise two sweeps in a thousand hide the smallest step.
    told = [channel_step(sweep(step, noise=0.01, seed=s)) == step for s in range(300)]
    assert np.mean(told) >= 0.99


@given(seed=st.integers(0, 1000))
def test_where_every_channel_costs_there_is_no_staircase(seed: int) -> None:
    assert channel_step(sweep(1, noise=0.01, seed=seed)) is None


def test_two_widths_tell_no_staircase() -> None:
    assert channel_step(sweep(16, noise=0.0, seed=0)[:2]) is None


def test_a_sweep_measures_every_width() -> None:
    widths = (16, 64, 512)
    facts = prober("onnxruntime-cpu").sweep_widths(widths)
    assert tuple(fact.channels for fact in facts) == widths
    # What is made of them is for made-up timings to tell.
    assert all(fact.quiet_ms > 0 and fact.error_ms >= 0 for fact in facts)
