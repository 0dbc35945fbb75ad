from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_deploy import preprocess
from ofa_deploy.errors import DataError, FormatError
from ofa_deploy.preprocess import (
    Normalisation,
    decode_normalisation,
    measure_normalisation,
    prepare,
    require_pixel_scale,
    resize,
)
from ofa_deploy.train.augment import (
    crop_and_flip,
    cut_and_mix,
    distort,
    network_input,
)
from profilers.json_reader import JsonNode
from tests.support import tiny

IMAGES = tiny.images(per_class=4).images
PLAIN = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_normalised_training_images_have_mean_zero_and_spread_one() -> None:
    values = measure_normalisation(IMAGES).apply(IMAGES)
    np.testing.assert_allclose(values.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(values.std((0, 2, 3)), 1, atol=1e-5)


def test_statistics_do_not_depend_on_how_many_pixels_are_looked_at_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = measure_normalisation(IMAGES)
    monkeypatch.setattr(preprocess, "PIXELS_AT_A_TIME", 7)
    assert measure_normalisation(IMAGES) == whole
    flat = IMAGES.reshape(-1, 3)
    assert whole.std == pytest.approx(flat.std(axis=0, dtype=np.float64), rel=1e-12)


def test_a_channel_of_one_value_is_zero_once_normalised() -> None:
    images = IMAGES.copy()
    images[..., 1] = 40
    values = measure_normalisation(images).apply(images)
    assert np.isfinite(values).all()
    assert not values[:, 1].any()


def test_each_channel_is_normalised_by_its_own_figures() -> None:
    normalisation = Normalisation(mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
    image = np.full((1, 1, 1, 3), 40, dtype=np.uint8)
    assert normalisation.apply(image)[0, :, 0, 0].tolist() == [30.0, 10.0, 2.5]


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "255 times as much"),
        ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), "which are of pixels of 0 to 1"),
        ((0.485, 0.456, 0.406), (1.0, 1.0, 1.0), "which are of pixels of 0 to 1"),
        ((0.0, 0.0, 0.0), (60.0, 0.0, 60.0), "a std above 0"),
        ((0.0, float("nan"), 0.0), (60.0, 60.0, 60.0), "give finite numbers"),
    ],
)
def test_statistics_of_other_pixels_are_refused(
    mean: tuple[float, float, float], std: tuple[float, float, float], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        require_pixel_scale(Normalisation(mean=mean, std=std))


def test_inputs_that_are_pixels_as_they_are_are_allowed() -> None:
    require_pixel_scale(PLAIN)
    require_pixel_scale(tiny.NORMALISATION)


def test_channels_come_before_rows_and_columns() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(1, 2, 3, 3)
    assert PLAIN.apply(image)[0, 1].tolist() == [[1, 4, 7], [10, 13, 16]]


def test_a_network_input_is_float32_and_contiguous() -> None:
    inputs = prepare(IMAGES, resolution=8, normalisation=PLAIN)
    assert inputs.dtype == np.float32
    assert inputs.shape == (len(IMAGES), 3, 8, 8)
    assert inputs.flags.c_contiguous


def test_resizing_to_the_same_size_changes_nothing() -> None:
    assert np.array_equal(resize(IMAGES, 12), IMAGES)


@given(value=st.integers(0, 255), size=st.integers(1, 40))
def test_a_plain_colour_stays_plain_at_every_size(value: int, size: int) -> None:
    images = np.full((1, 12, 9, 3), value, dtype=np.uint8)
    resized = resize(images, size)
    assert np.array_equal(resized, np.full((1, size, size, 3), value, dtype=np.uint8))


@pytest.mark.parametrize("resolution", [8, 10, 12, 16])
def test_training_and_deployment_see_the_same_input(resolution: int) -> None:
    deployed = prepare(IMAGES, resolution=resolution, normalisation=tiny.NORMALISATION)
    trained = network_input(
        torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()),
        resolution=resolution,
        normalisation=tiny.NORMALISATION,
    )
    grey_values = np.abs(trained.numpy() - deployed) * np.array(
        tiny.NORMALISATION.std
    ).reshape(1, 3, 1, 1)
    # Deployment rounds once per axis, to whole grey values.
    assert grey_values.max() <= 1.001


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((12, 12, 3), dtype=np.uint8),
        np.zeros((1, 12, 12, 1), dtype=np.uint8),
        np.zeros((1, 12, 12, 3), dtype=np.float32),
    ],
    ids=["one image", "one channel", "floats"],
)
def test_arrays_that_are_no_images_are_refused(images: Any) -> None:
    with pytest.raises(DataError) as caught:
        prepare(images, resolution=8, normalisation=PLAIN)
    assert str(caught.value) == (
        "images must be uint8 of shape (count, height, width, 3); got "
        f"{images.dtype} of shape {images.shape}"
    )


