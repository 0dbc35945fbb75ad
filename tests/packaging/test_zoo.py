"""What comes along with the package: supernets, their model cards, latency tables."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import latency_tables
from ofa_deploy import zoo
from ofa_deploy.named_spaces import SPACE_NAMES, named_space
from ofa_deploy.pipeline import DEFAULT_SUPERNET
from ofa_deploy.plan import all_blocks
from ofa_deploy.predict.latency import fit_latency_predictor
from ofa_deploy.space import SearchSpace
from ofa_deploy.space_file import space_sha256
from ofa_deploy.stored import WEIGHTS_FILE
from ofa_deploy.table_files import table_name
from ofa_deploy.zoo import find_in_zoo, open_zoo, zoo_names
from profilers import LatencyTable, merge_tables

ZOO = Path(zoo.__file__).parent
MOST_WEIGHT_BYTES = 12_000_000
CALIBRATION_COUNTS = range(256, 512 + 1)
LEAST_SAMPLES = 400
# Classes of the data sets that named spaces have been trained on.
CLASS_COUNTS = {"mbv3-small": 10}

TABLES = sorted(Path(latency_tables.__path__[0]).glob("*.json"))
each_supernet = pytest.mark.parametrize("name", zoo_names())
each_table = pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)


def known_spaces() -> list[SearchSpace]:
    """Spaces of the zoo's supernets, and those that have names."""
    named = [
        named_space(name, class_count=CLASS_COUNTS.get(name, 1000))
        for name in SPACE_NAMES
    ]
    return [*(open_zoo(name).space for name in zoo_names()), *named]


# -- supernets -------------------------------------------------------------------------


def test_the_default_supernet_is_in_the_zoo() -> None:
    assert DEFAULT_SUPERNET in zoo_names()


@each_supernet
def test_a_bundle_finds_its_supernet_by_the_digest(name: str) -> None:
    found = find_in_zoo(open_zoo(name).sha256)
    assert found is not None
    assert found.source == name
    assert find_in_zoo("0" * 64) is None


@each_supernet
def test_the_weights_stay_small_enough_for_a_wheel(name: str) -> None:
    assert (ZOO / name / WEIGHTS_FILE).stat().st_size <= MOST_WEIGHT_BYTES


@each_supernet
def test_some_hundreds_of_calibration_images_come_along(name: str) -> None:
    supernet = open_zoo(name)
    images, size = supernet.calibration, max(supernet.space.resolutions)
    assert images is not None
    assert images.dtype == np.uint8
    assert len(images) in CALIBRATION_COUNTS
    assert images.shape[1:] == (size, size, 3)


@each_supernet
def test_the_calibration_images_can_have_as_many_of_each_class(name: str) -> None:
    # They have no labels; they are synthesised class by class, in rounds.
    supernet = open_zoo(name)
    assert supernet.calibration is not None
    assert len(supernet.calibration) % len(supernet.class_names) == 0


@each_supernet
def test_no_calibration_image_is_there_twice_or_empty(name: str) -> None:
    images = open_zoo(name).calibration
    assert images is not None
    flat = images.reshape(len(images), -1)
    assert len(np.unique(flat, axis=0)) == len(images)
    assert (flat.min(axis=1) < flat.max(axis=1)).all()


@each_supernet
def test_the_predictor_was_fitted_to_enough_different_networks(name: str) -> None:
    supernet = open_zoo(name)
    assert supernet.accuracy is not None
    assert supernet.samples is not None
    different = np.unique(supernet.space.canonical(supernet.samples.genomes), axis=0)
    assert len(different) >= LEAST_SAMPLES


@each_supernet
def test_the_sampled_accuracies_are_better_than_guessing(name: str) -> None:
    supernet = open_zoo(name)
    assert supernet.samples is not None
    accuracy = supernet.samples.accuracy
    assert 1 / len(supernet.class_names) < accuracy.min()
    assert accuracy.max() < 1


