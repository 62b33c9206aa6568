"""An image that is decoded later, a batch at a time, and not where it is read.

Where that is, a device's decoder takes plain JPEGs (jpeg.py). Everything else is decoded here by
Pillow, in the loader's threads, so that a file which cannot be used is found where it is replaced.
"""

from dataclasses import dataclass

import numpy as np

from beit_fast.data.sources.decode import check_size, decode_pillow, pixels_of
from beit_fast.data.sources.jpeg import plain_jpeg

LATE = "late"  # what a sample calls it


@dataclass(frozen=True)
class LateImage:
    """Its size in pixels, and the bytes of a plain JPEG in `data`; or else `pixels`, uint8
    (height, width, 3), and in `why` the reason that it was decoded here."""

    height: int
    width: int
    data: bytes = b""
    pixels: np.ndarray | None = None
    why: str = ""


def late_image(data: bytes, max_pixels: int) -> LateImage:
    """Raises BadImageError as `decode_pillow` does, and for a plain JPEG as far as its header
    shows."""
    jpeg = plain_jpeg(data)
    if isinstance(jpeg, str):
        pixels = pixels_of(decode_pillow(data, max_pixels))
        return LateImage(*pixels.shape[:2], pixels=pixels, why=jpeg)
    check_size(jpeg.width, jpeg.height, max_pixels)
    return LateImage(jpeg.height, jpeg.width, data=jpeg.data)
