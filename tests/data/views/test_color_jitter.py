import io
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from beit_fast.data.views.color_jitter import apply_jitter, jitter_coefficients, jitter_views

ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
FACTORS = ((0.6, 1.4, 0.8), (1.3, 0.7, 1.4), (1.4, 1.4, 1.4), (0.6, 0.6, 0.6), (1.0, 1.0, 1.0))


def pillow(image, steps):
    image = Image.fromarray(image)
    for name, factor in steps:
        image = ENHANCE[name](image).enhance(factor)
    return np.asarray(image)


def ours(image, steps, whole=None):
    """`image` jittered as a crop of `whole`, or of itself."""
    coefficients = jitter_coefficients(steps, image if whole is None else whole)
    return apply_jitter(torch.from_numpy(image)[None], torch.from_numpy(coefficients)[None])[0]


@pytest.fixture
def batch():
    """Seven images, which is no whole number of blocks, and a different jitter for each."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 30, 20, 3), np.uint8)
    steps = [
        tuple((name, rng.uniform(0.6, 1.4)) for name in rng.permutation(list(ENHANCE)))
        for _ in images
    ]
    numbers = [jitter_coefficients(each, image) for image, each in zip(images, steps, strict=True)]
    expected = [pillow(image, each) for image, each in zip(images, steps, strict=True)]
    return (torch.from_numpy(np.stack(x)) for x in (images, numbers, expected))


@pytest.mark.parametrize("names", list(permutations(ENHANCE)), ids="-".join)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_an_image_that_is_not_cropped_is_jittered_as_pillow_does(names, factors, make_image):
    image = np.array(make_image(40, 50))  # so small that the grey mean is that of all pixels
    steps = tuple(zip(names, factors, strict=True))
    assert np.array_equal(ours(image, steps), pillow(image, steps))


def test_every_colour_extreme_is_jittered_as_pillow_does():
    levels = np.array([0, 1, 2, 127, 128, 253, 254, 255], np.uint8)
    image = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, 32, 3)
    for names in permutations(ENHANCE):
        for factors in (*FACTORS, (0.0, 2.0, 2.0), (2.0, 0.0, 1.5)):
            steps = tuple(zip(names, factors, strict=True))
            assert np.array_equal(ours(image, steps), pillow(image, steps))


def test_each_image_of_a_batch_gets_its_own_jitter(batch):
    images, coefficients, expected = batch
    before = images.clone()
    assert torch.equal(apply_jitter(images, coefficients), expected)
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_jitters_as_pillow_does_and_the_host_waits_for_nothing(batch):
    images, coefficients, expected = (x.cuda() for x in batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = apply_jitter(images, coefficients)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result, expected)


def test_autocast_changes_no_level(batch):
    images, coefficients, expected = batch
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_jitter(images, coefficients), expected)


def test_it_is_one_graph_to_the_compiler(batch):
    images, coefficients, expected = batch
    compiled = torch.compile(apply_jitter, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, coefficients), expected)


def test_an_empty_batch_stays_empty():
    images, coefficients = torch.zeros(0, 8, 6, 3, dtype=torch.uint8), torch.zeros(0, 3, 3)
    assert apply_jitter(images, coefficients).shape == (0, 8, 6, 3)


def test_contrast_is_about_the_mean_of_the_whole_image_and_not_of_the_crop():
    image = np.zeros((90, 90, 3), np.uint8)
    image[:, 45:] = 200  # grey mean 100
    steps = (("contrast", 0.5),)
    assert (ours(image[:10, :10].copy(), steps, image) - 50).abs().max() <= 2
    assert (ours(image[:10, -10:].copy(), steps, image) - 150).abs().max() <= 2


@pytest.mark.parametrize("names", list(permutations(ENHANCE)), ids="-".join)
def test_the_mean_estimated_from_some_pixels_is_near_that_of_all(names, photographs):
    for data in photographs[:4]:
        image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        steps = tuple(zip(names, (1.4, 1.3, 1.4), strict=True))
        before = pillow(image, steps[: names.index("contrast")])
        mean = np.asarray(Image.fromarray(before).convert("L")).mean()
        estimate = jitter_coefficients(steps, image)[names.index("contrast"), 2]
        assert abs(estimate - mean) < 3


def test_views_are_jittered_alike_and_the_rest_of_the_batch_stays(batch):
    images, coefficients, expected = batch
    given = {"images": images, "token_images": images[:, ::2], "mask": None, "jitter": coefficients}
    result = jitter_views(given)
    assert result.keys() == {"images", "token_images", "mask"}
    assert torch.equal(result["images"], expected)
    assert torch.equal(result["token_images"], expected[:, ::2])
    assert "jitter" in given
    assert jitter_views(result) is result
