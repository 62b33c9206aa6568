"""Jitter and crop of a ragged batch: grey sums of whole images, their means, the jittered crops.

A program finds its image by its number: `starts` says at which program each image begins. A crop
is written as words of four bytes, red lowest, so that one load of the resize brings three channels.
A row of `table` describes an image; the launcher, ragged_views_triton.py, makes it. No kernel is
told how many images there are, or Triton would compile it anew for some of their numbers.
"""

from beit_fast.kernels._triton import tl, triton


@triton.jit
def locate(
    starts_ptr,  # (MOST_B + 1,) int64, ascending: the first program of each image, then more
    MOST_B: tl.constexpr,  # a power of two: of images
):
    """The image of this program, int64, and which of its programs it is."""
    program = tl.program_id(0)
    begun = tl.load(starts_ptr + tl.arange(0, MOST_B)) <= program
    image = tl.sum(begun.to(tl.int64), axis=0) - 1
    return image, program - tl.load(starts_ptr + image).to(tl.int32)


@triton.jit
def _grey(red, green, blue):
    # Products of levels with 65536ths, and their sums, are exact in fp32.
    grey = red * (19595 / 65536) + green * (38470 / 65536) + blue * (7471 / 65536)
    return tl.floor(grey + 0.5)


@triton.jit
def _blend(levels, base, factor):
    # Compiled without fused products: Pillow rounds the product, and a level hangs on it.
    return tl.floor(tl.minimum(tl.maximum(base + factor * (levels - base), 0.0), 255.0))


@triton.jit
def _jitter(
    red,
    green,
    blue,
    steps_ptr,  # (2 S,) int64: the image's steps, and the bits of their fp32 factors
    count,  # steps to take
    mean,  # of grey, for the contrast
    S: tl.constexpr,
    CONTRAST: tl.constexpr,
    SATURATION: tl.constexpr,
):
    for s in tl.static_range(S):
        if s < count:
            step = tl.load(steps_ptr + s)
            factor = tl.load(steps_ptr + S + s).to(tl.int32).to(tl.float32, bitcast=True)
            base = tl.zeros_like(red)
            if step == SATURATION:
                base = _grey(red, green, blue)
            if step == CONTRAST:
                base += mean
            red = _blend(red, base, factor)
            green = _blend(green, base, factor)
            blue = _blend(blue, base, factor)
    return red, green, blue


@triton.jit
def grey_sums_kernel(
    pixels_ptr,  # (P,) uint8
    table_ptr,  # (B, COLUMNS) int64
    starts_ptr,  # (MOST_B + 1,) int64
    sums_ptr,  # (programs,) int32, written: sums of grey after the steps before the contrast
    S: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONTRAST: tl.constexpr,
    SATURATION: tl.constexpr,
    MOST_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, part = locate(starts_ptr, MOST_B)
    row_ptr = table_ptr + image * COLUMNS
    area = tl.load(row_ptr + 1).to(tl.int32)
    pixel = tl.load(row_ptr + 2).to(tl.int32)
    channel = tl.load(row_ptr + 3).to(tl.int32)
    count = tl.load(row_ptr + 9)
    i = part * BLOCK + tl.arange(0, BLOCK)
    there = i < area
    at_ptr = pixels_ptr + tl.load(row_ptr) + i * pixel
    red = tl.load(at_ptr, mask=there, other=0).to(tl.float32)
    green = tl.load(at_ptr + channel, mask=there, other=0).to(tl.float32)
    blue = tl.load(at_ptr + 2 * channel, mask=there, other=0).to(tl.float32)
    steps_ptr = row_ptr + (COLUMNS - 2 * S)
    red, green, blue = _jitter(red, green, blue, steps_ptr, count, 0.0, S, CONTRAST, SATURATION)
    grey = tl.where(there, _grey(red, green, blue), 0.0).to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(grey, axis=0))


@triton.jit
def grey_means_kernel(
    sums_ptr,  # (programs,) int32
    table_ptr,  # (B, COLUMNS) int64
    starts_ptr,  # (MOST_B + 1,) int64
    means_ptr,  # (B,) fp32, written: rounded means, half up; 0 without sums
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first = tl.load(starts_ptr + image).to(tl.int32)
    last = tl.load(starts_ptr + image + 1).to(tl.int32)
    totals = tl.zeros((BLOCK,), tl.int64)
    for part in range(first, last, BLOCK):
        at = part + tl.arange(0, BLOCK)
        totals += tl.load(sums_ptr + at, mask=at < last, other=0)
    area = tl.load(table_ptr + image * COLUMNS + 1)
    mean = (2 * tl.sum(totals, axis=0) + area) // (2 * area)
    tl.store(means_ptr + image, mean.to(tl.float32))


@triton.jit
def jittered_crop_kernel(
    pixels_ptr,  # (P,) uint8
    table_ptr,  # (B, COLUMNS) int64
    starts_ptr,  # (MOST_B + 1,) int64
    means_ptr,  # (B,) fp32, or None: no contrast among the steps
    words_ptr,  # int32, written: the crops, flipped and jittered
    S: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONTRAST: tl.constexpr,
    SATURATION: tl.constexpr,
    MOST_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, part = locate(starts_ptr, MOST_B)
    row_ptr = table_ptr + image * COLUMNS
    channel = tl.load(row_ptr + 3).to(tl.int32)
    corner = tl.load(row_ptr + 4)
    across = tl.load(row_ptr + 5).to(tl.int32)
    down = tl.load(row_ptr + 6).to(tl.int32)
    width = tl.load(row_ptr + 7).to(tl.int32)
    area = tl.load(row_ptr + 8).to(tl.int32)
    i = part * BLOCK + tl.arange(0, BLOCK)
    there = i < area
    y = i // width
    at_ptr = pixels_ptr + corner + (y * down + (i - y * width) * across)
    red = tl.load(at_ptr, mask=there, other=0).to(tl.float32)
    green = tl.load(at_ptr + channel, mask=there, other=0).to(tl.float32)
    blue = tl.load(at_ptr + 2 * channel, mask=there, other=0).to(tl.float32)
    mean = 0.0
    if means_ptr is not None:
        mean = tl.load(means_ptr + image)
    steps_ptr = row_ptr + (COLUMNS - 2 * S)
    red, green, blue = _jitter(red, green, blue, steps_ptr, S, mean, S, CONTRAST, SATURATION)
    word = red.to(tl.int32) | (green.to(tl.int32) << 8) | (blue.to(tl.int32) << 16)
    tl.store(words_ptr + tl.load(row_ptr + 10) + i, word, mask=there)
