"""Specialise a once-for-all supernet to a device and a latency budget.

bundle = ofa_deploy.specialize("openvino-cpu", latency_ms=0.5, out="out/")
bundle.predict("image.jpg").class_name
"""

from __future__ import annotations

from importlib.metadata import version as _version

from ofa_deploy.api import specialize
from ofa_deploy.bundle import Bundle, Prediction
from ofa_deploy.constraints import Constraints
from ofa_deploy.errors import (
    BundleError,
    DeployError,
    InfeasibleBudget,
    StaleTable,
)
from ofa_deploy.fleet import Fleet
from ofa_deploy.fronts import Frontier, frontier
from ofa_deploy.pipeline import Specializer

__version__ = _version("ofa-deploy")

__all__ = [
    "Bundle",
    "BundleError",
    "Constraints",
    "DeployError",
    "Fleet",
    "Frontier",
    "InfeasibleBudget",
    "Prediction",
    "Specializer",
    "StaleTable",
    "frontier",
    "specialize",
]
