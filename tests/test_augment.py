"""Random changes of pictures: alike for all frames of a sample, and what they are by hand."""

import numpy as np
import pytest

from selfflow.datasets.augment import (
    LUMA,
    Augment,
    Change,
    apply,
    colour_matrix,
    coloured,
    draw,
    resize,
)

IMAGE = np.random.default_rng(0).integers(40, 200, (24, 30, 3)).astype(np.uint8)


def test_without_augmentation_nothing_changes() -> None:
    assert draw(np.random.default_rng(0), Augment()) == Change()
    frames = IMAGE[None].copy()
    apply(Change(), frames)
    np.testing.assert_array_equal(frames[0], IMAGE)


def test_frames_of_a_sample_change_alike() -> None:
    wild = Augment(crop=0.5, brightness=0.4, contrast=0.4, saturation=0.9, hue=0.4)
    for seed in range(20):
        change = draw(np.random.default_rng(seed), wild, shift=2)
        assert change.box is not None
        left, top, right, bottom = change.box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert (right - left) * (bottom - top) > 0.45
        frames = np.stack([resize(IMAGE, 12, 15, change.box)] * 2)
        apply(change, frames)
        np.testing.assert_array_equal(*frames)
        assert np.abs(frames[0].astype(int) - resize(IMAGE, 12, 15)).max() > 3


def test_a_crop_is_that_part_of_the_picture() -> None:
    rows = np.repeat(np.arange(0, 200, 2, dtype=np.uint8), 3).reshape(100, 1, 3)
    ramp = np.tile(rows, (1, 100, 1))
    part = resize(ramp, 50, 100, (0.0, 0.5, 1.0, 1.0))
    np.testing.assert_allclose(part[1:-1, 5, 0], 100 + 2 * np.arange(1, 49), atol=1)
    assert part[0, 0, 0] >= 98


def test_colours_by_hand() -> None:
    grey = np.full((1, 4, 4, 3), 100, np.uint8)
    pixels = IMAGE[None]

    def through(images: np.ndarray, *colour: float) -> np.ndarray:
        mean = float(images.mean((0, 1, 2)) @ LUMA)
        return coloured(images, colour_matrix(tuple(map(float, colour)), mean)).astype(float)

    np.testing.assert_allclose(through(grey, 1.2, 1, 1, 0), 120, atol=1)
    np.testing.assert_allclose(through(grey, 1, 0.5, 1, 0), 100, atol=1)  # its own mean
    np.testing.assert_allclose(through(grey, 1.2, 0.5, 1, 0), 120, atol=1)  # as brightened
    np.testing.assert_allclose(through(grey, 1, 1, 0.3, 2.0), 100, atol=1)  # grey stays grey
    np.testing.assert_allclose(
        through(pixels, 1, 0.5, 1, 0), 0.5 * pixels + 0.5 * (pixels.mean((0, 1, 2)) @ LUMA), atol=1
    )
    dull = through(pixels, 1, 1, 0, 0)
    np.testing.assert_allclose(dull, (pixels @ LUMA)[..., None].repeat(3, -1), atol=1)
    np.testing.assert_allclose(through(pixels, 1, 1, 1, 2 * np.pi), pixels, atol=1)
    red = np.tile(np.array([180, 90, 90], np.uint8), (1, 4, 4, 1))
    turned = through(red, 1, 1, 1, 2 * np.pi / 3)[0, 0, 0]
    assert turned.argmax() != 0
    assert turned @ LUMA == pytest.approx(red[0, 0, 0] @ LUMA, abs=1.5)


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.2}, {"hue": 0.6}, {"contrast": -0.1}])
def test_impossible_augmentation_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"augment.{next(iter(wrong))}"):
        Augment(**wrong)
