from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.errors import FormatError, SpaceError
from ofa_deploy.families import mbv3
from ofa_deploy.plan import lower
from ofa_deploy.search.exhaustive import enumerate_genomes
from ofa_deploy.space import (
    BlockConfig,
    Genomes,
    SearchSpace,
    StageSpace,
    SubnetConfig,
    first_of_each,
)
from ofa_deploy.space_file import (
    MAX_CHANNELS,
    MAX_CHOICES,
    MAX_CLASSES,
    MAX_DEPTH,
    MAX_EXPAND,
    MAX_KERNEL,
    MAX_RESOLUTION,
    MAX_STAGES,
    MAX_STRIDE,
    decode_space,
    encode_space,
    space_sha256,
)
from ofa_deploy.table_files import table_name
from profilers.json_reader import parse_json
from tests.support import tiny

SPACES = (
    tiny.SPACE,
    mbv3.small(),
    mbv3.imagenet(width=1.0),
    mbv3.imagenet(width=1.2, class_count=7),
)
ORDER = "must be ascending, distinct and positive"


@st.composite
def raw_rows(draw: st.DrawFn) -> tuple[SearchSpace, Genomes]:
    """A space, and rows within its choices whose unused slots may hold anything."""
    space = draw(st.sampled_from(SPACES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = space.choice_counts
    return space, rng.integers(0, counts[None], size=(4, len(counts)))


# -- one network, three forms ----------------------------------------------------------


@given(raw_rows())
def test_a_canonical_genome_survives_decoding_and_encoding(
    drawn: tuple[SearchSpace, Genomes],
) -> None:
    space, rows = drawn
    for row in space.canonical(rows):
        assert space.encode(space.decode(row)).tolist() == row.tolist()


@given(raw_rows())
def test_a_config_survives_its_id(drawn: tuple[SearchSpace, Genomes]) -> None:
    space, rows = drawn
    for row in rows:
        config = space.decode(row)
        assert SubnetConfig.from_id(config.id) == config


@given(raw_rows())
def test_canonical_is_idempotent(drawn: tuple[SearchSpace, Genomes]) -> None:
    space, rows = drawn
    once = space.canonical(rows)
    assert np.array_equal(space.canonical(once), once)


@given(raw_rows())
def test_canonical_does_not_change_the_network(
    drawn: tuple[SearchSpace, Genomes],
) -> None:
    space, rows = drawn
    for raw, canonical in zip(rows, space.canonical(rows), strict=True):
        assert space.decode(raw) == space.decode(canonical)


@given(raw_rows())
def test_canonical_leaves_its_argument_alone(
    drawn: tuple[SearchSpace, Genomes],
) -> None:
    space, rows = drawn
    before = rows.copy()
    space.canonical(rows)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_samples_are_canonical_and_within_the_choices(space: SearchSpace) -> None:
    drawn = space.sample(200, np.random.default_rng(0))
    assert (drawn >= 0).all()
    assert (drawn < space.choice_counts).all()
    assert np.array_equal(space.canonical(drawn), drawn)


def test_every_network_of_the_tiny_space_is_sampled() -> None:
    drawn = tiny.SPACE.sample(40_000, np.random.default_rng(0))
    assert len(np.unique(drawn, axis=0)) == tiny.NETWORK_COUNT


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_the_extremes_take_every_last_and_first_choice(space: SearchSpace) -> None:
    largest, smallest = space.largest(), space.smallest()
    assert largest.resolution == max(space.resolutions)
    assert smallest.resolution == min(space.resolutions)
    for stage, most, least in zip(
        space.stages, largest.stages, smallest.stages, strict=True
    ):
        biggest = BlockConfig(kernel=max(stage.kernels), expand=max(stage.expands))
        assert most == (biggest,) * max(stage.depths)
        narrowest = BlockConfig(kernel=min(stage.kernels), expand=min(stage.expands))
        assert least == (narrowest,) * min(stage.depths)


# -- counts ----------------------------------------------------------------------------


def test_count_is_the_number_of_different_networks() -> None:
    enumerated = enumerate_genomes(tiny.SPACE)
    names = {tiny.SPACE.decode(row).id for row in enumerated}
    assert tiny.SPACE.count() == len(enumerated) == len(names) == tiny.NETWORK_COUNT


@pytest.mark.parametrize("width", [1.0, 1.2])
def test_the_published_space_has_the_published_count(width: float) -> None:
    space = mbv3.imagenet(width=width)
    assert space.count() == 25 * (9**2 + 9**3 + 9**4) ** 5


def test_a_large_space_is_not_enumerated() -> None:
    small = mbv3.small()
    # Resolutions, depths, then the expansions and kernels of all slots.
    rows = 3 * 2**3 * 3**2 * 3**3 * 9**3
    with pytest.raises(SpaceError) as caught:
        enumerate_genomes(small)
    assert str(caught.value) == (
        f"space mbv3-small has {rows} rows of genes; at most 1000000 are enumerated. "
        "Search it instead"
    )


# -- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "id '' must begin with a resolution, such as r32"),
        ("32-k3e1", "id '32-k3e1' must begin with a resolution, such as r32"),
        ("r8x-k3e1", "id 'r8x-k3e1' must begin with a resolution, such as r32"),
        ("r8-k3", "id 'r8-k3': 'k3' is not a block such as k5e4"),
        ("r8-", "id 'r8-': '' is not a block such as k5e4"),
        ("r8-k3e1.", "id 'r8-k3e1.': '' is not a block such as k5e4"),
        ("r8-k-3e1", "id 'r8-k-3e1': 'k' is not a block such as k5e4"),
        ("r8-k3e1 ", "id 'r8-k3e1 ': 'k3e1 ' is not a block such as k5e4"),
    ],
)
def test_a_text_that_is_no_id_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpaceError) as caught:
        SubnetConfig.from_id(text)
    assert str(caught.value) == message


