"""Every example runs as it stands, and stays short."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ofa_deploy.pipeline import DEFAULT_SUPERNET
from ofa_deploy.zoo import zoo_names

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
LAUNCHER = REPOSITORY / "tests" / "support" / "quick_example.py"
MOST_LINES = 80

needs_zoo = pytest.mark.skipif(
    DEFAULT_SUPERNET not in zoo_names(),
    reason=f"the zoo has no supernet {DEFAULT_SUPERNET!r}",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the latency table of the first example for the next ones."""
    return tmp_path_factory.mktemp("cache")


def attempt(
    name: str, *words: str | Path, cache: Path
) -> subprocess.CompletedProcess[str]:
    """Run an example, whatever comes of it."""
    return subprocess.run(
        [sys.executable, LAUNCHER, EXAMPLES / name, *words],
        cwd=cache,
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def run(name: str, *words: str | Path, cache: Path) -> str:
    """Run an example; what it prints."""
    done = attempt(name, *words, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_under_80_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES


def test_every_example_is_run_here() -> None:
    content = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in content] == []


@pytest.mark.slow
@pytest.mark.quiet
@needs_zoo
def test_a_bundle_is_made_and_used(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    made = run("specialize_for_a_budget.py", "--out", out, cache=cache)
    assert f"bundle    {out}" in made
    used = run("use_a_bundle.py", out, cache=cache)
    assert used.startswith("intact;")
    assert used.count("%") == 3  # the top three classes


@pytest.mark.slow
@pytest.mark.quiet
@needs_zoo
def test_many_budgets_gives_a_row_for_each(cache: Path) -> None:
    shown = run("many_budgets.py", "--count", "4", cache=cache)
    assert shown.count("r24-") + shown.count("r28-") + shown.count("r32-") == 4


@pytest.mark.slow
@pytest.mark.quiet
def test_a_supernet_is_trained_and_specialised(cache: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "mine", "--epochs-scale", "0.1")
    shown = run("train_your_own.py", *words, cache=cache)
    assert f"{tmp_path / 'mine' / 'bundle'}: " in shown
    # A second call goes on with what is there.
    shutil.rmtree(tmp_path / "mine" / "bundle")
    shown = run("train_your_own.py", *words, cache=cache)
    assert f"{tmp_path / 'mine' / 'bundle'}: " in shown


@pytest.mark.slow
def test_a_network_of_ones_own_is_shrunk(cache: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "mine", "--latency-ms", "100")
    shown = run("shrink_your_own.py", *words, cache=cache)
    assert f"{tmp_path / 'mine'}: " in shown
    # A second call leaves the bundle alone, and says so.
    refused = attempt("shrink_your_own.py", *words, cache=cache)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert str(tmp_path / "mine") in refused.stderr
