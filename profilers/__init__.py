"""Measuring latency on a device: runtimes, a protocol of measuring, tables.

Needs numpy, and for each backend its runtime. Never imports the rest of the product:
this package alone is copied to the device.
"""

from __future__ import annotations

from profilers.backends import Backend, Session, backend_names, get_backend
from profilers.device import (
    Conditions,
    DeviceSpec,
    RuntimeSpec,
    available_cores,
    read_conditions,
    this_device,
)
from profilers.doctor import Diagnosis, Finding, examine
from profilers.errors import DeployError
from profilers.fresh import FreshMeasurement, measure_in_fresh_process
from profilers.measure import measure_models
from profilers.measurement import (
    Drift,
    Measurement,
    MeasurementRun,
    MeasureSettings,
    ModelUnderTest,
    Stability,
    Visit,
)
from profilers.merge import merge_tables
from profilers.order import WorkOrder
from profilers.table import LatencyTable, require_compatible

__all__ = [
    "Backend",
    "Conditions",
    "DeployError",
    "DeviceSpec",
    "Diagnosis",
    "Drift",
    "Finding",
    "FreshMeasurement",
    "LatencyTable",
    "MeasureSettings",
    "Measurement",
    "MeasurementRun",
    "ModelUnderTest",
    "RuntimeSpec",
    "Session",
    "Stability",
    "Visit",
    "WorkOrder",
    "available_cores",
    "backend_names",
    "examine",
    "get_backend",
    "measure_in_fresh_process",
    "measure_models",
    "merge_tables",
    "read_conditions",
    "require_compatible",
    "this_device",
]
