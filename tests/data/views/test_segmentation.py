"""Crops of images with masks: mmsegmentation's steps, and labels that stay with their pixels."""

import hashlib
import random

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.masks import Translation
from beit_fast.data.sources.segmentation import MaskedImage
from beit_fast.data.views.config import SegmentationViewConfig
from beit_fast.data.views.distortion import draw_distortion, hsv_of_rgb, rgb_of_hsv
from beit_fast.data.views.segmentation import (
    SegmentationSample,
    choose_box,
    draw_size,
    is_mixed,
    nearest,
    normalize_padded,
    rescaled,
    resize,
)
from beit_fast.data.views.two_views import normalize
from beit_fast.labels import IGNORE
from masked_images import blocks, coloured, encoded, picture

VIEW = SegmentationViewConfig(scale=(160, 40), distort=False)
LABELS = Translation(range(6), [255], "repair it").labels


def pair_of(ids: np.ndarray, image: np.ndarray | None = None) -> MaskedImage:
    return MaskedImage(encoded(coloured(ids) if image is None else image), encoded(ids))


def opencv_linear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """INTER_LINEAR of 8 bits as OpenCV computes it: 11 bits of each share, 4 dropped between."""

    def taps(before: int, after: int, is_cut: bool):
        at = ((np.arange(after) + 0.5) * (1 / (after / before)) - 0.5).astype(np.float32)
        first = np.floor(at).astype(int)
        share = at - first.astype(np.float32)
        if is_cut:
            share[(first < 0) | (first >= before - 1)] = 0
        shares = [np.rint(part * np.float32(2048)).astype(int) for part in (1 - share, share)]
        return [np.clip(first + step, 0, before - 1) for step in (0, 1)], shares

    (left, right), (of_left, of_right) = taps(image.shape[1], size[1], True)
    (upper, lower), (of_upper, of_lower) = taps(image.shape[0], size[0], False)
    wide = image.astype(int)
    wide = wide[:, left] * of_left[:, None] + wide[:, right] * of_right[:, None]
    above = (wide[upper] >> 4) * of_upper[:, None, None] >> 16
    below = (wide[lower] >> 4) * of_lower[:, None, None] >> 16
    return ((above + below + 2) >> 2).astype(np.uint8)


# (height, width) before and after, and the digest of what opencv-python-headless 4.10 and 5.0 give:
#   cv2.resize(picture(*before), after[::-1], interpolation=cv2.INTER_LINEAR)
OPENCV_RESIZED = [
    ((40, 61), (23, 35), "76ab7a0042786da3"),
    ((40, 61), (77, 117), "9bc93d3d4615d721"),
    ((64, 48), (32, 24), "37fc3358cb0c066a"),
    ((50, 70), (61, 85), "550357a790b5751a"),
    ((33, 100), (99, 300), "5dbc6961bf4159fc"),
]


@pytest.mark.parametrize(("before", "after", "digest"), OPENCV_RESIZED, ids=str)
def test_images_are_resized_as_by_opencv_within_one_level(before, after, digest):
    image = picture(*before)
    expected = opencv_linear(image, after)
    assert hashlib.sha256(expected.tobytes()).hexdigest()[:16] == digest
    # On noise, where a quarter to a third of the levels are those that round the other way.
    assert np.abs(resize(image, after).astype(int) - expected).max() <= 1


def test_an_image_of_the_size_stays_as_it_is():
    assert np.array_equal(resize(picture(9, 11), (9, 11)), picture(9, 11))


