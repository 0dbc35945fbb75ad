"""Images come in batches: each once, none by itself, the fewer the larger they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_deploy.batches import evaluation_batch, in_batches, statistics_batch

LARGEST_MAP_BYTES = 4 * 96 * 112**2  # of an image of 224 pixels, of the widest space


@given(count=st.integers(2, 600), size=st.integers(2, 300))
def test_every_image_is_in_one_batch_and_none_is_alone(count: int, size: int) -> None:
    parts = in_batches(count, size)
    images = np.arange(count)
    assert np.concatenate([images[part] for part in parts]).tolist() == images.tolist()
    lengths = [len(images[part]) for part in parts]
    assert min(lengths) > 1
    assert max(lengths) <= size + 1


@given(st.integers(8, 1024))
def test_larger_images_come_in_smaller_batches(resolution: int) -> None:
    assert evaluation_batch(resolution) >= evaluation_batch(resolution + 8) >= 16
    assert statistics_batch(resolution) >= statistics_batch(resolution + 8) >= 64


@pytest.mark.parametrize("batch", [evaluation_batch(224), statistics_batch(224)])
def test_batches_of_large_images_take_no_gigabytes(batch: int) -> None:
    # Statistics hold three maps of a layer at a time.
    assert 3 * batch * LARGEST_MAP_BYTES < 1e9


def test_small_images_come_as_they_always_did() -> None:
    assert [evaluation_batch(size) for size in (24, 32, 64)] == [250] * 3
    assert [statistics_batch(size) for size in (24, 32, 64)] == [200] * 3
