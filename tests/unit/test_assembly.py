"""What a bundle says of where it was made."""

from __future__ import annotations

from importlib.metadata import version

from profilers.backends.base import installed_version


def test_a_package_under_another_name_loses_no_bundle() -> None:
    """Such as onnxruntime-openvino, whose module is imported as any other's."""
    assert installed_version("no-such-distribution") == "unknown"
    assert installed_version("numpy") == version("numpy")