def test_nearest_pixels_are_those_of_opencv():
    # Of cv2.resize(np.arange(before, dtype=np.uint16)[None], (after, 1),
    # interpolation=cv2.INTER_NEAREST)[0], one after the other.
    digest = hashlib.sha256()
    for before in range(1, 400, 7):
        for after in range(1, 700, 3):
            digest.update(nearest(before, after).astype(np.uint16).tobytes())
    assert digest.hexdigest()[:16] == "2051dc1ebf8ebd47"


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((512, 683), 1.0, (512, 683)),
        ((300, 400), 1.0, (512, 683)),  # 682.67 + 0.5, cut off
        ((512, 683), 0.5, (256, 342)),  # 341.5 + 0.5
        ((683, 512), 2.0, (1366, 1024)),
        ((100, 1000), 1.0, (205, 2048)),  # the long side is what fills its bound
        ((512, 683), 1.2345, (632, 843)),  # the short side is int(632.06)
        ((1, 9000), 1.0, (1, 2048)),
    ],
)
def test_sizes_are_those_of_mmcv(size, ratio, expected):
    view = SegmentationViewConfig(ratio=(ratio, ratio))
    assert draw_size(*size, view, random.Random(0)) == expected


def test_scales_are_uniform_in_their_range():
    rng, view = random.Random(0), SegmentationViewConfig()
    sides = [draw_size(512, 683, view, rng)[0] for _ in range(4000)]
    assert min(sides) in range(256, 259)
    assert max(sides) in range(1021, 1025)
    assert abs(np.mean(sides) - 640) < 5 * 222 / 4000**0.5  # five standard errors


def test_labels_stay_with_the_pixels_that_they_are_of():
    sample = SegmentationSample((32, 48), VIEW, LABELS)
    checked = 0
    for number in range(20):
        ids = blocks(60 + number, 90 - number, number)
        made = sample(pair_of(ids), SampleSeed(0, 0, number))
        height, width = made["extent"]
        image, labels = made["images"][:height, :width], made["labels"][:height, :width]
        around = sliding_window_view(labels, (5, 5))  # else colours of two labels are mixed
        inside = (around == around[..., :1, :1]).all(axis=(2, 3))
        expected = coloured(labels.clip(0))[2:-2, 2:-2]
        assert np.array_equal(image[2:-2, 2:-2][inside], expected[inside]), number
        checked += inside.sum()
    assert checked > 5000


def test_an_image_smaller_than_the_crop_is_padded():
    sample = SegmentationSample((64, 32), VIEW, LABELS)
    sizes = set()
    for number in range(20):
        made = sample(pair_of(blocks(20, 60, number)), SampleSeed(0, 0, number))
        assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
            "images": ((64, 32, 3), np.uint8),
            "labels": ((64, 32), np.int16),
            "extent": ((2,), np.int32),
        }
        height, width = made["extent"]
        assert not made["images"][height:].any()
        assert not made["images"][:, width:].any()
        assert (made["labels"][height:] == IGNORE).all()
        assert (made["labels"][:height, :width] != IGNORE).all()
        sizes.add((int(height), int(width)))
    assert {width for _, width in sizes} == {32}
    assert len(sizes) > 10


