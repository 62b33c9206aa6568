from itertools import permutations

import numpy as np
import pytest
from PIL import ImageEnhance

from beit_fast.data.color_jitter import jitter

ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
FACTORS = ((0.6, 1.4, 0.8), (1.3, 0.7, 1.4), (1.4, 1.4, 1.4), (0.6, 0.6, 0.6), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("names", list(permutations(ENHANCE)), ids="-".join)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_the_whole_image_is_jittered_as_pillow_does(names, factors, make_image):
    image = make_image(120, 90)
    steps = tuple(zip(names, factors, strict=True))
    expected = image
    for name, factor in steps:
        expected = ENHANCE[name](expected).enhance(factor)
    ours = np.array(image)
    jitter((ours,), steps, np.array(image))
    difference = ours.astype(np.int32) - np.asarray(expected)
    # Pillow truncates after each step where we round once; factors above 1 stretch that.
    assert np.abs(difference).max() <= 4
    assert abs(difference.mean()) < 1.1


def test_contrast_is_about_the_mean_of_the_whole_image_and_not_of_the_crop():
    image = np.zeros((90, 90, 3), np.uint8)
    image[:, 45:] = 200  # grey mean 100
    dark, bright = image[:10, :10].copy(), image[:10, -10:].copy()
    jitter((dark, bright), (("contrast", 0.5),), image)
    assert np.abs(dark.astype(int) - 50).max() <= 2
    assert np.abs(bright.astype(int) - 150).max() <= 2


def test_no_value_wraps_around():
    image = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    for steps in (
        (("contrast", 1.4), ("brightness", 1.4), ("saturation", 1.4)),
        (("saturation", 0.6), ("brightness", 0.6), ("contrast", 0.6)),
    ):
        ours = image.copy()
        jitter((ours,), steps, image)
        assert ours[0, 0].max() < 60
        assert ours[0, 1].min() > 100


def test_views_larger_than_a_block_are_jittered_to_their_last_row(make_image):
    view = np.full((301, 500, 3), 100, np.uint8)
    jitter((view,), (("brightness", 1.5), ("contrast", 1.0)), np.full((5, 5, 3), 100, np.uint8))
    assert len(np.unique(view)) == 1
    assert view[0, 0, 0] == 149


def test_no_steps_leave_the_views_as_they_are(make_image):
    view = np.array(make_image(9, 9))
    before = view.copy()
    jitter((view,), (), view)
    assert np.array_equal(view, before)
