"""What the forward kernels of attention do with tiles: load, score, attend, store.

A matrix of some rows and K columns is a tuple of tiles, one for each of PARTS, (begin, width) pairs
that cover K; a group of keys is a tuple of such tuples, one for each width. Symbols: `forward`.
"""

from beit_fast.kernels._triton import tl, triton
from beit_fast.kernels.attention.bias import raw_bias
from beit_fast.kernels.philox import random_tile


@triton.jit
def load_rows(
    ptr,  # first row of the tile
    stride,  # elements from row to row
    num_rows,  # rows that exist, or None: all; may be negative
    ROWS: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The tiles (ROWS, part) of some rows; zero beyond the rows and columns that exist."""
    row = tl.arange(0, ROWS)[:, None]
    at = ptr + row.to(OFFSET) * stride
    tiles = ()
    for j in tl.static_range(len(PARTS)):
        col = PARTS[j][0] + tl.arange(0, PARTS[j][1])[None, :]
        if num_rows is None:
            if PARTS[j][0] + PARTS[j][1] > K:
                tiles += (tl.load(at + col, mask=col < K, other=0.0),)
            else:
                tiles += (tl.load(at + col),)
        else:
            inside = row < num_rows
            if PARTS[j][0] + PARTS[j][1] > K:
                inside = inside & (col < K)
            tiles += (tl.load(at + col, mask=inside, other=0.0),)
    return tiles


@triton.jit
def load_keys(
    ptr,  # keys or values of one image and head, (M, K)
    stride,  # elements from row to row
    M,
    BEGIN: tl.constexpr,
    WIDTHS: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """For each tile of a group, which begins at key BEGIN, its parts (width, part)."""
    tiles = ()
    at = ptr + BEGIN * tl.cast(stride, tl.int64)
    left = M - BEGIN
    for i in tl.static_range(len(WIDTHS)):
        tiles += (load_rows(at, stride, left, WIDTHS[i], K, PARTS, OFFSET),)
        at += WIDTHS[i] * tl.cast(stride, tl.int64)
        left -= WIDTHS[i]
    return tiles


@triton.jit
def load_bias(
    ptr,  # first element of the tiles
    stride,  # elements from row to row; 0 where all rows are one
    num_rows,  # rows that are queries; may be negative
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The tiles (ROWS, width) of a group, side by side. Rows of no query cost no traffic."""
    row = tl.arange(0, ROWS)[:, None]
    at = ptr + row.to(OFFSET) * stride
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        col = tl.arange(0, WIDTHS[i])[None, :]
        tiles += (tl.load(at + col, mask=row < num_rows, other=0.0),)
        at += WIDTHS[i]
    return tiles


@triton.jit
def score(
    q,  # tuple of (ROWS, part)
    keys,  # for each tile a tuple of (width, part)
    biases,  # tuple of (ROWS, width)
    bias_unit,  # fp32: u; None: 1
    PRECISION: tl.constexpr,
):
    """s for a group of keys: a tuple of (ROWS, width) fp32."""
    scores = ()
    for i in tl.static_range(len(keys)):
        s = raw_bias(biases[i], bias_unit)
        for j in tl.static_range(len(q)):
            s = tl.dot(q[j], tl.trans(keys[i][j]), s, input_precision=PRECISION)
        scores += (s,)
    return scores


@triton.jit
def zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """For each part of K (ROWS, part) fp32."""
    acc = ()
    for j in tl.static_range(len(PARTS)):
        acc += (tl.full((ROWS, PARTS[j][1]), 0.0, tl.float32),)
    return acc


@triton.jit
def multiply_rows(acc, factor):
    """Each part (ROWS, part) of a tuple times factor (ROWS,)."""
    out = ()
    for j in tl.static_range(len(acc)):
        out += (acc[j] * factor[:, None],)
    return out


@triton.jit
def attend(
    scores,  # tuple of (ROWS, width) fp32
    values,  # for each tile a tuple of (width, part)
    keeps,  # tuple of (ROWS, width) bool: what dropout keeps; empty without dropout
    highest,  # (ROWS,) maximum of c s so far
    total,  # (ROWS,) sum of 2^(c s - highest) so far
    acc,  # tuple of (ROWS, part): sum of 2^(c s - highest) v so far
    exponent_factor,  # c
    IS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """highest, total and acc with a group of keys added; softmax is plain inside the group."""
    before = highest
    for i in tl.static_range(len(scores)):
        highest = tl.maximum(highest, tl.max(scores[i], 1) * exponent_factor)
    # Where all was -inf so far, any finite base gives weights of zero.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    if not IS_FIRST:
        rescale = tl.exp2(before - base)
        total *= rescale
        acc = multiply_rows(acc, rescale)
    for i in tl.static_range(len(scores)):
        p = tl.exp2(scores[i] * exponent_factor - base[:, None])
        total += tl.sum(p, 1)
        if len(keeps) > 0:
            p = tl.where(keeps[i], p, 0.0)
        p = p.to(values[i][0].dtype)
        added = ()
        for j in tl.static_range(len(acc)):
            part = tl.dot(p, values[i][j], acc[j], input_precision=PRECISION)
            added += (part,)
        acc = added
    return highest, total, acc


@triton.jit
def store_rows(
    highest,  # (ROWS,)
    total,  # (ROWS,)
    acc,  # tuple of (ROWS, part)
    gain,  # what the weights that dropout kept are multiplied by
    out_ptr,  # first row of the tile
    out_stride,  # elements from row to row
    lse_ptr,  # first row of the tile
    num_rows,  # rows that exist
    K: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    row = tl.arange(0, acc[0].shape[0])
    sees_nothing = total == 0.0
    total = tl.where(sees_nothing, 1.0, total)
    lse = tl.where(sees_nothing, float("inf"), highest + tl.log2(total))
    tl.store(lse_ptr + row, lse, mask=row < num_rows)
    out = multiply_rows(acc, gain / total)
    at = out_ptr + row[:, None].to(OFFSET) * out_stride
    for j in tl.static_range(len(PARTS)):
        col = PARTS[j][0] + tl.arange(0, PARTS[j][1])[None, :]
        inside = row[:, None] < num_rows
        if PARTS[j][0] + PARTS[j][1] > K:
            inside = inside & (col < K)
        tl.store(at + col, out[j].to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def keep(
    rng_ptr,  # (2,) int64: seed and offset
    stream,  # int32: image and head
    start,  # first query of the tile
    begin,  # first key of the tile, a multiple of 4
    M,  # keys
    drop_below,  # int32: a weight with a smaller random word is dropped
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Which weights of a tile dropout keeps: (ROWS, COLS) bool."""
    n = start.to(tl.int32) + tl.arange(0, ROWS)[:, None]
    quad = n * tl.cdiv(M, 4) + (begin // 4).to(tl.int32) + tl.arange(0, COLS // 4)[None, :]
    return random_tile(rng_ptr, quad, stream, ROWS, COLS) >= drop_below
