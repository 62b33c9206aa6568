import hashlib
import random

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.views.config import SingleViewConfig
from beit_fast.data.views.single_view import single_view


def positions(height: int, width: int, make_file) -> bytes:
    """An image that says where each pixel was: red its column, green its row, in shares of 255."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    return make_file(Image.fromarray(image), "PPM")


def spans(view: np.ndarray) -> tuple[float, float]:
    """Shares of the image's width and height that the view shows; negative width if flipped."""
    return (
        (float(view[0, -1, 0]) - view[0, 0, 0]) / 255,
        (float(view[-1, 0, 1]) - view[0, 0, 1]) / 255,
    )


def test_the_view_shows_what_the_paper_lets_it(make_file):
    # Square of the short side 400, shrunk to 144..192 px, of which 128: two thirds to 8/9 of it
    data = positions(400, 800, make_file)
    shares, flips, lefts = [], 0, []
    for i in range(200):
        view = single_view(data, SingleViewConfig(size=128), random.Random(i))
        assert view.shape == (128, 128, 3)
        assert view.dtype == np.uint8
        across, down = spans(view)
        assert abs(across) * 2 == pytest.approx(down, abs=0.03)  # a square stays one
        shares.append(down)
        flips += across < 0
        lefts.append(min(view[0, 0, 0], view[0, -1, 0]))
    assert 0.64 < min(shares) < 0.69
    assert 0.86 < max(shares) < 0.91
    assert 70 < flips < 130
    assert np.ptp(lefts) > 100


def test_an_image_barely_large_enough_is_shown_whole(make_file):
    across, down = spans(
        single_view(positions(64, 64, make_file), SingleViewConfig(size=64), random.Random(0))
    )
    assert abs(across) == down == 1


def test_a_smaller_scale_shows_less_and_never_less_than_the_size(make_file):
    data = positions(640, 640, make_file)
    config = SingleViewConfig(size=64, scale=(0.01, 0.2))
    shares = [spans(single_view(data, config, random.Random(i)))[1] for i in range(100)]
    assert max(shares) < 0.42  # sqrt(0.2) * 8/9, and a rounding
    assert min(shares) == pytest.approx(63 / 639, abs=0.03)


def test_shrinking_averages(make_file):
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[::2] = 200
    view = single_view(
        make_file(Image.fromarray(stripes), "PNG"), SingleViewConfig(size=32), random.Random(0)
    )
    assert np.abs(view.astype(int) - 100).max() < 15


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.1, 1.0)], ids=str)
def test_of_a_smaller_image_the_largest_square_is_enlarged(scale, make_image, make_file):
    image = make_image(60, 40)
    config = SingleViewConfig(size=64, scale=scale, hflip=0)
    tops = set()
    for i in range(20):
        view = single_view(make_file(image, "PNG"), config, random.Random(i))
        errors = [
            np.abs(view - np.asarray(square_of(image, top).resize((64, 64)), np.int32)).max()
            for top in range(21)
        ]
        assert min(errors) == 0  # bicubic, all of the width, some height
        tops.add(errors.index(0))
    assert len(tops) > 5
    across, down = spans(single_view(positions(9, 7, make_file), config, random.Random(0)))
    assert across == pytest.approx(1, abs=0.1)
    assert down == pytest.approx(6 / 8, abs=0.15)  # the edges of a pixel, not its centre


def square_of(image, top):
    return image.crop((0, top, 40, top + 40))


def test_views_of_large_images_are_those_of_earlier_versions(make_image, make_file):
    """A run that is resumed sees the crops it would have seen."""
    data = make_file(make_image(300, 200), "PNG")
    config = SingleViewConfig(size=48, scale=(0.2, 1.0))
    views = [single_view(data, config, random.Random(i)) for i in range(20)]
    assert hashlib.sha256(np.stack(views)).hexdigest()[:16] == "c050c3698949c004"


def test_the_view_is_a_function_of_the_generator(make_image, make_file):
    data = make_file(make_image(90, 120), "JPEG")
    config = SingleViewConfig(size=48)
    first, again, other = (single_view(data, config, random.Random(i)) for i in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_larger_file_than_allowed_is_bad(make_image, make_file):
    data = make_file(make_image(9, 9), "PNG")
    with pytest.raises(BadImageError, match="max_pixels=80"):
        single_view(data, SingleViewConfig(size=8, max_pixels=80), random.Random(0))
