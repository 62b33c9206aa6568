"""Windows over images of any size, against loops over single pixels and windows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_fast.data.views.segmentation import resize
from beit_fast.tasks.segment import sliding
from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.tasks.segment.sliding import (
    resized_strips,
    scaled_sizes,
    segment_image,
    slide_window,
)
from labelled_pixels import PatchModel

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WINDOW = (16, 24)
SIZES = [(16, 24), (9, 13), (17, 25), (37, 53), (40, 10), (5, 80)]


def size_id(size):
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


@pytest.fixture(scope="module")
def model():
    return PatchModel(window=WINDOW).eval()


def naive_bilinear(values, size):
    """fp64 (C, h, w) at `size`: each place from its four neighbours, corners not aligned."""
    sides = values.shape[1:]
    found = np.empty((len(values), *size))
    for y in range(size[0]):
        for x in range(size[1]):
            at = [
                min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
                for i, old, new in zip((y, x), sides, size, strict=True)
            ]
            (y0, x0), (fy, fx) = [math.floor(a) for a in at], [a % 1 for a in at]
            y1, x1 = min(y0 + 1, sides[0] - 1), min(x0 + 1, sides[1] - 1)
            top = values[:, y0, x0] * (1 - fx) + values[:, y0, x1] * fx
            bottom = values[:, y1, x0] * (1 - fx) + values[:, y1, x1] * fx
            found[:, y, x] = top * (1 - fy) + bottom * fy
    return found


def naive_slide(model, pixels, stride):
    """Mean over windows of (C, height, width), one window at a time, pixel by pixel."""
    height, width = pixels.shape[1:]
    padded = np.zeros((3, max(height, WINDOW[0]), max(width, WINDOW[1])))
    padded[:, :height, :width] = pixels
    corners = set()
    for axis in (0, 1):
        starts, start = set(), 0
        while True:
            starts.add(min(start, padded.shape[1 + axis] - WINDOW[axis]))
            if start + WINDOW[axis] >= padded.shape[1 + axis]:
                break
            start += stride[axis]
        corners = (
            {(s, 0) for s in starts} if axis == 0 else {(y, s) for y, _ in corners for s in starts}
        )
    seen = {}
    for top, left in corners:
        view = torch.from_numpy(padded[:, top : top + WINDOW[0], left : left + WINDOW[1]])
        with torch.no_grad():
            logits = model.patches.double()(view[None])[0].numpy()
        seen[top, left] = naive_bilinear(logits, WINDOW)
    model.float()
    found = np.zeros((len(logits), height, width))
    for y in range(height):
        for x in range(width):
            over = [
                values[:, y - top, x - left]
                for (top, left), values in seen.items()
                if top <= y < top + WINDOW[0] and left <= x < left + WINDOW[1]
            ]
            found[:, y, x] = np.mean(over, axis=0)
    return found


@pytest.mark.parametrize("size", SIZES, ids=size_id)
@pytest.mark.parametrize("stride", [None, 16, (7, 11)], ids=size_id)
def test_a_pixel_has_the_mean_of_the_windows_that_cover_it(model, size, stride):
    pixels = torch.randn(1, 3, *size)
    found = slide_window(model, pixels, SlideConfig(stride=stride, windows_at_once=3)).detach()
    pair = {None: (10, 16), 16: (16, 16)}.get(stride, stride)
    wanted = naive_slide(model, pixels[0].double().numpy(), pair)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5)


def naive_probabilities(model, image, size, mirror):
    """Of one pass, at the image's own size."""
    resized = resize(image, size).transpose(2, 0, 1)  # held against OpenCV's where it is made
    mean, std = (np.array(value)[:, None, None] for value in IMAGENET)
    pixels = (resized / 255 - mean) / std
    logits = naive_slide(model, pixels[:, :, ::-1] if mirror else pixels, (10, 16))
    logits = naive_bilinear(logits[:, :, ::-1] if mirror else logits, image.shape[:2])
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def assert_same_classes(found, probabilities):
    """But where two classes are as likely, within rounding."""
    first, second = np.sort(probabilities, axis=0)[:-3:-1]
    clear = first - second > 1e-4
    assert clear.mean() > 0.95
    assert (found.numpy() == probabilities.argmax(0))[clear].all()


@pytest.mark.parametrize(
    ("size", "resized"),
    [((21, 33), (16, 25)), ((9, 13), (16, 23)), ((4, 40), (6, 64))],
    ids=size_id,
)
def test_an_image_is_resized_slid_over_and_brought_back(model, size, resized):
    """One within the scale (64, 16), one to enlarge, one whose long side is the limit."""
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    found = segment_image(model, image, SlideConfig(), IMAGENET, "fp32")
    assert found.dtype == torch.int64
    assert_same_classes(found, naive_probabilities(model, image.numpy(), resized, mirror=False))


