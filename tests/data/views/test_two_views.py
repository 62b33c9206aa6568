import io
import os
import random
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.views.color_jitter import jitter_views
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.statistics import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD
from beit_fast.data.views.two_views import (
    VIEWS,
    draw_box,
    draw_view,
    make_views,
    normalize,
    two_views,
)

REFERENCE = ViewConfig(kind="reference")
FAST = ViewConfig(kind="fast")
JITTER = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
}


def official_views(data, draw, config):
    """The official order with torchvision's functions for PIL images."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for name, factor in draw.jitter:
        image = JITTER[name](image, factor)
    if draw.flip:
        image = tv.hflip(image)
    views = []
    for size, resample in (
        (config.size, tv.InterpolationMode.BICUBIC),
        (config.token_size, tv.InterpolationMode.LANCZOS),
    ):
        views.append(np.asarray(tv.resized_crop(image, *draw.box, size, resample)))
    return views


def psnr(ours, theirs):
    return 10 * np.log10(255**2 / max(((ours.astype(np.int32) - theirs) ** 2).mean(), 1e-9))


def finished_views(data, config, rng):
    """Both views of an image as the model and the tokenizer get them."""
    views = {name: torch.from_numpy(x)[None] for name, x in two_views(data, config, rng).items()}
    views = jitter_views(views)
    return views["images"][0].numpy(), views["token_images"][0].numpy()


def views_of(photographs, config, draws=2):
    return [
        finished_views(data, config, SampleSeed(0, epoch, i).rng("view"))
        for i, data in enumerate(photographs)
        for epoch in range(draws)
    ]


def test_reference_views_are_pixel_for_pixel_the_official_ones(photographs):
    orders, flips = set(), set()
    for i, data in enumerate(photographs):
        for epoch in range(2):
            seed = SampleSeed(0, epoch, i)
            width, height = Image.open(io.BytesIO(data)).size
            draw = draw_view(height, width, REFERENCE, seed.rng("view"))
            ours = finished_views(data, REFERENCE, seed.rng("view"))
            for view, expected in zip(ours, official_views(data, draw, REFERENCE), strict=True):
                assert np.array_equal(view, expected)
            orders.add(tuple(name for name, _ in draw.jitter))
            flips.add(draw.flip)
    assert len(orders) == 6
    assert flips == {True, False}


def test_fast_views_are_close_to_the_reference(photographs):
    measured = [
        (psnr(ours[k], theirs[k]), np.abs(ours[k].astype(np.int32) - theirs[k]).mean(), k)
        for ours, theirs in zip(
            views_of(photographs, FAST), views_of(photographs, REFERENCE), strict=True
        )
        for k in (0, 1)
    ]
    # The figures of two_views.py, with room for other draws.
    for k, median, worst, mean in ((0, 48, 34, 0.7), (1, 42, 30, 1.3)):
        values = np.array([(decibel, level) for decibel, level, view in measured if view == k])
        assert np.median(values[:, 0]) > median
        assert values[:, 0].min() > worst
        assert values[:, 1].mean() < mean


def test_without_jitter_fast_differs_by_rounding_in_the_encoder_view(photographs):
    fast, reference = replace(FAST, color_jitter=0.0), replace(REFERENCE, color_jitter=0.0)
    for ours, theirs in zip(
        views_of(photographs, fast), views_of(photographs, reference), strict=True
    ):
        assert psnr(ours[0], theirs[0]) > 50
        assert psnr(ours[1], theirs[1]) > 35  # bicubic for Lanczos


def test_both_transforms_use_the_same_numbers(photographs, monkeypatch):
    import beit_fast.data.views.two_views as views

    drawn = []
    draw = views.draw_view
    monkeypatch.setattr(views, "draw_view", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    for config in (REFERENCE, FAST):
        two_views(photographs[0], config, SampleSeed(3, 1, 4).rng("view"))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("kind", ["reference", "fast"])
def test_views_are_a_function_of_the_seed(kind, photographs):
    config = ViewConfig(kind=kind)

    def views(seed):
        return finished_views(photographs[0], config, seed.rng("view"))

    first = views(SampleSeed(0, 0, 0))
    for a, b in zip(first, views(SampleSeed(0, 0, 0)), strict=True):
        assert np.array_equal(a, b)
    for other in (SampleSeed(1, 0, 0), SampleSeed(0, 1, 0), SampleSeed(0, 0, 1)):
        assert not np.array_equal(first[0], views(other)[0])


@pytest.mark.parametrize("kind", ["reference", "fast"])
def test_an_exif_rotation_changes_neither_view(kind, photographs, make_file):
    image = Image.open(io.BytesIO(photographs[0]))
    tags = Image.Exif()
    tags[0x0112] = 6
    plain, rotated = make_file(image, "JPEG"), make_file(image, "JPEG", exif=tags.tobytes())
    config = ViewConfig(kind=kind)
    for a, b in zip(
        finished_views(plain, config, random.Random(0)),
        finished_views(rotated, config, random.Random(0)),
        strict=True,
    ):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (30, 20), (2, 500)], ids=str)
def test_tiny_images_and_strips_give_views_of_full_size(kind, shape, make_image, make_file):
    data = make_file(make_image(*shape), "PNG")
    config = ViewConfig(kind=kind, size=(96, 64), token_size=(48, 32))
    for i in range(20):
        view, token_view = finished_views(data, config, random.Random(i))
        assert view.shape == (96, 64, 3)
        assert token_view.shape == (48, 32, 3)
        assert view.dtype == token_view.dtype == np.uint8


@pytest.mark.parametrize("kind", ["reference", "fast"])
def test_each_view_is_the_same_without_the_other(kind, photographs):
    def make(*names):
        return make_views(photographs[2], ViewConfig(kind=kind), random.Random(4), *names)

    both, draw = make()
    for name in VIEWS:
        alone, same_draw = make((name,))
        assert same_draw == draw
        assert alone.keys() == both.keys() - set(VIEWS) | {name}
        for key, value in alone.items():
            assert np.array_equal(value, both[key])


@pytest.mark.parametrize("kind", ["reference", "fast"])
def test_a_file_that_cannot_be_decoded_is_bad(kind, photographs):
    with pytest.raises(BadImageError):
        two_views(photographs[0][:5000], ViewConfig(kind=kind), random.Random(0))
    with pytest.raises(BadImageError, match="max_pixels=1000"):
        two_views(photographs[0], ViewConfig(kind=kind, max_pixels=1000), random.Random(0))


def test_a_flip_mirrors_the_crop_of_the_mirrored_image(photographs):
    for kind in ("reference", "fast"):
        config = ViewConfig(kind=kind, color_jitter=0.0)
        flipped = replace(config, hflip=1.0)
        mirrored = Image.open(io.BytesIO(photographs[0])).transpose(Image.FLIP_LEFT_RIGHT)
        file = io.BytesIO()
        mirrored.save(file, "PNG")
        ours = finished_views(photographs[0], flipped, random.Random(1))
        theirs = finished_views(file.getvalue(), replace(config, hflip=0.0), random.Random(1))
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(a.astype(np.int32) - b).max() <= 1


def test_crops_have_the_areas_and_shapes_of_the_config():
    boxes = [draw_box(500, 500, (0.08, 1), (3 / 4, 4 / 3), random.Random(i)) for i in range(4000)]
    top, left, height, width = np.array(boxes).T
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 500
    area, ratio = height * width / 500**2, width / height
    assert area.min() == pytest.approx(0.08, abs=0.01)
    assert 0.74 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 1.35
    assert np.median(np.log(ratio)) == pytest.approx(0, abs=0.02)
    assert min(left.max(), top.max()) > 300


def test_a_box_that_never_fits_becomes_the_central_one():
    for i in range(50):
        assert draw_box(10, 4000, (0.9, 1), (3 / 4, 4 / 3), random.Random(i)) == (0, 1993, 10, 13)
        assert draw_box(4000, 12, (0.9, 1), (3 / 4, 4 / 3), random.Random(i)) == (1992, 0, 16, 12)
    # The whole image, where its own shape is allowed: no box of this area fits but itself
    for i in range(50):
        assert draw_box(30, 40, (1, 1), (1.33333, 1.4), random.Random(i)) == (0, 0, 30, 40)


def test_jitter_factors_are_uniform_and_the_order_is_random():
    draws = [draw_view(100, 100, FAST, random.Random(i)) for i in range(3000)]
    factors = np.array([factor for draw in draws for _, factor in draw.jitter])
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert factors.mean() == pytest.approx(1, abs=0.01)
    first = [draw.jitter[0][0] for draw in draws]
    assert all(abs(first.count(name) / 3000 - 1 / 3) < 0.05 for name in JITTER)
    assert sum(draw.flip for draw in draws) / 3000 == pytest.approx(0.5, abs=0.05)


def test_without_jitter_none_is_drawn():
    assert draw_view(9, 9, ViewConfig(color_jitter=0.0), random.Random(0)).jitter == ()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_fast_views_start_no_threads_of_their_own(photographs):
    counts = []

    def work():
        counts.append(len(os.listdir("/proc/self/task")))
        for data in photographs[:4]:
            two_views(data, FAST, random.Random(0))
        counts.append(len(os.listdir("/proc/self/task")))

    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)  # what torch would start in every thread that runs a large operation
    try:
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    finally:
        torch.set_num_threads(num_threads)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), (HALF_MEAN, HALF_STD)], ids=["1k", "half"]
)
def test_normalize_is_to_tensor_and_normalize_in_channels_last(mean, std):
    images = torch.randint(0, 256, (3, 8, 6, 3), dtype=torch.uint8)
    expected = torch.stack([tv.normalize(tv.to_tensor(i.numpy()), mean, std) for i in images])
    ours = normalize(images, mean, std)
    assert ours.shape == (3, 3, 8, 6)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-7)
    half = normalize(images, mean, std, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, ours.bfloat16())
    assert normalize(images[:0], mean, std).shape == (0, 3, 8, 6)
