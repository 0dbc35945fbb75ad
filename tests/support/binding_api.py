"""What compiled modules offer: the names in a class, and how its methods are called.

Stand-ins of NVIDIA's modules are held to it, so that code tested on them uses nothing
that the real ones lack. Descriptions of bindings that load only beside gigabytes of
libraries are kept in tests/fixtures/tensorrt, made by

    python -m tests.support.binding_api tensorrt_bindings.tensorrt > FILE
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

# What a member of a class is: "property", "settable" (a property too), the number of an
# enumeration's member, or a method's signatures, such as "(name: str) -> bool".
Member = str | int | list[str]
ClassApi = dict[str, Member]
ModuleApi = dict[str, ClassApi]

# Everything of TensorRT that the backend touches.
TENSORRT_CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "ILogger.Severity",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProfiler",
    "ITensor",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
)
# And of TensorRT for RTX alone.
RTX_CLASSES = (*TENSORRT_CLASSES, "IRuntimeConfig")


def describe_module(module: Any, classes: Iterable[str]) -> ModuleApi:
    """Describe classes of a module; a name may hold dots."""
    return {
        name: describe_class(reduce(getattr, name.split("."), module))
        for name in classes
    }


def describe_class(described: Any) -> ClassApi:
    """Describe what a class makes public, and `__init__`."""
    names = [n for n in dir(described) if not n.startswith("_")] + ["__init__"]
    return {name: _describe(getattr(described, name), described) for name in names}


def _describe(value: Any, owner: Any) -> Member:
    if isinstance(value, property):
        return "property" if value.fset is None else "settable"
    if isinstance(value, owner):  # pybind11's enumerations
        return int(value)
    if not callable(value):  # Cython's properties; none that is used can be set
        return "property"
    text = value.__doc__ or ""
    lines = [line for line in text.splitlines() if "(self: " in line and " -> " in line]
    if lines:  # pybind11's, one a line
        return [_plain(line[line.index("(") :]) for line in lines]
    try:
        return [_plain(str(inspect.signature(value)))]
    except (TypeError, ValueError):
        return []


def _plain(signature: str) -> str:
    """Without `self`, quotes, and the modules of types."""
    text = re.sub(r"\((?:self(?:: [\w.]+)?)(?:, )?", "(", signature, count=1)
    return re.sub(r"(?:\w+\.)+(\w)", r"\1", text).replace("'", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A method's parameter; the type as it is written."""

    name: str
    type: str
    optional: bool
    keyword_only: bool


def parameters_of(signature: str) -> list[Parameter]:
    """Read what `describe_class` writes."""
    inside = signature[1 : signature.rindex(")")]
    found, keyword_only = [], False
    for part in _split(inside):
        if part == "*":
            keyword_only = True
            continue
        name, _, rest = part.partition(":")
        kind, default, _ = rest.partition(" = ")
        found.append(
            Parameter(
                name=name.partition("=")[0],
                type=kind.strip(),
                optional=bool(default) or "=" in name,
                keyword_only=keyword_only,
            )
        )
    return found


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text + ","):
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [part for part in parts if part]


if __name__ == "__main__":
    api = describe_module(importlib.import_module(sys.argv[1]), TENSORRT_CLASSES)
    sys.stdout.write(f"{json.dumps(api, indent=1, sort_keys=True)}\n")