# -- model cards -----------------------------------------------------------------------


def rows(card: str) -> dict[str, str]:
    """The card's rows of two columns, by the first."""
    found = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, flags=re.MULTILINE)
    return dict(found)


def card_of(name: str) -> str:
    return (ZOO / name / "README.md").read_text(encoding="utf-8")


@each_supernet
def test_a_model_card_names_its_supernet_and_space(name: str) -> None:
    card = card_of(name)
    assert card.startswith(f"# Model card: {name}\n")
    assert f"`{open_zoo(name).space.name}`" in card


@each_supernet
@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ("data", r"\b[A-Z]\w+[- ]?\w*\b.* training images"),
        ("recipe", r"\d+ epochs\b"),
        ("hardware and time", r"\d+ (minutes|hours)\b"),
        ("calibration", r"\d+ images"),
        ("accuracy predictor", r"\d+ sub-networks"),
    ],
)
def test_a_model_card_says_how_the_supernet_was_made(
    row: str, fact: str, name: str
) -> None:
    assert re.search(fact, rows(card_of(name))[row])


@each_supernet
def test_a_model_card_counts_what_comes_along(name: str) -> None:
    supernet, told = open_zoo(name), rows(card_of(name))
    assert supernet.calibration is not None
    assert supernet.samples is not None
    assert f"{len(supernet.calibration)} images" in told["calibration"]
    assert (
        f"{len(supernet.samples.accuracy)} sub-networks" in (told["accuracy predictor"])
    )
    assert f"{supernet.samples.image_count:,} " in told["accuracy predictor"]


@each_supernet
def test_a_model_card_tells_the_test_accuracies_of_both_ends(name: str) -> None:
    space = open_zoo(name).space
    _, _, section = card_of(name).partition("\n## Test accuracy\n")
    for end in ("full", "smallest"):
        (line,) = (li for li in section.splitlines() if li.startswith(f"| {end} ("))
        assert re.search(r"\d\d\.\d+%", line)
    assert f"`{space.largest().id}`" in section
    assert f"`{space.smallest().id}`" in section
    assert re.search(r"[\d,]+ test images", section)


# -- latency tables --------------------------------------------------------------------


def test_a_table_comes_along() -> None:
    assert TABLES


@cache
def table_at(path: Path) -> LatencyTable:
    """A table, read once: the large ones take a second."""
    return LatencyTable.load(path)


def space_of(table: LatencyTable) -> SearchSpace:
    (space, *_) = (s for s in known_spaces() if space_sha256(s) == table.space_sha256)
    return space


@each_table
def test_a_table_is_measured_and_of_a_space_that_there_is(path: Path) -> None:
    table = table_at(path)
    assert table.origin == "measured"
    names_by_sha256 = {space_sha256(space): space.name for space in known_spaces()}
    assert names_by_sha256[table.space_sha256] == table.space_name


@each_table
def test_a_table_has_the_name_that_it_is_looked_for_by(path: Path) -> None:
    table = table_at(path)
    assert path.name == table_name(space_of(table), table.device, table.runtime)


@each_table
def test_a_table_holds_every_block_and_nothing_in_it_failed(path: Path) -> None:
    table = table_at(path)
    assert table.blocks.keys() == all_blocks(space_of(table)).keys()
    assert table.failures == {}


@each_table
def test_a_tables_latencies_are_what_its_raw_visits_say(path: Path) -> None:
    table = table_at(path)
    fitted = merge_tables([table])
    for field in ("blocks", "networks"):
        said, found = getattr(table, field), getattr(fitted, field)
        for name, entry in said.items():
            assert found[name].quiet_ms == pytest.approx(entry.quiet_ms, rel=5e-3)


@each_table
def test_a_tables_networks_are_predicted_within_a_few_percent(path: Path) -> None:
    table = table_at(path)
    predictor = fit_latency_predictor(space_of(table), table)
    assert predictor.residual_ratio < 0.03