def test_scales_and_mirrors_average_probabilities(model):
    image = torch.randint(0, 256, (21, 33, 3), dtype=torch.uint8)
    slide = SlideConfig(multi_scale=(0.5, 0.75, 1.25), flip=True)
    model.batches.clear()
    found = segment_image(model, image, slide, IMAGENET, "fp32")
    assert model.batches == [2, 2, 4, 4]  # what is the same is computed once
    passes = {
        size: [naive_probabilities(model, image.numpy(), size, mirror) for mirror in (False, True)]
        for size in ((16, 25), (20, 31))
    }
    # Half and three quarters of 16 are below the window's short side.
    assert_same_classes(found, np.mean([*passes[16, 25] * 2, *passes[20, 31]], axis=0))
    single = segment_image(model, image, SlideConfig(), IMAGENET, "fp32")
    assert (single != found).any()


def test_sizes_are_mmcvs():
    """`rescale_size` of mmcv 1.7 gives these for (2048, 512); then SETR_Resize's short sides."""
    window = (512, 512)
    for size, wanted in (
        ((375, 500), (512, 683)),
        ((500, 375), (683, 512)),
        ((512, 683), (512, 683)),
        ((1944, 2592), (512, 683)),
        ((300, 1500), (410, 2048)),
    ):
        assert scaled_sizes(size, window, SlideConfig()) == [wanted]
    assert scaled_sizes((300, 400), (640, 640), SlideConfig()) == [(640, 853)]
    paper = SlideConfig(multi_scale=(0.5, 0.75, 1, 1.25, 1.5, 1.75))
    shorts = [min(size) for size in scaled_sizes((300, 400), window, paper)]
    assert shorts == [512, 512, 512, 640, 768, 896]
    assert scaled_sizes((300, 1500), window, paper)[0] == (512, 2560)  # no limit for the long side
    assert scaled_sizes((1, 9000), window, SlideConfig()) == [(1, 2048)]
    assert scaled_sizes((60, 80), window, SlideConfig(scale=(80, 30))) == [(30, 40)]


def test_windows_go_together_and_each_is_the_models(model):
    pixels = torch.randn(1, 3, 37, 53)
    found = {}
    for at_once in (1, 4, 100):
        model.batches.clear()
        found[at_once] = slide_window(model, pixels, SlideConfig(windows_at_once=at_once))
        assert sum(model.batches) == 4 * 3  # starts 0, 10, 20, 21 and 0, 16, 29
        assert max(model.batches) == min(at_once, 12)
    torch.testing.assert_close(found[1], found[4], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], found[100], rtol=0, atol=1e-5)


@pytest.mark.parametrize("strip", [1, 1000, 2**26])
def test_strips_are_parts_of_the_whole(strip, monkeypatch):
    monkeypatch.setattr(sliding, "STRIP", strip)
    for small, size in (((7, 9), (53, 31)), ((53, 31), (7, 9)), ((6, 6), (6, 6)), ((1, 1), (5, 4))):
        logits = torch.randn(3, *small)
        parts = list(resized_strips(logits, size))
        whole = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(torch.cat([p for _, p in parts], 1), whole, rtol=0, atol=1e-5)
        assert [rows.start for rows, _ in parts] == [0, *(rows.stop for rows, _ in parts[:-1])]
        assert parts[-1][0].stop == size[0]
        largest = max(part.numel() for _, part in parts)
        assert largest <= max(strip, 3 * size[1])


def test_bf16_is_the_models_and_sums_are_in_fp32(model):
    kinds = []
    handle = model.patches.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
    image = torch.randint(0, 256, (21, 33, 3), dtype=torch.uint8)
    for precision in ("fp32", "bf16"):
        segment_image(model, image, SlideConfig(), IMAGENET, precision)
    handle.remove()
    assert set(kinds) == {torch.float32, torch.bfloat16}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert slide_window(model, torch.randn(1, 3, *WINDOW), SlideConfig()).dtype == torch.float32


def test_scores_that_are_not_finite_are_no_classes():
    model = PatchModel().eval()
    torch.nn.init.constant_(model.patches.bias, torch.nan)
    image = torch.zeros(16, 24, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="scores are not finite: are its weights"):
        segment_image(model, image, SlideConfig(), IMAGENET, "fp32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": (17, 8)}, r"stride is \(17, 8\) and the window 16x24: .*no more than"),
        ({"scale": (512, 2048)}, "scale is .*: give the long side first"),
        ({"multi_scale": ()}, "multi_scale is empty: give one ratio"),
        ({"stride": 0}, "stride is 0"),
        ({"multi_scale": (0.0,)}, "multi_scale is"),
    ],
)
def test_what_no_window_can_be_slid_by_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SlideConfig(**fields).strides(WINDOW)


@pytest.mark.parametrize("side", [512, 640])
def test_the_default_stride_is_the_recipes(side):
    assert SlideConfig().strides((side, side)) == {512: (341, 341), 640: (426, 426)}[side]
    assert SlideConfig().sides((side, side)) == {512: (2048, 512), 640: (2560, 640)}[side]
