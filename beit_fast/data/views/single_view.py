"""One view of an image for training a tokenizer.

A random square as large as the image allows, shrunk by area to a random side a little above
`size`, a random crop of `size` from it, a random flip. Of a smaller image the largest square is
enlarged to `size`, as BEiT enlarges it for its views.

Source: arXiv:2102.12092 appendix A.2.
"""

import math
import random

import numpy as np
from PIL import Image

from beit_fast.data.sources.decode import decode_fast
from beit_fast.data.views.config import SingleViewConfig


def single_view(data: bytes, config: SingleViewConfig, rng: random.Random) -> np.ndarray:
    """uint8 (size, size, 3) from the bytes of an image file.

    Raises BadImageError if it cannot be decoded.
    """
    return crop_view(decode_fast(data, config.max_pixels), config, rng)


def crop_view(image: np.ndarray, config: SingleViewConfig, rng: random.Random) -> np.ndarray:
    """`single_view` of a decoded image, uint8 (height, width, 3)."""
    height, width = image.shape[:2]
    size, short = config.size, min(height, width)
    side = min(short, max(size, round(short * math.sqrt(rng.uniform(*config.scale)))))
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    largest = max(size, side)
    resized = rng.randint(min(largest, round(size * 9 / 8)), min(largest, round(size * 12 / 8)))
    y, x = rng.randint(0, resized - size), rng.randint(0, resized - size)
    flip = rng.random() < config.hflip

    square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    filter = Image.Resampling.BOX if resized <= side else Image.Resampling.BICUBIC
    square = square.resize((resized, resized), filter)
    view = square.crop((x, y, x + size, y + size))
    if flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(view)
