"""Antialiased resize of a ragged batch: weights (resampling.py), and a pass along an axis.

Pixels are words of four bytes, red lowest. A row of `axes` says how an image changes along an axis,
a row of `jobs` what a pass does to an image; the launcher, ragged_views_triton.py, makes both.
"""

from beit_fast.kernels._triton import tl, triton
from beit_fast.kernels.input.jitter_kernels import locate


@triton.jit
def _sine_of_half_turns(x):
    """sin(pi x) for x of at least 0, fp64: what is left of the nearest whole x, by its series."""
    nearest = tl.floor(x + 0.5)
    angle = (x - nearest) * 3.141592653589793
    square = angle * angle
    # To 1e-18 within a quarter turn; no table, no memory, where a library's sine has both.
    series = 1 / 51090942171709440000.0  # 1 / 21!
    series = series * square - 1 / 121645100408832000.0
    series = series * square + 1 / 355687428096000.0
    series = series * square - 1 / 1307674368000.0
    series = series * square + 1 / 6227020800.0
    series = series * square - 1 / 39916800.0
    series = series * square + 1 / 362880.0
    series = series * square - 1 / 5040.0
    series = series * square + 1 / 120.0
    series = series * square - 1 / 6.0
    sine = angle + angle * square * series
    return tl.where(nearest.to(tl.int32) % 2 == 0, sine, -sine)


@triton.jit
def _filter(x, LANCZOS: tl.constexpr):
    x = tl.abs(x)
    if LANCZOS:
        safe = tl.where(x < 1e-9, 1.0, x)
        waves = _sine_of_half_turns(safe) * _sine_of_half_turns(safe * (1 / 3))
        value = waves / (safe * safe * 3.289868133696453)  # pi^2 / 3
        return tl.where(x < 1e-9, 1.0, tl.where(x < 3, value, 0.0))
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def resize_weights_kernel(
    axes_ptr,  # (2, MOST_B, 3) int64: pixels before, the first weight, taps; down, then across
    firsts_ptr,  # (2, MOST_B, MOST) int32, written: the first pixel of each resized one
    weights_ptr,  # int32, written: (taps, pixels after) for each row of `axes`
    HEIGHT: tl.constexpr,  # pixels after
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,  # of the two the larger
    SUPPORT: tl.constexpr,
    LANCZOS: tl.constexpr,
    MOST_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    axis = tl.program_id(2).to(tl.int64) * MOST_B + tl.program_id(0)
    num_in = tl.load(axes_ptr + axis * 3)
    weights_ptr += tl.load(axes_ptr + axis * 3 + 1)
    taps = tl.load(axes_ptr + axis * 3 + 2).to(tl.int32)
    num_out = tl.where(axis < MOST_B, HEIGHT, WIDTH)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < num_out
    i = tl.minimum(place, num_out - 1)

    scale = num_in.to(tl.float64) / num_out.to(tl.float64)
    widened = tl.maximum(scale, 1.0)
    support = widened * SUPPORT
    centre = (i.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + support + 0.5).to(tl.int32), num_in.to(tl.int32))
    narrowed = 1 / widened
    total = tl.zeros((BLOCK,), tl.float64)
    for tap in range(taps):
        pixel = first + tap
        value = _filter((pixel.to(tl.float64) - centre + 0.5) * narrowed, LANCZOS)
        total += tl.where(pixel < last, value, 0.0)
    for tap in range(taps):
        pixel = first + tap
        value = _filter((pixel.to(tl.float64) - centre + 0.5) * narrowed, LANCZOS)
        value = tl.where(pixel < last, value, 0.0) / total * 4194304
        value += tl.where(value < 0, -0.5, 0.5)
        tl.store(weights_ptr + tap * num_out + i, value.to(tl.int32), mask=there)
    tl.store(firsts_ptr + axis * MOST + i, first, mask=there)


@triton.jit
def _level(total):
    return tl.minimum(tl.maximum(total >> 22, 0), 255)


