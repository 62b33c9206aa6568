import io
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources import decode as decoding
from beit_fast.data.sources.decode import BadImageError, decode_fast, decode_shrunk
from beit_fast.data.views import two_views as views_module
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.scaled import shrink_of, shrunk_box
from beit_fast.data.views.two_views import draw_view, fast_views, make_views

# Small views of photographs with 512 pixels: crops of all sizes from less than one to four times.
FULL = ViewConfig(size=112, token_size=56, color_jitter=0.0)
SCALED = replace(FULL, decode="scaled")


def psnr(ours, theirs):
    return 10 * np.log10(255**2 / max(((ours.astype(np.int32) - theirs) ** 2).mean(), 1e-9))


def test_an_image_shrinks_as_far_as_the_larger_view_allows():
    def shrink(height, width, *sizes):
        return shrink_of((0, 0, height, width), sizes or [(224, 224), (112, 112)])

    assert [shrink(n, n) for n in (100, 447, 448, 895, 896, 1791, 1792, 9000)] == [
        *(1, 1, 2, 2, 4, 4, 8, 8)
    ]
    assert shrink(9000, 500) == shrink(500, 9000) == 2
    assert shrink(448, 900, (112, 112), (224, 448)) == 2
    assert shrink(448, 895, (112, 112), (224, 448)) == 1


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("flip", [False, True])
def test_a_moved_box_is_whole_in_both_pixels_and_within_the_image(shrink, flip):
    rng = random.Random(shrink)
    for _ in range(500):
        size = height, width = rng.randint(40, 90), rng.randint(40, 90)
        box_height, box_width = rng.randint(shrink, height), rng.randint(shrink, width)
        box = (rng.randint(0, height - box_height), rng.randint(0, width - box_width))
        box = (*box, box_height, box_width)
        moved, small = shrunk_box(box, size, flip, shrink)
        assert moved[2:] == tuple(shrink * n for n in small[2:])
        for a, b, most in zip(moved, box, (shrink, 2 * shrink, shrink, shrink), strict=True):
            assert abs(a - b) < most
        pixels = np.zeros(size, np.uint8)
        flipped = pixels[:, ::-1] if flip else pixels
        flipped[moved[0] : moved[0] + moved[2], moved[1] : moved[1] + moved[3]] = 1
        assert pixels.sum() == moved[2] * moved[3]
        # The same pixels: each of the small image's stands for a square of the large one's.
        small_pixels = np.zeros([-(-n // shrink) for n in size], np.uint8)
        flipped = small_pixels[:, ::-1] if flip else small_pixels
        flipped[small[0] : small[0] + small[2], small[1] : small[1] + small[3]] = 1
        assert small_pixels.sum() == small[2] * small[3]
        enlarged = small_pixels.repeat(shrink, 0).repeat(shrink, 1)[:height, :width]
        assert np.array_equal(enlarged, pixels)


def test_scaled_views_are_near_those_of_the_same_box_at_full_size(photographs):
    found = {"images": [], "token_images": []}
    for i, data in enumerate(photographs):
        for epoch in range(2):
            views, draw = make_views(data, SCALED, SampleSeed(0, epoch, i).rng("view"))
            full = fast_views(decode_fast(data), draw, FULL)
            if min(draw.box[2:]) >= 224:
                for name, values in found.items():
                    values.append(psnr(views[name], full[name]))
    assert len(found["images"]) > 10
    for name, median, worst in (("images", 36, 28), ("token_images", 42, 34)):
        assert np.median(found[name]) > median
        assert min(found[name]) > worst


def test_what_is_no_jpeg_or_whose_crop_is_small_is_as_with_full(photographs, make_file):
    small, png = 0, make_file(Image.open(io.BytesIO(photographs[0])), "PNG")
    for i in range(12):
        seed = SampleSeed(0, 0, i)
        full, draw = make_views(photographs[0], FULL, seed.rng("view"))
        same = min(draw.box[2:]) < 224
        small += same
        for data in [photographs[0]] * same + [png]:
            scaled, its = make_views(data, SCALED, seed.rng("view"))
            assert its == draw
            assert all(np.array_equal(scaled[name], full[name]) for name in full)
    assert 0 < small < 12


def test_a_scaled_view_is_the_same_without_the_other_and_its_box_that_of_the_draw(photographs):
    for i in range(6):
        seed = SampleSeed(0, 1, i)
        both, draw = make_views(photographs[1], SCALED, seed.rng("view"))
        for name in both:
            alone, its = make_views(photographs[1], SCALED, seed.rng("view"), (name,))
            assert its == draw
            assert np.array_equal(alone[name], both[name])


def test_flips_and_jitters_are_those_of_full(photographs):
    config = replace(SCALED, color_jitter=0.4)
    for i in range(6):
        seed = SampleSeed(0, 2, i)
        _, draw = make_views(photographs[2], config, seed.rng("view"))
        height, width = decode_fast(photographs[2]).shape[:2]
        full = draw_view(height, width, replace(FULL, color_jitter=0.4), seed.rng("view"))
        assert (draw.jitter, draw.flip) == (full.jitter, full.flip)


@pytest.mark.parametrize("mode", ["L", "CMYK", "progressive"])
def test_every_kind_of_jpeg_is_shrunk(mode, photographs, make_file, monkeypatch):
    image = Image.open(io.BytesIO(photographs[0]))
    options = {"progressive": True} if mode == "progressive" else {}
    data = make_file(image if options else image.convert(mode), "JPEG", **options)
    called = []
    monkeypatch.setattr(
        views_module,
        "decode_shrunk",
        lambda data, shrink, limit: called.append(shrink) or decode_shrunk(data, shrink, limit),
    )
    config = replace(SCALED, size=32, token_size=16)
    views, draw = make_views(data, config, random.Random(3))
    assert called == [shrink_of(draw.box, [(32, 32)])]
    assert called[0] > 1
    full = fast_views(decode_fast(data), draw, config)
    assert psnr(views["images"], full["images"]) > 30


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_sizes_are_rounded_up_and_both_decoders_give_the_same_bits(
    shrink, make_image, make_file, monkeypatch
):
    """simplejpeg, where it is installed, and Pillow."""
    assert decoding.import_simplejpeg() is not None
    for height, width in ((33, 50), (64, 17), (8, 9), (130, 31), (shrink, 8), (8, shrink + 1)):
        for mode, options in (("RGB", {}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {})):
            image = make_image(height, width).convert(mode)
            data = make_file(image, "JPEG", progressive=width % 2 == 1, **options)
            pixels = decode_shrunk(data, shrink)
            assert pixels.shape == (-(-height // shrink), -(-width // shrink), 3)
            with monkeypatch.context() as without:
                without.setattr(decoding, "import_simplejpeg", lambda: None)
                assert np.array_equal(decode_shrunk(data, shrink), pixels)


def test_the_limits_of_scans_are_those_of_the_whole_image(make_image, make_file):
    data = make_file(make_image(40, 30), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadImageError, match="scans, more than 100"):
        decode_shrunk(data[:-2] + 101 * last + data[-2:], 2)


def test_files_that_are_bad_at_full_size_are_bad(photographs):
    rng = random.Random
    config = replace(SCALED, size=32, token_size=16)
    for data in (photographs[0][:5000], photographs[0][:-2000], photographs[0][:30]):
        for kind in (config, replace(config, decode="full")):
            with pytest.raises(BadImageError):
                make_views(data, kind, rng(0))
    with pytest.raises(BadImageError, match="max_pixels=1000"):
        make_views(photographs[0], replace(config, max_pixels=1000), rng(0))


def test_a_header_that_tells_no_height_is_bad_and_no_error(photographs):
    data = bytearray(photographs[0])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 7] = b"\0\0"
    with pytest.raises(BadImageError):
        make_views(bytes(data), SCALED, random.Random(0))
