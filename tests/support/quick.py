"""Settings for tests that time real models, and do not ask how precisely."""

from __future__ import annotations

from profilers import MeasureSettings

QUICK = MeasureSettings(
    visits=3,
    runs_per_visit=3,
    warmup_runs=1,
    warmup_windows=1,
    anchor_repeats=1,
    seed=0,
    target_relative_error=10.0,
    max_seconds=0.5,
)
