"""A supernet's folder is one once it is whole, and not before."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from ofa_deploy import stored
from ofa_deploy.errors import FormatError
from ofa_deploy.stored import read_supernet, write_supernet
from profilers.files import write_atomically
from tests.support import tiny

FILES = 5  # weights, calibration, predictor, its samples, and the description


@pytest.mark.parametrize("written", range(FILES))
def test_a_folder_whose_writing_was_killed_is_no_supernet(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Path] = []

    def killed(path: Path, content: bytes) -> None:
        if len(done) == written:
            raise KeyboardInterrupt
        write_atomically(path, content)
        done.append(path)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(stored, "write_atomically", killed)
        write_supernet(tmp_path, tiny.stored())
    assert len(list(tmp_path.iterdir())) == written
    with pytest.raises(FormatError, match="is not a supernet's folder"):
        read_supernet(tmp_path)
    write_supernet(tmp_path, tiny.stored())
    assert len(list(tmp_path.iterdir())) == FILES
    assert read_supernet(tmp_path).space == tiny.SPACE
