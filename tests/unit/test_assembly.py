"""What a bundle says of where it was made."""

from __future__ import annotations

from importlib.metadata import version

from ofa_deploy.assembly import _version


def test_a_package_under_another_name_loses_no_bundle() -> None:
    """Such as onnxruntime-openvino, whose module is imported as any other's."""
    assert _version("no-such-distribution") == "unknown"
    assert _version("numpy") == version("numpy")