def test_a_normalisation_survives_json() -> None:
    node = JsonNode({"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]})
    assert decode_normalisation(node) == Normalisation(
        mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0)
    )


@pytest.mark.parametrize(
    ("mean", "std", "path"),
    [
        ([1.0, 2.0], [1.0, 1.0, 1.0], ""),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], ""),
        ([1.0, 2.0, 3.0], [1.0, 0.0, 1.0], "std[1]"),
        ([1.0, "2", 3.0], [1.0, 1.0, 1.0], "mean[1]"),
    ],
)
def test_a_normalisation_that_makes_no_sense_is_refused(
    mean: list[Any], std: list[Any], path: str
) -> None:
    with pytest.raises(FormatError) as caught:
        decode_normalisation(JsonNode({"mean": mean, "std": std}))
    assert caught.value.path == path


# -- augmentation ----------------------------------------------------------------------


def test_without_shift_an_image_stays_or_is_mirrored() -> None:
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    found = crop_and_flip(images, padding=0, rng=np.random.default_rng(0))
    mirrored = [
        bool(torch.equal(f, i.flip(2))) for f, i in zip(found, images, strict=True)
    ]
    same = [bool(torch.equal(f, i)) for f, i in zip(found, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)


def test_augmentation_repeats_with_its_seed() -> None:
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    first, again = (
        crop_and_flip(images, padding=2, rng=np.random.default_rng(4)) for _ in range(2)
    )
    assert torch.equal(first, again)


def test_augmentation_keeps_shape_and_type() -> None:
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    found = crop_and_flip(images, padding=2, rng=np.random.default_rng(4))
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)


# -- mixtures --------------------------------------------------------------------------


def mixtures(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images, each all of one value and one class, mixed."""
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 10, 12)
    return cut_and_mix(images, torch.eye(8), rng=np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_mixed_by_the_pixels_each_image_gave(seed: int) -> None:
    images, targets = mixtures(seed)
    for image, target in zip(images, targets, strict=True):
        values, counts = image[0].unique(return_counts=True)
        expected = torch.zeros(8)
        expected[values.long()] = counts.float() / image[0].numel()
        torch.testing.assert_close(target, expected)
        assert (image == image[:1]).all()  # one box for all channels


def test_mixtures_are_of_all_sizes() -> None:
    largest = [float(mixtures(seed)[1].max(dim=1).values.min()) for seed in range(50)]
    assert min(largest) < 0.6
    assert max(largest) > 0.95


def test_mixing_leaves_its_arguments_alone() -> None:
    images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    before = images.clone()
    cut_and_mix(images, torch.eye(4), rng=np.random.default_rng(0))
    assert torch.equal(images, before)


# -- distortions -----------------------------------------------------------------------

strengths = st.floats(0.05, 1)


def pictures(count: int = 8, side: int = 12) -> torch.Tensor:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return torch.from_numpy(pixels)


def test_no_strength_distorts_nothing() -> None:
    images = pictures()
    found = distort(images, strength=0.0, rng=np.random.default_rng(0))
    torch.testing.assert_close(found, images.float(), atol=0.01, rtol=0)


@settings(max_examples=25, deadline=None)
@given(strengths, st.integers(0, 1000), st.booleans())
def test_distorted_images_stay_images(strength: float, seed: int, real: bool) -> None:
    images = pictures().float() if real else pictures()
    kept = images.clone()
    found = distort(images, strength=strength, rng=np.random.default_rng(seed))
    assert found.shape == images.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 255
    assert torch.equal(images, kept)
    again = distort(images, strength=strength, rng=np.random.default_rng(seed))
    assert torch.equal(found, again)


@settings(max_examples=25, deadline=None)
@given(strengths, st.integers(0, 1000))
def test_distortion_adds_no_border(strength: float, seed: int) -> None:
    """An image of one colour stays one, whatever its shape becomes."""
    images = torch.tensor([10, 128, 250], dtype=torch.uint8)
    images = images[None, :, None, None].expand(16, 3, 12, 12).clone()
    found = distort(images, strength=strength, rng=np.random.default_rng(seed))
    spread = found.amax((2, 3)) - found.amin((2, 3))
    assert float(spread.max()) < 0.01


def test_every_image_is_distorted_in_its_own_way() -> None:
    images = pictures(1).expand(32, 3, 12, 12).clone()
    found = distort(images, strength=0.5, rng=np.random.default_rng(0))
    assert len(torch.unique(found.flatten(1), dim=0)) == len(found)


def test_half_of_the_images_keep_their_shape() -> None:
    """Recoloured alone, a pixel stays as bright beside others as it was."""
    images = 100 + pictures(200) / 10
    found = distort(images, strength=0.2, rng=np.random.default_rng(0))
    before, after = images.mean(1).flatten(1), found.mean(1).flatten(1)
    pairs = zip(before, after, strict=True)
    likeness = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    assert 70 <= sum(one > 0.999 for one in likeness) <= 130
