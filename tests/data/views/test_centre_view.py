"""The view of an image that is evaluated."""

import io

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from beit_fast.data.views.centre_view import centre_view


def test_the_evaluation_view_is_the_centre_of_the_resized_image(tmp_path):
    pixels = np.arange(300 * 400 * 3, dtype=np.uint32).reshape(300, 400, 3).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    view = centre_view(data, (224, 224), 224 / 256)
    resized = Image.fromarray(pixels).resize((341, 256), Image.Resampling.BICUBIC)
    wanted = np.array(resized)[16 : 16 + 224, 58 : 58 + 224]
    np.testing.assert_array_equal(view, wanted)
    same = centre_view(data, (300, 400), 1.0)
    np.testing.assert_array_equal(same, pixels)


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(300, 401), (257, 199), (50, 60)])
def test_the_view_is_torchvisions_resize_and_centre_crop(shape, crop_pct):
    """0.9 is timm's: 248 pixels, not 248.9."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.save(file, "PNG")
    bicubic = v2.InterpolationMode.BICUBIC
    wanted = v2.CenterCrop(224)(v2.Resize(int(224 / crop_pct), interpolation=bicubic)(image))
    np.testing.assert_array_equal(centre_view(file.getvalue(), (224, 224), crop_pct), wanted)


def test_a_squashed_view_is_the_whole_image_at_that_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    view = centre_view(data, (16, 24), 1.0, "bilinear", "squash")
    np.testing.assert_array_equal(view, image.resize((24, 16), Image.Resampling.BILINEAR))
    assert not np.array_equal(view, centre_view(data, (16, 24), 1.0, "bicubic", "squash"))
    assert not np.array_equal(view, centre_view(data, (16, 24), 1.0, "bilinear"))