def step_by_step(pair, seed, size, view, *, flip_share=0.5):
    """The pipeline as mmsegmentation runs it, whole images one step after the other."""
    rng = seed.rng("view")
    ids = np.asarray(LABELS(pair.mask))
    image = coloured(ids)
    # Resize
    ratio = view.ratio[0] + (view.ratio[1] - view.ratio[0]) * rng.random()
    long, short = int(view.scale[0] * ratio), int(view.scale[1] * ratio)
    height, width = ids.shape
    factor = min(long / max(height, width), short / min(height, width))
    height, width = int(height * factor + 0.5), int(width * factor + 0.5)
    image = resize(image, (height, width))
    at = [
        [min(int(pixel / (after / before)), before - 1) for pixel in range(after)]
        for before, after in zip(ids.shape, (height, width), strict=True)
    ]
    labels = ids[np.ix_(*at)]

    # RandomCrop
    def draw():
        top = rng.randint(0, max(height - size[0], 0))
        left = rng.randint(0, max(width - size[1], 0))
        return np.s_[top : top + size[0], left : left + size[1]]

    box = draw()
    for _ in range(10):
        values, counts = np.unique(labels[box], return_counts=True)
        counts = counts[values != IGNORE]
        if len(counts) > 1 and counts.max() / counts.sum() < view.max_class_share:
            break
        box = draw()
    image, labels = image[box], labels[box]
    # RandomFlip
    if rng.random() < flip_share:
        image, labels = image[:, ::-1], labels[:, ::-1]
    # PhotoMetricDistortion
    drawn = draw_distortion(seed.rng("distort"))

    def convert(levels, alpha=1.0, beta=0.0):
        return np.clip(levels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def in_hsv(image, change):
        red, green, blue = image.astype(int).transpose(2, 0, 1)
        hsv = hsv_of_rgb()[red + 256 * green + 65536 * blue]
        hue, saturation, value = change(hsv >> 16, (hsv >> 8) & 255, hsv & 255)
        rgb = rgb_of_hsv()[65536 * hue + 256 * saturation.astype(int) + value]
        return np.stack([rgb & 255, (rgb >> 8) & 255, rgb >> 16], -1).astype(np.uint8)

    if drawn.brightness is not None:
        image = convert(image, beta=drawn.brightness)
    if drawn.contrast is not None and drawn.contrast_first:
        image = convert(image, alpha=drawn.contrast)
    if drawn.saturation is not None:
        image = in_hsv(image, lambda h, s, v: (h, convert(s, alpha=drawn.saturation), v))
    if drawn.hue is not None:
        image = in_hsv(image, lambda h, s, v: ((h + drawn.hue) % 180, s, v))
    if drawn.contrast is not None and not drawn.contrast_first:
        image = convert(image, alpha=drawn.contrast)
    # Pad
    height, width = labels.shape
    below = ((0, size[0] - height), (0, size[1] - width))
    return {
        "images": np.pad(image, (*below, (0, 0))),
        "labels": np.pad(labels, below, constant_values=IGNORE),
        "extent": np.array([height, width], np.int32),
    }


def test_a_sample_is_what_the_steps_give_one_by_one():
    view = SegmentationViewConfig(scale=(160, 40), max_class_share=0.22)
    sample = SegmentationSample((36, 44), view, LABELS)
    extents, mixed = set(), 0
    for number in range(30):
        ids = blocks(50 + number, 70 - number, number)
        ids[:6] = 255
        pair, seed = pair_of(ids), SampleSeed(1, 2, number)
        ours, theirs = sample(pair, seed), step_by_step(pair, seed, sample.size, view)
        for name, expected in theirs.items():
            assert np.array_equal(ours[name], expected), (number, name)
        extents.add(tuple(ours["extent"].tolist()))
        mixed += is_mixed(ours["labels"], 0.22)
    assert len(extents) > 5
    assert 5 < mixed < 30  # some crops were found, some were the eleventh


def test_a_sample_is_its_seeds_and_no_others():
    sample = SegmentationSample((32, 32), SegmentationViewConfig(scale=(160, 40)), LABELS)
    pair = pair_of(blocks(60, 80, 0))
    made = [sample(pair, SampleSeed(*seed)) for seed in ((0, 0, 0), (0, 0, 0), (0, 1, 0))]
    for name in made[0]:
        assert np.array_equal(made[0][name], made[1][name])
    assert not np.array_equal(made[0]["images"], made[2]["images"])
    plain = SegmentationSample((32, 32), VIEW, LABELS)(pair, SampleSeed(0, 0, 0))
    assert np.array_equal(plain["labels"], made[0]["labels"])  # distortion draws apart


def test_half_of_the_samples_are_flipped():
    view = SegmentationViewConfig(scale=(40, 40), ratio=(1, 1), max_class_share=1, distort=False)
    sample, ids = SegmentationSample((40, 40), view, LABELS), blocks(40, 40, 0)
    flips = 0
    for number in range(200):
        labels = sample(pair_of(ids), SampleSeed(0, 0, number))["labels"]
        flips += (is_flipped := np.array_equal(labels, ids[:, ::-1]))
        assert is_flipped or np.array_equal(labels, ids)
    assert abs(flips - 100) < 36  # five standard deviations
    never = SegmentationSample(
        (40, 40), SegmentationViewConfig(scale=(40, 40), ratio=(1, 1), hflip=0.0), LABELS
    )
    assert np.array_equal(never(pair_of(ids), SampleSeed(0, 0, 1))["labels"], ids)


@pytest.mark.parametrize(
    ("labels", "share", "expected"),
    [
        ([0] * 75 + [1] * 25, 0.75, False),  # not below the share
        ([0] * 74 + [1] * 26, 0.75, True),
        ([0] * 3 + [1] + [IGNORE] * 96, 0.75, False),  # what is ignored does not count
        ([0] * 2 + [1] + [IGNORE] * 97, 0.75, True),
        ([0] * 100, 0.999, False),
        ([IGNORE] * 100, 0.75, False),
        ([150, 149], 0.75, True),
    ],
)
def test_a_crop_is_mixed_where_no_class_has_too_much(labels, share, expected):
    assert is_mixed(np.array(labels, np.int16).reshape(1, -1), share) is expected


def test_the_first_mixed_crop_of_ten_is_taken_and_else_an_eleventh():
    def tried(outcomes, share=0.75):
        """How many boxes were drawn, and which was taken."""
        drawn, asked = [], []

        class Rng(random.Random):
            def randint(self, low, high):
                value = super().randint(low, high)
                drawn.append(value)
                return value

        def labels_of(box):
            asked.append(box)
            is_good = len(asked) <= len(outcomes) and outcomes[len(asked) - 1]
            return np.array([[0, 1 if is_good else 0]], np.int16)

        box, _ = choose_box((50, 60), (8, 9), labels_of, share, Rng(0))
        assert box == (drawn[-2], drawn[-1], 8, 9) == asked[-1]
        return len(drawn) // 2

    assert tried([True]) == 1
    assert tried([False, False, True]) == 3
    assert tried([False] * 9 + [True]) == 10
    assert tried([False] * 30) == 11
    assert tried([False], share=1.0) == 1


def test_crops_reach_every_edge_and_none_beyond():
    rng, boxes = random.Random(0), []
    for _ in range(300):
        box, _ = choose_box((12, 10), (8, 9), lambda _: np.array([0]), 1.0, rng)
        boxes.append(box)
    assert set(boxes) == {(top, left, 8, 9) for top in range(5) for left in range(2)}
    assert choose_box((5, 7), (8, 6), lambda _: np.array([0]), 1.0, rng)[0][2:] == (5, 6)


def test_padding_is_zero_after_normalising_and_nothing_else_is():
    images = torch.from_numpy(np.stack([picture(8, 6), picture(8, 6)]))
    extent = torch.tensor([[8, 6], [5, 4]], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        padded = normalize_padded(images, extent, dtype=dtype)
        whole = normalize(images, dtype=dtype)
        assert padded.dtype == dtype
        assert padded.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(padded[0], whole[0])
        assert torch.equal(padded[1, :, :5, :4], whole[1, :, :5, :4])
        assert not padded[1, :, 5:].any()
        assert not padded[1, :, :, 4:].any()
    half = normalize_padded(images, extent, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(half[0], normalize(images, (0.5,) * 3, (0.5,) * 3)[0])


def test_a_thin_image_keeps_a_pixel():
    assert rescaled(1, 10_000, 2048, 512) == (1, 2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (512, 2048)}, r"scale is \[512, 2048\]: give the long side first"),
        ({"scale": (2048, 0)}, "scale is .* at least 1"),
        ({"ratio": (2.0, 0.5)}, "ratio is"),
        ({"ratio": (0.0, 2.0)}, "ratio is"),
        ({"max_class_share": 0.0}, "max_class_share is 0.0"),
        ({"max_class_share": 1.5}, "max_class_share is 1.5"),
        ({"hflip": 2.0}, "hflip is 2.0"),
        ({"distort": 1}, "distort is 1: give true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationViewConfig(**options)
