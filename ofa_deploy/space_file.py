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
)
from profilers.json_reader import JsonNode

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
    try:
        return SearchSpace(
            name=entries["name"].text(),
            resolutions=_integers(entries["resolutions"]),
            stem=_decode_stem(entries["stem"]),
            stages=tuple(_decode_stage(item) for item in entries["stages"].items()),
            head=_decode_head(entries["head"]),
        )
    except SpaceError as error:
        node.refuse(str(error))


def _decode_stem(node: JsonNode) -> StemSpace:
    entries = node.fields("out_channels", "stride", "activation", "block_channels")
    return StemSpace(
        out_channels=entries["out_channels"].integer(minimum=1),
        stride=entries["stride"].integer(minimum=1),
        activation=entries["activation"].choice(get_args(Activation)),
        block_channels=entries["block_channels"].optional(
            lambda value: value.integer(minimum=1)
        ),
    )


def _decode_stage(node: JsonNode) -> StageSpace:
    entries = node.fields(*_STAGE_FIELDS)
    return StageSpace(
        out_channels=entries["out_channels"].integer(minimum=1),
        stride=entries["stride"].integer(minimum=1),
        kernels=_integers(entries["kernels"]),
        expands=_integers(entries["expands"]),
        depths=_integers(entries["depths"]),
        activation=entries["activation"].choice(get_args(Activation)),
        squeeze_excite=entries["squeeze_excite"].boolean(),
        block=entries["block"].choice(get_args(BlockKind)),
    )


def _decode_head(node: JsonNode) -> HeadSpace:
    entries = node.fields(
        "expand_channels", "feature_channels", "activation", "class_count"
    )
    return HeadSpace(
        expand_channels=entries["expand_channels"].integer(minimum=1),
        feature_channels=entries["feature_channels"].integer(minimum=1),
        activation=entries["activation"].choice(get_args(Activation)),
        class_count=entries["class_count"].integer(minimum=2),
    )


def _integers(node: JsonNode) -> tuple[int, ...]:
    return tuple(item.integer(minimum=1) for item in node.items())