@given(st.text(max_size=20))
def test_any_text_is_an_id_or_a_space_error(text: str) -> None:
    try:
        config = SubnetConfig.from_id(text)
    except SpaceError:
        return
    assert SubnetConfig.from_id(config.id) == config


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([0] * 10, id="one gene too few"),
        pytest.param([0] * 12, id="one gene too many"),
        pytest.param([2, *[0] * 10], id="no such resolution"),
        pytest.param([-1, *[0] * 10], id="negative"),
        pytest.param([*[0] * 10, 2], id="no such expand ratio"),
    ],
)
def test_a_genome_outside_the_choices_is_refused(row: list[int]) -> None:
    with pytest.raises(SpaceError) as caught:
        tiny.SPACE.decode(row)
    assert str(caught.value) == (
        "a genome of space tiny has 11 genes, each in 0..choices-1 with choices "
        f"[2, 2, 2, 1, 2, 1, 2, 3, 2, 3, 2]; got {row}"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r9-k3e1-k3e2", "resolution=9 is not one of (8, 12) of space tiny"),
        ("r8-k3e1", "the config has 1 stages, space tiny has 2"),
        (
            "r8-k3e1.k3e1.k3e1-k3e2",
            "stage 1: depth=3 is not one of (1, 2); the supernet was trained for "
            "those only",
        ),
        (
            "r8-k5e1-k3e2",
            "stage 1, block 1: kernel=5 is not one of (3,); the supernet was trained "
            "for those only",
        ),
        (
            "r8-k3e1-k3e2.k7e6",
            "stage 2, block 2: expand=6 is not one of (2, 3); the supernet was "
            "trained for those only",
        ),
    ],
)
def test_a_config_outside_the_space_is_refused_by_its_first_wrong_choice(
    text: str, message: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        tiny.SPACE.encode(SubnetConfig.from_id(text))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernels": (5, 3)},
            "kernels=(5, 3) must be ascending, distinct and positive",
        ),
        ({"kernels": (3, 4)}, "kernels=(3, 4) must be odd"),
        ({"expands": ()}, "expands=() must be ascending, distinct and positive"),
        (
            {"expands": (2, 2)},
            "expands=(2, 2) must be ascending, distinct and positive",
        ),
        ({"depths": (0, 1)}, "depths=(0, 1) must be ascending, distinct and positive"),
        ({"stride": 3}, "stride=3 must be 1 or 2"),
        ({"out_channels": 0}, "out_channels=0 must be positive"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(
    change: dict[str, Any], message: str
) -> None:
    stage: StageSpace = tiny.SPACE.stages[1]
    with pytest.raises(SpaceError) as caught:
        replace(stage, **change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolutions": (12, 8)}, "resolutions=(12, 8) must be ascending"),
        (
            {"resolutions": ()},
            "a space needs at least one resolution and one stage",
        ),
        ({"stages": ()}, "a space needs at least one resolution and one stage"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        replace(tiny.SPACE, **change)
    assert str(caught.value) == message


EVIL_NAMES = (
    "../evil",
    "/etc/evil",
    "a/b",
    "a\\b",
    "..",
    ".hidden",
    "-x",
    "a b",
    "a\n",
)


@pytest.mark.parametrize("name", ["", *EVIL_NAMES, "ä", "a:b", "[bold]", "a\0"])
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(SpaceError) as caught:
        replace(tiny.SPACE, name=name)
    assert str(caught.value) == (
        f"name={name!r} is no name of a space; give 1 to 64 ASCII letters, digits, "
        "'.', '_' and '-', the first a letter or a digit"
    )


def test_a_name_may_have_64_characters_and_no_more() -> None:
    assert replace(tiny.SPACE, name="x" * 64).name == "x" * 64
    with pytest.raises(SpaceError, match=f"^name='{'x' * 64}…' is no name of a space"):
        replace(tiny.SPACE, name="x" * 65)


@given(st.text(alphabet="aZ9._-/\\ ", max_size=70))
def test_a_name_that_is_taken_is_a_file_name_of_its_own(name: str) -> None:
    try:
        space = replace(tiny.SPACE, name=name)
    except SpaceError:
        return
    file_name = table_name(space, tiny.DEVICE, tiny.RUNTIME)
    assert Path(file_name).name == file_name


def test_a_width_that_was_never_published_is_refused() -> None:
    with pytest.raises(SpaceError) as caught:
        mbv3.imagenet(width=1.1)
    assert str(caught.value) == "width=1.1 is not one of 1.0, 1.2"


# -- JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_a_space_survives_json(space: SearchSpace) -> None:
    assert decode_space(parse_json(json.dumps(encode_space(space)))) == space


def test_spaces_of_other_networks_have_other_digests() -> None:
    digests = {space_sha256(space) for space in SPACES}
    digests.add(space_sha256(replace(tiny.SPACE, resolutions=(8, 10))))
    assert len(digests) == len(SPACES) + 1


def encoded() -> Any:
    """The tiny space as JSON values that a test may break."""
    return encode_space(tiny.SPACE)


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("name",), "", "name"),
        (("name",), 3, "name"),
        (("resolutions",), 8, "resolutions"),
        (("resolutions", 0), 8.5, "resolutions[0]"),
        (("resolutions", 0), True, "resolutions[0]"),
        (("resolutions", 0), 99, ""),
        (("stem", "activation"), "gelu", "stem.activation"),
        (("stem", "block_channels"), 0, "stem.block_channels"),
        (("stem", "width"), 1, "stem"),
        (("stages", 1, "kernels", 2), "7", "stages[1].kernels[2]"),
        (("stages", 1, "kernels", 2), 6, ""),
        (("stages", 0, "block"), "transformer", "stages[0].block"),
        (("stages", 0, "squeeze_excite"), 1, "stages[0].squeeze_excite"),
        (("stages", 0, "dropout"), 0.1, "stages[0]"),
        (("head", "class_count"), 1, "head.class_count"),
        (("version",), 1, ""),
    ],
)
def test_a_wrong_value_in_a_space_is_refused_with_its_place(
    path: tuple[str | int, ...], value: object, where: str
) -> None:
    document = encoded()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(FormatError) as caught:
        decode_space(parse_json(json.dumps(document)))
    assert caught.value.path == where


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_a_space_file_whose_name_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_space(parse_json(json.dumps({**encoded(), "name": name})))
    assert caught.value.path == "name"


