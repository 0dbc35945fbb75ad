"""What a call keeps for itself is read again, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="networks of one's own are shrunk with torch")

from ofa_deploy.errors import TrainingError
from ofa_deploy.shrink.resume_store import recall, remember, remembered
from ofa_deploy.shrink.to_budget import _read_log

contents = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(contents)
def test_what_is_kept_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    path = tmp_path_factory.mktemp("kept") / "folder" / "kept.json"
    remember(path, content)
    assert recall(path) == content


def test_what_was_found_is_not_looked_for_again(tmp_path: Path) -> None:
    found = iter([1, 2])
    path = tmp_path / "kept.json"
    assert remembered(path, lambda: next(found)) == 1
    assert remembered(path, lambda: next(found)) == 1
    assert remembered(None, lambda: next(found)) == 2


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000])
def test_what_is_damaged_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(TrainingError, match=r"kept.json is damaged .*; remove it"):
        recall(path)


@pytest.mark.parametrize("text", ["[1]", "1", '{"count": 1}', '{"format_version": 2}'])
def test_what_another_version_kept_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(text)
    with pytest.raises(TrainingError, match="by another version; remove it"):
        recall(path)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "kept.json").mkdir()
    with pytest.raises(TrainingError, match=r"kept.json cannot be read: .*Check its"):
        recall(tmp_path / "kept.json")


def test_a_damaged_line_of_a_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 1}\n{"epo\n')
    with pytest.raises(TrainingError, match=r"line 2 of .*log.jsonl is damaged"):
        _read_log(path)
    path.write_text('{"epoch": 1}\n')
    assert _read_log(path) == ({"epoch": 1},)
    assert _read_log(tmp_path / "none.jsonl") == ()
