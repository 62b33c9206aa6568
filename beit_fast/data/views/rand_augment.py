"""RandAugment as the original fine-tunes with it: timm's "rand-m9-mstd0.5-inc1".

Two of fifteen operations, drawn with replacement; each is then applied with probability 1/2, at a
magnitude drawn from N(m, 0.5) and cut to 0 ... 10. All grow stronger with it.

The operations are timm's. What timm draws on the way, whether, how strongly and with which sign,
is drawn here: timm takes it from Python's global generator, which threads share, so that a sample
would depend on what the other threads are doing.

Source: arXiv:1909.13719; timm `data/auto_augment.py`
"""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image
from timm.data import auto_augment as timm_ops

NUM_OPERATIONS, PROBABILITY = 2, 0.5
MAGNITUDE_STD, MOST = 0.5, 10.0  # of a magnitude


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's; without any bit black, as Pillow had it when it did not yet refuse 0 bits, which is
    one draw in 44 of this operation."""
    return timm_ops.posterize(image, bits) if bits else Image.new(image.mode, image.size)


# (operation, its arguments at a level in 0 ... 1 and a sign of -1 or 1), in timm's order.
OPERATIONS: tuple[tuple[Callable, Callable[[float, int], tuple]], ...] = (
    (timm_ops.auto_contrast, lambda level, sign: ()),
    (timm_ops.equalize, lambda level, sign: ()),
    (timm_ops.invert, lambda level, sign: ()),
    (timm_ops.rotate, lambda level, sign: (sign * level * 30.0,)),  # degrees
    (posterize, lambda level, sign: (4 - int(level * 4),)),  # bits kept
    (timm_ops.solarize, lambda level, sign: (256 - int(level * 256),)),  # inverted from here on
    (timm_ops.solarize_add, lambda level, sign: (int(level * 110),)),
    *(
        (enhance, lambda level, sign: (max(0.1, 1.0 + sign * level * 0.9),))
        for enhance in (
            timm_ops.color,
            timm_ops.contrast,
            timm_ops.brightness,
            timm_ops.sharpness,
        )
    ),
    (timm_ops.shear_x, lambda level, sign: (sign * level * 0.3,)),
    (timm_ops.shear_y, lambda level, sign: (sign * level * 0.3,)),
    (timm_ops.translate_x_rel, lambda level, sign: (sign * level * 0.45,)),  # of the width
    (timm_ops.translate_y_rel, lambda level, sign: (sign * level * 0.45,)),
)


def rand_augment(
    image: np.ndarray, magnitude: float, fill: tuple[int, int, int], rng: random.Random
) -> np.ndarray:
    """uint8 (height, width, 3) from the same, all that is random from `rng`.

    fill: the colour of what a moved image leaves empty.
    """
    augmented = Image.fromarray(image)
    for operation, arguments in rng.choices(OPERATIONS, k=NUM_OPERATIONS):
        if rng.random() < PROBABILITY:
            drawn = max(0.0, min(MOST, rng.gauss(magnitude, MAGNITUDE_STD)))
            args = arguments(drawn / MOST, rng.choice((-1, 1)))
            augmented = apply_operation(operation, augmented, args, fill)
    return np.array(augmented)


def apply_operation(
    operation: Callable, image: Image.Image, arguments: tuple, fill: tuple[int, int, int]
) -> Image.Image:
    """One of timm's operations, bicubic where it resamples."""
    options = {"fillcolor": fill, "resample": Image.Resampling.BICUBIC}
    return operation(image, *arguments, **options)