@triton.jit
def resize_pass_kernel(
    words_ptr,  # int32: what is read, and what is written on the way
    view_ptr,  # (B, HEIGHT, WIDTH, 3) uint8, written by last passes
    axes_ptr,  # (2, MOST_B, 3) int64
    firsts_ptr,  # (2, MOST_B, MOST) int32
    weights_ptr,  # int32
    jobs_ptr,  # (B, 5) int64: first word read, pixels of a row read, rows and columns written,
    #            first word written, or -1 for the view
    starts_ptr,  # (MOST_B + 1,) int64
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    ALONG_ROWS: tl.constexpr,  # else along columns
    MOST_B: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    image, tile = locate(starts_ptr, MOST_B)
    jobs_ptr += image * 5
    read = words_ptr + tl.load(jobs_ptr)
    pitch = tl.load(jobs_ptr + 1).to(tl.int32)
    rows = tl.load(jobs_ptr + 2).to(tl.int32)
    cols = tl.load(jobs_ptr + 3).to(tl.int32)
    written = tl.load(jobs_ptr + 4)
    axis = image
    num_out: tl.constexpr = WIDTH if ALONG_ROWS else HEIGHT
    if ALONG_ROWS:
        axis += MOST_B
    last = tl.load(axes_ptr + axis * 3).to(tl.int32) - 1
    weights_ptr += tl.load(axes_ptr + axis * 3 + 1)
    taps = tl.load(axes_ptr + axis * 3 + 2).to(tl.int32)
    firsts_ptr += axis * MOST

    tiles_across = tl.cdiv(cols, COLS)
    tile_row = tile // tiles_across
    i = tile_row * ROWS + tl.arange(0, ROWS)
    j = (tile - tile_row * tiles_across) * COLS + tl.arange(0, COLS)
    # Columns are the first axis of a tile, which makes lanes of a warp read one row: no axis of
    # what is gathered is known to be dense, and then Triton has lanes follow the first one. What
    # lies beyond is computed as the last row, or column of weights, and not stored.
    near_i = tl.minimum(i, rows - 1)
    half: tl.constexpr = 2097152
    red = tl.full((COLS, ROWS), half, tl.int32)
    green = tl.full((COLS, ROWS), half, tl.int32)
    blue = tl.full((COLS, ROWS), half, tl.int32)
    if ALONG_ROWS:
        near_j = tl.minimum(j, cols - 1)
        first = tl.load(firsts_ptr + near_j)
        lines = read + near_i * pitch
        for tap in range(taps):
            weight = tl.load(weights_ptr + tap * num_out + near_j)[:, None]
            at = tl.minimum(first + tap, last)
            word = tl.load(lines[None, :] + at[:, None])
            red += (word & 255) * weight
            green += ((word >> 8) & 255) * weight
            blue += (word >> 16) * weight
    else:
        first = tl.load(firsts_ptr + near_i)
        there_j = (j < cols)[:, None]
        for tap in range(taps):
            weight = tl.load(weights_ptr + tap * num_out + near_i)[None, :]
            at = tl.minimum(first + tap, last) * pitch
            word = tl.load((read + j)[:, None] + at[None, :], mask=there_j, other=0)
            red += (word & 255) * weight
            green += ((word >> 8) & 255) * weight
            blue += (word >> 16) * weight

    red, green, blue = _level(red), _level(green), _level(blue)
    there = (i < rows)[None, :] & (j < cols)[:, None]
    if written >= 0:
        at = written + i * cols
        word = red | (green << 8) | (blue << 16)
        tl.store((words_ptr + at)[None, :] + j[:, None], word, mask=there)
    else:
        at = (image * HEIGHT + i) * (WIDTH * 3)
        at_ptr = (view_ptr + at)[None, :] + j[:, None] * 3
        tl.store(at_ptr, red.to(tl.uint8), mask=there)
        tl.store(at_ptr + 1, green.to(tl.uint8), mask=there)
        tl.store(at_ptr + 2, blue.to(tl.uint8), mask=there)
