"""Search spaces as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import get_args

from ofa_deploy.errors import SpaceError
from ofa_deploy.space import (
    Activation,
    BlockKind,
    HeadSpace,
    SearchSpace,
    StageSpace,
    StemSpace,
    require_name,
)
from profilers.json_reader import JsonNode

# What a file may ask for: several times what any published network has, and little
# enough that reading a hostile one takes neither memory nor time.
MAX_RESOLUTION = 2_048
MAX_STAGES = 32
MAX_CHOICES = 64  # of one kind, such as the resolutions of a space
MAX_DEPTH = 64
MAX_KERNEL = 31
MAX_EXPAND = 16
MAX_STRIDE = 8
MAX_CHANNELS = 16_384
MAX_CLASSES = 1_000_000

_STAGE_FIELDS = (
    "out_channels",
    "stride",
    "kernels",
    "expands",
    "depths",
    "activation",
    "squeeze_excite",
    "block",
)


def encode_space(space: SearchSpace) -> dict[str, object]:
    """The space as JSON objects, lists and numbers."""
    encoded: dict[str, object] = json.loads(json.dumps(asdict(space)))
    return encoded


def space_sha256(space: SearchSpace) -> str:
    """Digest of everything that decides which networks the space holds."""
    text = json.dumps(encode_space(space), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def decode_space(node: JsonNode) -> SearchSpace:
    """A space from JSON.

    Raises:
        FormatError: With the path of what is wrong.
    """
    entries = node.fields("name", "resolutions", "stem", "stages", "head")
    stages = entries["stages"].items()
    if len(stages) > MAX_STAGES:
        entries["stages"].refuse(
            f"{len(stages)} stages are too many; give at most {MAX_STAGES}"
        )
    try:
        return SearchSpace(
            name=_decode_name(entries["name"]),
            resolutions=_choices(entries["resolutions"], maximum=MAX_RESOLUTION),
            stem=_decode_stem(entries["stem"]),
            stages=tuple(_decode_stage(item) for item in stages),
            head=_decode_head(entries["head"]),
        )
    except SpaceError as error:
        node.refuse(str(error))


def _decode_name(node: JsonNode) -> str:
    try:
        return require_name(node.text())
    except SpaceError as error:
        node.refuse(str(error))


def _decode_stem(node: JsonNode) -> StemSpace:
    entries = node.fields("out_channels", "stride", "activation", "block_channels")
    return StemSpace(
        out_channels=_channels(entries["out_channels"]),
        stride=entries["stride"].integer(minimum=1, maximum=MAX_STRIDE),
        activation=entries["activation"].choice(get_args(Activation)),
        block_channels=entries["block_channels"].optional(_channels),
    )


def _decode_stage(node: JsonNode) -> StageSpace:
    entries = node.fields(*_STAGE_FIELDS)
    return StageSpace(
        out_channels=_channels(entries["out_channels"]),
        stride=entries["stride"].integer(minimum=1, maximum=MAX_STRIDE),
        kernels=_choices(entries["kernels"], maximum=MAX_KERNEL),
        expands=_choices(entries["expands"], maximum=MAX_EXPAND),
        depths=_choices(entries["depths"], maximum=MAX_DEPTH),
        activation=entries["activation"].choice(get_args(Activation)),
        squeeze_excite=entries["squeeze_excite"].boolean(),
        block=entries["block"].choice(get_args(BlockKind)),
    )


def _decode_head(node: JsonNode) -> HeadSpace:
    entries = node.fields(
        "expand_channels", "feature_channels", "activation", "class_count"
    )
    return HeadSpace(
        expand_channels=entries["expand_channels"].optional(_channels),
        feature_channels=entries["feature_channels"].optional(_channels),
        activation=entries["activation"].choice(get_args(Activation)),
        class_count=entries["class_count"].integer(minimum=2, maximum=MAX_CLASSES),
    )


def _channels(node: JsonNode) -> int:
    return node.integer(minimum=1, maximum=MAX_CHANNELS)


def _choices(node: JsonNode, *, maximum: int) -> tuple[int, ...]:
    items = node.items()
    if len(items) > MAX_CHOICES:
        node.refuse(f"{len(items)} choices are too many; give at most {MAX_CHOICES}")
    return tuple(item.integer(minimum=1, maximum=maximum) for item in items)
