from __future__ import annotations

from types import ModuleType

import pytest

import ofa_deploy

# What a module needs for its own text. Other helpers are imported under a private name.
LANGUAGE = {"annotations", "TYPE_CHECKING"}


def eager_names() -> set[str]:
    """Public names that `import ofa_deploy` defines, its submodules aside."""
    return {
        name
        for name, value in vars(ofa_deploy).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and name not in LANGUAGE
    }


def test_all_is_sorted_and_without_repetition() -> None:
    assert list(ofa_deploy.__all__) == sorted(set(ofa_deploy.__all__))


def test_every_public_name_is_in_all() -> None:
    assert eager_names() <= set(ofa_deploy.__all__)


@pytest.mark.parametrize("name", ofa_deploy.__all__)
def test_every_name_in_all_can_be_imported(name: str) -> None:
    # Late names (PEP 562) are found here and not by eager_names().
    assert getattr(ofa_deploy, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    name = "no_such_name"
    with pytest.raises(AttributeError, match=name):
        getattr(ofa_deploy, name)
