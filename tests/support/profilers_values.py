"""Hypothesis strategies of the values that files hold."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from profilers import (
    Conditions,
    DeviceSpec,
    Drift,
    LatencyTable,
    Measurement,
    MeasureSettings,
    RuntimeSpec,
    Stability,
    Visit,
)

words = st.text(min_size=1, max_size=8)
nanoseconds = st.integers(min_value=1, max_value=2**53)
positive = st.floats(min_value=1e-9, max_value=1e12)
at_least_zero = st.floats(min_value=0, max_value=1e12)
digests = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)

devices = st.builds(
    DeviceSpec,
    name=words,
    arch=words,
    cpu_model=words,
    core_count=st.integers(1, 256),
    accelerator=st.none() | words,
    memory_mb=st.integers(1, 2**24),
)
runtimes = st.builds(
    RuntimeSpec,
    backend=words,
    version=words,
    provider=words,
    threads=st.integers(1, 256),
    precision=words,
)
conditions = st.builds(
    Conditions,
    governor=st.none() | words,
    frequency_mhz=st.none() | positive,
    temperature_c=st.none() | st.floats(-50, 150),
    load_average=st.none() | at_least_zero,
    affinity_core_count=st.none() | st.integers(1, 256),
    cgroup_quota_cores=st.none() | positive,
    shared_host=st.booleans(),
)
settings = st.builds(
    MeasureSettings,
    visits=st.integers(2, 100),
    runs_per_visit=st.integers(1, 100),
    warmup_runs=st.integers(1, 100),
    warmup_windows=st.integers(1, 100),
    anchor_repeats=st.integers(1, 100),
    seed=st.integers(0, 2**32),
    target_relative_error=positive,
    max_seconds=positive,
    pass_seconds=at_least_zero,
)
visits = st.builds(
    Visit,
    time_ns=st.integers(0, 2**53),
    anchor_before_ns=nanoseconds,
    anchor_after_ns=nanoseconds,
    inner_loops=st.integers(1, 1024),
    samples_ns=st.lists(nanoseconds, min_size=1, max_size=4).map(tuple),
    fallback=st.none() | words,
    session=st.integers(0, 2**31),
    device_timed=st.booleans(),
)
stabilities = st.lists(words, max_size=2).map(
    lambda reasons: Stability(
        verdict="unstable" if reasons else "stable", reasons=tuple(reasons)
    )
)
measurements = st.builds(
    Measurement,
    name=words,
    visits=st.lists(visits, min_size=1, max_size=3).map(tuple),
    quiet_ms=positive,
    standard_error_ratio=at_least_zero,
    median_ms=positive,
    stability=stabilities,
)
by_name = st.lists(measurements, max_size=2).map(
    lambda found: {measurement.name: measurement for measurement in found}
)
drifts = st.tuples(*[st.integers(0, 99)] * 3, at_least_zero).map(
    lambda found: Drift(
        window_count=sum(found[:3]) + 1,
        flagged_count=sum(found[:2]),
        discarded_count=found[0],
        largest_ratio=found[3],
    )
)
tables = st.builds(
    LatencyTable,
    origin=st.sampled_from(["measured", "emulated", "synthetic"]),
    space_name=words,
    space_sha256=digests,
    device=devices,
    runtime=runtimes,
    settings=settings,
    conditions_before=conditions,
    conditions_after=conditions,
    drift=drifts,
    beta=at_least_zero,
    anchor_reference_ns=positive,
    created_at=st.datetimes().map(lambda moment: moment.isoformat()),
    blocks=by_name,
    networks=by_name,
    random_networks=st.just(()),
    failures=st.dictionaries(words, words, max_size=2),
).flatmap(
    lambda table: st.sets(st.sampled_from([*table.networks, ""])).map(
        lambda drawn: replace(table, random_networks=tuple(sorted(drawn - {""})))
    )
)
