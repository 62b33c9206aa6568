"""One view of an image for evaluation: the whole image made smaller, and its centre."""

import math

import numpy as np
from PIL import Image

from beit_fast.data.decode import decode_pillow


def centre_view(data: bytes, size: tuple[int, int], crop_pct: float) -> np.ndarray:
    """The evaluation transform: uint8 (height, width, 3).

    The whole image to the smallest size, over `crop_pct`, that covers `size`, bicubic; then the
    centre. Raises BadImageError.
    """
    image = decode_pillow(data)
    height, width = size
    scale = max(height / image.height, width / image.width) / crop_pct
    # Rounded down, as the original's short side is; a ratio that is whole but for rounding stays.
    resized = [
        max(side, math.floor(old * scale + 1e-6))
        for side, old in ((height, image.height), (width, image.width))
    ]
    image = image.resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    return np.array(image.crop((left, top, left + width, top + height)))
