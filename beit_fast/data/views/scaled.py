"""Crops of JPEGs that are decoded at a part of their size.

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its height and width for less than the whole: no more
than the lowest frequencies of each block are computed. `views.decode scaled` does so where the crop
has at least as many pixels left as the larger view, so nothing is enlarged that was not.

The crop is then whole in the smaller pixels: its corner goes to the nearest multiple of 2, 4 or 8,
and its sides down to one. Without that, half a pixel of displacement would cost more than the
scaling does: PSNR 32 dB instead of 42.
"""

from collections.abc import Iterable

Box = tuple[int, int, int, int]  # top, left, height, width

_SHRINKS = (8, 4, 2)


def shrink_of(box: Box, sizes: Iterable[tuple[int, int]]) -> int:
    """By how much an image may shrink, 1, 2, 4 or 8, for views of those (height, width)."""
    heights, widths = zip(*sizes, strict=True)
    times = min(box[2] // max(heights), box[3] // max(widths))
    return next((shrink for shrink in _SHRINKS if shrink <= times), 1)


def shrunk_box(box: Box, image_size: tuple[int, int], flip: bool, shrink: int) -> tuple[Box, Box]:
    """The box moved to whole pixels of the shrunk image, in pixels of the image and in those.

    image_size: (height, width) of the image. With `flip` either box counts from the left of the
    flipped image.
    """
    _, image_width = image_size
    top, left, height, width = box
    if flip:
        left = image_width - left - width
    top, height = _whole(top, height, image_size[0], shrink)
    left, width = _whole(left, width, image_width, shrink)
    boxes = []
    for scale, pixels in ((shrink, image_width), (1, -(-image_width // shrink))):
        start = pixels - (left + width) * scale if flip else left * scale
        boxes.append((top * scale, start, height * scale, width * scale))
    return boxes[0], boxes[1]


def _whole(start: int, length: int, pixels: int, shrink: int) -> tuple[int, int]:
    """Start and length of a side of the box in shrunk pixels that hold `shrink` each."""
    length //= shrink
    return min(round(start / shrink), pixels // shrink - length), length
