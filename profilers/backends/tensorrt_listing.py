"""The listing of an engine's layers that TensorRT writes into its build log.

The layout is that of TensorRT for RTX 1.7, which the tests build with. TensorRT 10
writes another one, without the constants apart; of it nothing is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["LISTING_START", "EngineLayer", "is_weight_only", "parse_listing"]

LISTING_START = "Layers:\n"

_INT8 = "Int8"

# Names hold any character, ", " too, so each part ends where the next one's name is.
_LAYER = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), "
    r"Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[.*\], TacticName: ",
    re.MULTILINE,
)
_DATATYPE = re.compile(r", Datatype: (\w+), Format: ")

# A generated kernel: pointwise work, moves, small sums. Padding an int8 tensor looks
# like a product there, with its int8 constant.
_GENERATED = "kgen"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One layer of an engine, as TensorRT fused it.

    Attributes:
        name: As the profiler reports it.
        kind: TensorRT's name of what it does, such as `correlation`.
        input_types: Of the tensors that other layers or the caller give.
        constant_types: Of what the engine holds, such as weights.
    """

    name: str
    kind: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]

    @property
    def multiplies_int8(self) -> bool:
        """Whether both factors are int8, so that the arithmetic is.

        Int8 weights alone are only stored so: a layer before, or this one, widens them.
        """
        return (
            self.kind != _GENERATED
            and self.input_types[:1] == (_INT8,)
            and _INT8 in self.input_types[1:] + self.constant_types
        )


def parse_listing(text: str) -> tuple[EngineLayer, ...]:
    """Layers in the order of execution; none if the layout is another one."""
    return tuple(
        EngineLayer(
            name=match["name"],
            kind=match["kind"],
            input_types=tuple(_DATATYPE.findall(match["inputs"])),
            constant_types=tuple(_DATATYPE.findall(match["constants"])),
        )
        for match in _LAYER.finditer(text)
    )


def is_weight_only(layers: tuple[EngineLayer, ...]) -> bool:
    """Whether the engine stores int8 and multiplies none of it."""
    stored = any(_INT8 in layer.input_types + layer.constant_types for layer in layers)
    return stored and not any(layer.multiplies_int8 for layer in layers)