@pytest.mark.parametrize(
    ("path", "most", "where"),
    [
        (("resolutions", 1), MAX_RESOLUTION, "resolutions[1]"),
        (("stem", "out_channels"), MAX_CHANNELS, "stem.out_channels"),
        (("stem", "block_channels"), MAX_CHANNELS, "stem.block_channels"),
        (("stem", "stride"), MAX_STRIDE, "stem.stride"),
        (("stages", 1, "out_channels"), MAX_CHANNELS, "stages[1].out_channels"),
        (("stages", 1, "kernels", 2), MAX_KERNEL, "stages[1].kernels[2]"),
        (("stages", 1, "expands", 1), MAX_EXPAND, "stages[1].expands[1]"),
        (("stages", 1, "depths", 1), MAX_DEPTH, "stages[1].depths[1]"),
        (("head", "expand_channels"), MAX_CHANNELS, "head.expand_channels"),
        (("head", "feature_channels"), MAX_CHANNELS, "head.feature_channels"),
        (("head", "class_count"), MAX_CLASSES, "head.class_count"),
    ],
)
def test_a_space_file_may_ask_for_the_most_and_no_more(
    path: tuple[str | int, ...], most: int, where: str
) -> None:
    document = encoded()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = most
    decode_space(parse_json(json.dumps(document)))
    place[path[-1]] = most + 1
    with pytest.raises(FormatError) as caught:
        decode_space(parse_json(json.dumps(document)))
    assert str(caught.value) == f"{where}: {most + 1} is too large; give at most {most}"


