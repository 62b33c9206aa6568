"""Masks of class ids: from a PNG to ids, from ids to labels, and a mask beside its image.

An id is the number that a mask file has for a class, a label the number that a model has for it:
0 ... C - 1 in the order of the classes, IGNORE where nothing counts.

What is decided here:
- format    PNG, for it is exact: a lossy file makes ids that nobody drew
- depth     1, 2, 4, 8 and 16 bits of grey: the number that the file has, whatever grey it shows as
- palettes  their indices are the ids, whatever their colours
- colour    refused: which colour is which class cannot be known
"""

from collections.abc import Callable, Iterable

import numpy as np

from beit_fast.data.sources.decode import BadImageError, decode_fast, decode_png, exif_orientation
from beit_fast.data.sources.limits import MAX_PIXELS
from beit_fast.labels import IGNORE

MAX_CLASSES = 2**15 - 1  # labels are int16
MAX_ID = 2**16 - 1  # of a PNG of 16 bits
_UNKNOWN = IGNORE - 1  # what ids outside the classes are translated to, before they are refused
_GREY, _PALETTE = 0, 3  # colour types of a PNG
_NAMED = 5  # ids in an error


def mask_ids(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The ids of a PNG file, uint8 or uint16 (height, width).

    Raises BadImageError for another format, a damaged file, and one that is coded in colours.
    """
    image, depth, colour_type = decode_png(data, max_pixels)
    if colour_type not in (_GREY, _PALETTE):
        pixels = np.asarray(image)[..., :3]
        if image.mode in ("RGB", "RGBA") and not (pixels == pixels[..., :1]).all():
            raise BadImageError(
                "the mask is coded in colours, not in class ids: write the id of each colour's "
                "class into a grey PNG"
            )
        raise BadImageError(
            f"the mask has {len(image.mode)} channels where one is needed: save its first as a "
            "grey PNG, in Pillow image.getchannel(0).save(path)"
        )
    ids = np.asarray(image)
    if ids.dtype == bool:
        return ids.astype(np.uint8)
    if colour_type == _GREY and depth < 8:  # Pillow spreads 2 and 4 bits over 0 ... 255
        return ids // np.uint8(255 // (2**depth - 1))
    return ids


class Translation:
    """From ids to labels.

    ids: of the classes, in their order. ignore: ids whose pixels do not count. how: what to do
    about an id that is neither, for the error.
    """

    def __init__(self, ids: Iterable[int], ignore: Iterable[int], how: str):
        self.table = np.full(MAX_ID + 1, _UNKNOWN, np.int16)
        self.table[list(ignore)] = IGNORE
        ids = list(ids)
        self.table[ids] = np.arange(len(ids))
        low, high = min(ids), max(ids)
        self._has = f"{low} to {high}" if high - low == len(ids) - 1 else f"{len(ids)} ids"
        self._how = how

    def labels(self, mask: bytes) -> np.ndarray:
        """int16 (height, width) of a mask file. Raises BadImageError as `mask_ids`, and for ids
        outside the classes."""
        ids = mask_ids(mask)
        labels = self.table.take(ids)
        if labels.min() == _UNKNOWN:
            unknown = np.unique(ids[labels == _UNKNOWN]).tolist()
            named = ", ".join(map(str, unknown[:_NAMED])) + ", ..." * (len(unknown) > _NAMED)
            raise BadImageError(
                f"the mask has the id{'s' * (len(unknown) > 1)} {named} and the classes have "
                f"{self._has}: {self._how}"
            )
        return labels


def decode_pair(
    image: bytes, mask: bytes, labels: Callable[[bytes], np.ndarray], max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (height, width, 3) and labels int16 (height, width) of an image and its mask.

    Raises BadImageError where one cannot be used, and where their sizes differ.
    """
    pixels, labelled = decode_fast(image, max_pixels), labels(mask)
    if pixels.shape[:2] != labelled.shape:
        (height, width), (mask_height, mask_width) = pixels.shape[:2], labelled.shape
        remedy = "make the mask anew at the image's size"
        if (turned := exif_orientation(image)) > 1:
            remedy = (
                f"the image has EXIF orientation {turned}, which is not applied: save it upright "
                "and without EXIF, in Pillow ImageOps.exif_transpose(image).save(path)"
            )
        raise BadImageError(
            f"the mask has {mask_width}x{mask_height} pixels and the image {width}x{height}: "
            f"{remedy}"
        )
    return pixels, labelled
