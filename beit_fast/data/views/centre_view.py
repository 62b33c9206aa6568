"""One view of an image for evaluation: the whole image made smaller, and its centre."""

import math

import numpy as np
from PIL import Image

from beit_fast.data.sources.decode import decode_pillow
from beit_fast.data.views.config import CropMode, Interpolation

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def centre_view(
    data: bytes,
    size: tuple[int, int],
    crop_pct: float,
    interpolation: Interpolation = "bicubic",
    crop_mode: CropMode = "center",
) -> np.ndarray:
    """The evaluation transform: uint8 (height, width, 3).

    The whole image to the smallest size, over `crop_pct`, that covers `size`; then the centre.
    "squash" makes it that size itself, whatever its proportions: transformers' way, with a
    `crop_pct` of 1. Raises BadImageError.
    """
    image = decode_pillow(data)
    height, width = size
    # Rounded down, as the original does: the short side first, and the long one in its proportion.
    # A product that is whole but for rounding stays.
    target = [math.floor(side / crop_pct + 1e-6) for side in size]
    scale = [target[0] / image.height, target[1] / image.width]
    if crop_mode == "center":
        scale = [max(scale)] * 2
    resized = [
        max(side, math.floor(old * factor + 1e-6))
        for side, old, factor in zip(target, (image.height, image.width), scale, strict=True)
    ]
    image = image.resize((resized[1], resized[0]), _RESAMPLING[interpolation])
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    return np.array(image.crop((left, top, left + width, top + height)))
