from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.gpu import why_no_gpu

REPOSITORY = Path(__file__).resolve().parent.parent
CIFAR10_VARIABLE = "OFA_DEPLOY_CIFAR10"

# How long an example takes is the machine's business, not the law's. What fails is told
# in a form that a later run can be given.
hypothesis.settings.register_profile(
    "laws",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("laws")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := why_no_gpu()):
        pytest.skip(f"needs a GPU: {reason}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor leave anything in the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def quick_exports() -> Iterator[None]:
    """For modules that have torch write many networks as ONNX."""
    from tests.support.quick_export import export_quickly

    with pytest.MonkeyPatch.context() as patch:
        export_quickly(patch)
        yield


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """Folder of the real CIFAR-10 images; the test is skipped where there is none."""
    named = os.environ.get(CIFAR10_VARIABLE)
    folder = Path(named or REPOSITORY.parent / "shared" / "data" / "cifar10")
    if not folder.is_dir():
        if named:  # a mistyped path must not pass for "not available"
            pytest.fail(f"{CIFAR10_VARIABLE}={named} is not a folder")
        pytest.skip(f"no CIFAR-10 in {folder}; name it in {CIFAR10_VARIABLE}")
    return folder
