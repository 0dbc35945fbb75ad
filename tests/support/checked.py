"""Stand-ins that have no name and take no arguments that the real class does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.binding_api import ClassApi, Parameter, parameters_of

_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "SupportsInt": (int,),
    "tuple": (tuple,),
    "list": (list,),
    "Dims": (tuple,),
    "Buffer": (bytes,),
}


class Checked:
    """An implementation behind the names and signatures of a real class."""

    def __init__(self, name: str, api: ClassApi, implementation: Any) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_api", api)
        object.__setattr__(self, "_implementation", implementation)

    def __getattr__(self, name: str) -> Any:
        if name not in self._api:
            raise AttributeError(f"the real {self._name} has no {name!r}")
        value = getattr(self._implementation, name)
        signatures = self._api[name]
        if not isinstance(signatures, list):
            return value

        def call(*given: Any, **named: Any) -> Any:
            where = f"{self._name}.{name}"
            fitting = require_fitting(where, signatures, given, named)
            returns = fitting.rpartition("-> ")[2]
            result = value(*given, **named)
            if returns == "bool" and not isinstance(result, bool):
                raise TypeError(f"{where} gives a bool, its stand-in {result!r}")
            return result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if self._api.get(name) != "settable":
            raise AttributeError(f"{name!r} of the real {self._name} cannot be set")
        setattr(self._implementation, name, value)

    def __sub__(self, other: Checked) -> Any:
        return self._implementation - other._implementation


def require_fitting(
    where: str, signatures: list[str], given: tuple[Any, ...], named: Mapping[str, Any]
) -> str:
    """The signature that a call fits; `TypeError` if there is none."""
    for signature in signatures:
        if _fits(parameters_of(signature), given, named):
            return signature
    raise TypeError(f"{where}(*{given}, **{dict(named)}) fits none of {signatures}")


def _fits(
    parameters: list[Parameter], given: tuple[Any, ...], named: Mapping[str, Any]
) -> bool:
    by_place = [p for p in parameters if not p.keyword_only][: len(given)]
    if len(by_place) < len(given) or set(named) - {p.name for p in parameters}:
        return False
    values = {p.name: value for p, value in zip(by_place, given, strict=True)}
    if set(values) & set(named):
        return False
    values.update(named)
    return all(
        _is_a(values[p.name], p.type) if p.name in values else p.optional
        for p in parameters
    )


def _is_a(value: Any, types: str) -> bool:
    for name in types.split(" | "):
        if isinstance(value, Checked):
            if value._name == name:
                return True
        elif isinstance(value, _PLAIN_TYPES.get(name, ())):
            return not isinstance(value, bool)
        elif name in (kind.__name__ for kind in type(value).__mro__):
            return True
    return False
