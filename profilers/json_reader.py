"""Strict reading of JSON: every refusal says where in the document, and why.

Python's `json` takes `NaN`, doubles keys over, and calls `True` a number; a file that
a user edits, or that a full disk cut off, needs better answers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar, cast

from profilers.errors import FormatError

__all__ = ["Json", "JsonNode", "parse_json", "read_json"]

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

T = TypeVar("T")

MAX_INTEGER = 2**63 - 1

# Kinds by exact type: True is an int to isinstance.
_KINDS: dict[type, str] = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class JsonNode:
    """A value in a document, and the way to it.

    Attributes:
        value: As `json` decoded it.
        path: As in `networks["a"].visits[3].samples_ns`; empty for the document.
    """

    value: Json
    path: str = ""

    def refuse(self, message: str) -> NoReturn:
        """Raise `FormatError` at this place."""
        raise FormatError(message, path=self.path)

    def fields(
        self, *names: str, may_lack: tuple[str, ...] = ()
    ) -> dict[str, JsonNode]:
        """Read an object of exactly these keys.

        Args:
            names: All keys.
            may_lack: Those of them that may be missing, and then read as null.
        """
        entries = self._object()
        for name in names:
            if name not in entries and name not in may_lack:
                self.refuse(f"key {name!r} is missing; allowed are {sorted(names)}")
        for name in sorted(entries.keys() - set(names)):
            self.refuse(f"key {name!r} is unknown; allowed are {sorted(names)}")
        prefix = f"{self.path}." if self.path else ""
        return {name: JsonNode(entries.get(name), prefix + name) for name in names}

    def entries(self) -> dict[str, JsonNode]:
        """Read an object of any keys, sorted by them."""
        return {
            key: JsonNode(value, f"{self.path}[{json.dumps(key)}]")
            for key, value in sorted(self._object().items())
        }

    def items(self) -> list[JsonNode]:
        """Read a list."""
        if not isinstance(self.value, list):
            self._expect("a list")
        return [
            JsonNode(value, f"{self.path}[{index}]")
            for index, value in enumerate(self.value)
        ]

    def text(self) -> str:
        """Read a text of at least one character."""
        if not isinstance(self.value, str):
            self._expect("a text")
        if not self.value:
            self.refuse("the text is empty; give at least one character")
        return self.value

    def choice(self, allowed: Sequence[T]) -> T:
        """Read one of the texts `allowed`; `get_args` of a literal type gives them."""
        text = self.text()
        for entry in allowed:
            if entry == text:
                return entry
        self.refuse(f"{text!r} is not allowed; give one of {list(allowed)}")

    def boolean(self) -> bool:
        """Read true or false."""
        if not isinstance(self.value, bool):
            self._expect("true or false")
        return self.value

    def integer(self, *, minimum: int, maximum: int = MAX_INTEGER) -> int:
        """Read a whole number, from `minimum` to `maximum`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self._expect("a whole number")
        if self.value < minimum:
            self.refuse(f"{self._shown()} is too small; give at least {minimum}")
        # Python's are unbounded; arrays are not.
        if self.value > maximum:
            self.refuse(f"{self._shown()} is too large; give at most {maximum}")
        return self.value

    def integers(self, *, minimum: int) -> tuple[int, ...]:
        """Read a list of whole numbers, each as `integer` does.

        A table holds hundreds of thousands of samples; a node for each takes seconds.
        """
        if isinstance(self.value, list) and all(
            type(entry) is int and minimum <= entry <= MAX_INTEGER
            for entry in self.value
        ):
            return cast("tuple[int, ...]", tuple(self.value))
        # The slow way says which one is wrong.
        return tuple(entry.integer(minimum=minimum) for entry in self.items())

    def number(self, *, minimum: float = -math.inf) -> float:
        """Read a finite number, at least `minimum`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self._expect("a number")
        # A whole number of 400 digits is legal JSON, and no float.
        if isinstance(self.value, int) and abs(self.value) > MAX_INTEGER:
            self.refuse(f"{self._shown()} is too large; give at most {MAX_INTEGER}")
        if not math.isfinite(self.value):
            self.refuse(f"{self.value} is not finite; give a finite number")
        if self.value < minimum:
            self.refuse(f"{self.value} is too small; give at least {minimum:g}")
        return float(self.value)

    def positive(self) -> float:
        """Read a finite number above 0."""
        number = self.number()
        if number <= 0:
            self.refuse(f"{number} is not positive; give a number above 0")
        return number

    def optional(self, read: Callable[[JsonNode], T]) -> T | None:
        """Read null as None, and anything else with `read`."""
        return None if self.value is None else read(self)

    def build(self, make: Callable[[], T]) -> T:
        """Call `make`; turn a value's own refusal into a `FormatError` here."""
        try:
            return make()
        except ValueError as error:
            raise FormatError(str(error), path=self.path) from error

    def _object(self) -> dict[str, Json]:
        if not isinstance(self.value, dict):
            self._expect("an object")
        return self.value

    def _expect(self, wanted: str) -> NoReturn:
        found = _KINDS.get(type(self.value), type(self.value).__name__)
        self.refuse(f"{self._shown()} is {found}; {wanted} belongs here")

    def _shown(self) -> str:
        shown = repr(self.value)
        return shown if len(shown) <= 40 else f"{shown[:37]}..."


def parse_json(text: str) -> JsonNode:
    """Decode a document.

    Raises:
        FormatError: The text is no JSON, holds NaN or Infinity, or has a key twice.
    """
    try:
        value: Json = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"this is not valid JSON ({error})", path="") from error
    return JsonNode(value)


def read_json(path: Path, decode: Callable[[JsonNode], T], *, otherwise: str) -> T:
    """Read and decode a file.

    Args:
        path: The file.
        decode: Gets the whole document.
        otherwise: What to do if there is no such file, or none that holds JSON.

    Raises:
        FormatError: The file cannot be read, or `decode` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path.name} cannot be read ({error}); {otherwise}", path=""
        ) from error
    try:
        node = parse_json(text)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}; {otherwise}", path="") from error
    try:
        return decode(node)
    except FormatError as error:
        # The decoder knows the place inside the file; people ask which file.
        raise error.in_file(path.name) from error.__cause__


def _refuse_constant(name: str) -> NoReturn:
    raise FormatError(f"{name} is not JSON; give a finite number", path="")


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        raise FormatError(f"keys {twice} appear twice; keep one of each", path="")
    return entries
