"""Files that are written whole, read in parts, and cleaned up after a kill."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profilers import files
from profilers.errors import FormatError
from profilers.files import remove_leftovers, sha256_of, write_atomically
from profilers.json_reader import parse_json


@given(content=st.binary(max_size=40), block=st.integers(1, 50))
def test_a_digest_is_of_all_blocks(
    content: bytes, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "content"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK_BYTES", block)
        assert sha256_of(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("older_than_s", [0.0, 3600.0])
def test_what_a_kill_left_of_a_file_goes_once_it_is_old(
    older_than_s: float, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    write_atomically(path, b"whole")
    new, old = tmp_path / ".table.json.ab", tmp_path / ".table.json.cd"
    other = tmp_path / ".other.json.ef"
    for file in (new, old, other):
        file.touch()
    long_ago_s = time.time() - 7200
    os.utime(old, (long_ago_s, long_ago_s))
    remove_leftovers(path, older_than_s=older_than_s)
    left = {file.name for file in tmp_path.iterdir()}
    recent = {new.name} if older_than_s else set()
    assert left == {path.name, other.name} | recent


def test_keys_that_appear_twice_are_named_however_many_there_are() -> None:
    """Compared with each other one by one, so many would take hours."""
    keys = [f'"{number}": 0' for number in range(200_000)]
    text = "{" + ", ".join([*keys, '"7": 0', '"3": 0']) + "}"
    with pytest.raises(FormatError, match=r"keys \['3', '7'\] appear twice"):
        parse_json(text)