def test_a_space_file_of_too_many_stages_is_refused() -> None:
    stages = [encoded()["stages"][1]] * (MAX_STAGES + 1)
    with pytest.raises(FormatError) as caught:
        decode_space(parse_json(json.dumps({**encoded(), "stages": stages})))
    assert str(caught.value) == "stages: 33 stages are too many; give at most 32"


def test_a_space_file_of_too_many_choices_is_refused() -> None:
    resolutions = list(range(1, MAX_CHOICES + 2))
    with pytest.raises(FormatError) as caught:
        decode_space(parse_json(json.dumps({**encoded(), "resolutions": resolutions})))
    assert str(caught.value) == "resolutions: 65 choices are too many; give at most 64"


def test_the_largest_space_of_a_file_is_lowered_without_a_fuss() -> None:
    """The plan of what a file may ask for, at most, is a few thousand small values."""
    document = encoded()
    stage = {
        **document["stages"][1],
        "out_channels": MAX_CHANNELS,
        "kernels": [MAX_KERNEL],
        "expands": [MAX_EXPAND],
        "depths": [MAX_DEPTH],
    }
    document["resolutions"] = [MAX_RESOLUTION]
    document["stages"] = [stage] * MAX_STAGES
    space = decode_space(parse_json(json.dumps(document)))
    plan = lower(space, space.largest())
    assert len(plan.blocks) == MAX_STAGES * MAX_DEPTH + 3  # stem, stem block, head


@pytest.mark.parametrize("key", sorted(encoded()))
def test_a_missing_key_in_a_space_is_refused_by_name(key: str) -> None:
    document = encoded()
    del document[key]
    with pytest.raises(FormatError) as caught:
        decode_space(parse_json(json.dumps(document)))
    assert str(caught.value) == (
        f"key {key!r} is missing; allowed are "
        "['head', 'name', 'resolutions', 'stages', 'stem']"
    )


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 60))
def test_of_equal_genomes_the_first_is_kept_and_every_different_one(
    seed: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    few = tiny.SPACE.sample(5, rng)
    genomes = few[rng.integers(len(few), size=count)]
    seen: set[tuple[int, ...]] = set()
    expected = []
    for index, row in enumerate(map(tuple, genomes.tolist())):
        if row not in seen:
            expected.append(index)
        seen.add(row)
    assert first_of_each(genomes).tolist() == expected
