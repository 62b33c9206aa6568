"""Distortion is mmsegmentation's, its colours OpenCV's."""

import hashlib
import random

import numpy as np
import pytest

from beit_fast.data.views.distortion import (
    Distortion,
    distort,
    draw_distortion,
    hsv_of_rgb,
    rgb_of_hsv,
)
from masked_images import picture


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# Of what opencv-python-headless 4.10 and 5.0 give on a CPU with AVX2, as contiguous arrays: of
#   i = np.arange(256, dtype=np.uint8)
#   b, g, r = np.meshgrid(i, i, i, indexing="ij")
#   cv2.cvtColor(np.stack([r, g, b], -1).reshape(256, 65536, 3), cv2.COLOR_RGB2HSV)
#   h, s, v = np.meshgrid(i[:180], i, i, indexing="ij")
#   cv2.cvtColor(np.stack([h, s, v], -1).reshape(180, 65536, 3), cv2.COLOR_HSV2RGB)
OPENCV_RGB2HSV = "cc4c8f3a2064ffaed3776170c4dfa02c90011b02dbc7ece07b7fced54069ad55"
OPENCV_HSV2RGB = "cf2763d893cfed37873c3062fb3b644ac3d2c35a59299550e0e82c8f6874eb48"


def test_every_colour_goes_to_hsv_and_back_as_opencv_has_it():
    hsv = hsv_of_rgb()
    parts = np.stack([hsv >> 16, (hsv >> 8) & 255, hsv & 255], -1).astype(np.uint8)
    assert sha256(parts) == OPENCV_RGB2HSV
    rgb = rgb_of_hsv()
    assert not (rgb >> 24).any()
    assert sha256(rgb.view(np.uint8).reshape(-1, 4)[:, :3]) == OPENCV_HSV2RGB


# Of mmsegmentation's steps by NumPy and OpenCV, as above, on `picture(64, 96)` as BGR.
@pytest.mark.parametrize(
    ("steps", "digest"),
    [
        ({"brightness": 17.3}, "16e5a3e26d232e6f89bdbce3c0b760e4"),
        (
            {"brightness": -31.9, "contrast": 1.43, "contrast_first": True},
            "96012627f56e029194b23ce5e5522d92",
        ),
        ({"saturation": 0.57}, "1c5e8b5d9fc4847f9015e5a3c6d415de"),
        ({"hue": -18}, "53d37a22cbe29b26f2cba3b1aa9c797e"),
        (
            {"brightness": 11.1, "contrast": 0.61, "saturation": 1.49, "hue": 17},
            "8c73567207f67e3820fd6ea413e7bcad",
        ),
        (
            {
                "brightness": -5.5,
                "contrast": 1.2,
                "contrast_first": True,
                "saturation": 1.31,
                "hue": -3,
            },
            "5b5059353c4a9d26c0a4f0272b918436",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_distorted_images_are_those_of_opencv(steps, digest):
    image = picture(64, 96)
    assert sha256(distort(image, Distortion(**steps)))[:32] == digest
    assert np.array_equal(image, picture(64, 96))  # not written into


def test_nothing_drawn_changes_nothing():
    image = picture(5, 7)
    assert np.array_equal(distort(image, Distortion()), image)


def test_each_step_is_in_by_a_coin_and_within_its_range():
    rng = random.Random(0)
    drawn = [draw_distortion(rng) for _ in range(4000)]
    for step, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = [value for each in drawn if (value := getattr(each, step)) is not None]
        assert abs(len(values) / 4000 - 0.5) < 0.04, step  # five standard deviations
        assert low <= min(values) < low + 0.02 * (high - low), step
        assert high - 0.02 * (high - low) < max(values) <= high, step
    assert {each.hue for each in drawn} == {None, *range(-18, 18)}
    assert abs(sum(each.contrast_first for each in drawn) / 4000 - 0.5) < 0.04
