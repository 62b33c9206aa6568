"""RandAugment: timm's operations at timm's strengths, random by the sample's own generator."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_ops

from beit_fast.data.views import rand_augment as module
from beit_fast.data.views.rand_augment import OPERATIONS, apply_operation, rand_augment

FILL = (128, 128, 128)
NAMES = timm_ops.rand_augment_choices("", increasing=True)


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.array(coarse.resize((48, 40), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_an_operation_is_timms(number, image, monkeypatch):
    operation, arguments = OPERATIONS[number]
    strongest = 9.9 if NAMES[number] == "PosterizeIncreasing" else 10.0
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    for sign in (-1, 1):
        monkeypatch.setattr(timm_ops, "_randomly_negate", lambda value, sign=sign: sign * value)
        for magnitude in (0.0, 3.3, 9.0, strongest):
            timm_op = timm_ops.AugmentOp(NAMES[number], 1.0, magnitude, hparams)
            expected = np.array(timm_op(Image.fromarray(image)))
            args = arguments(magnitude / 10, sign)
            ours = np.array(apply_operation(operation, Image.fromarray(image), args, FILL))
            assert np.array_equal(ours, expected), (sign, magnitude)


def test_an_image_without_bits_is_black_where_timm_and_a_new_pillow_fail(image):
    operation, arguments = OPERATIONS[NAMES.index("PosterizeIncreasing")]
    assert arguments(1.0, 1) == (0,)
    assert not np.array(apply_operation(operation, Image.fromarray(image), (0,), FILL)).any()


def test_there_are_as_many_operations_as_timm_has():
    assert len(OPERATIONS) == len(NAMES) == 15


def test_draws_are_those_of_the_recipe(image, monkeypatch):
    calls, levels = Counter(), []

    def record(operation, picture, arguments, fill):
        calls[operation] += 1
        if operation is timm_ops.rotate:
            levels.append(arguments[0] / 3)
        return picture

    monkeypatch.setattr(module, "apply_operation", record)
    rng, num_images = random.Random(0), 6000
    for _ in range(num_images):
        rand_augment(image[:2, :2], 9.0, FILL, rng)
    total = sum(calls.values())
    assert total == pytest.approx(num_images, rel=0.05)  # two an image, each with probability 1/2
    assert len(calls) == 15
    assert all(count == pytest.approx(total / 15, rel=0.25) for count in calls.values())
    sizes = np.abs(levels)
    assert sizes.max() <= 10
    assert sizes.mean() == pytest.approx(9.0, abs=0.1)
    assert sizes.std() == pytest.approx(0.5, abs=0.1)
    assert np.mean(np.sign(levels)) == pytest.approx(0, abs=0.15)


def test_nothing_is_drawn_from_or_left_in_the_generators_that_threads_share(image):
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what timm draws from
        before = random.getstate(), np.random.get_state()[2]  # noqa: NPY002
        results.append([rand_augment(image, 9.0, FILL, random.Random(n)) for n in range(40)])
        assert (random.getstate(), np.random.get_state()[2]) == before  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    assert sum(not np.array_equal(a, image) for a in results[0]) > 20
