"""Folders that long calls work in: one call at a time, and away from the images."""

from __future__ import annotations

from pathlib import Path

import pytest

from ofa_deploy.errors import DataError, TrainingError
from ofa_deploy.work_folder import require_outside, working_alone


def test_a_folder_is_one_calls_at_a_time(tmp_path: Path) -> None:
    work = tmp_path / "not" / "yet there"
    refused = pytest.raises(
        TrainingError, match=r"^another call is at work in .*there;"
    )
    with working_alone(work), refused, working_alone(work):
        pytest.fail("two are at work")
    with working_alone(work):  # the first one has left
        pass


def test_another_folder_is_free(tmp_path: Path) -> None:
    with working_alone(tmp_path / "a"), working_alone(tmp_path / "b"):
        pass


def test_a_file_is_no_folder_to_work_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused = pytest.raises(TrainingError, match=r"file cannot be worked in: .*Name a")
    with refused, working_alone(tmp_path / "file"):
        pytest.fail("a file is no folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("inside", ["images", "images/run", "images/a/../run"])
def test_nothing_is_written_among_the_images(inside: str, tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"^out=.* is in the folder of the images"):
        require_outside("out", tmp_path / inside, tmp_path / "images")


def test_beside_the_images_there_is_room(tmp_path: Path) -> None:
    for data in (tmp_path / "images", str(tmp_path / "images"), object(), None):
        require_outside("out", tmp_path / "images.work", data)
