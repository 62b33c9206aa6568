"""What the general backward kernels of attention do with tiles: load, multiply, drop, store.

A matrix of some rows and K columns is a tuple of tiles, one for each of PARTS, (begin, width) pairs
that cover K. Symbols: `backward_general`.
"""

from beit_fast.kernels._triton import tl, triton
from beit_fast.kernels.philox import random_tile


@triton.jit
def load_rows(
    ptr,  # first row of the matrix (num_rows, K)
    stride,  # elements from row to row
    begin,  # first row of the tile
    num_rows,  # rows that exist
    ROWS: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """For each part of K the tile (ROWS, part) from row `begin` on; zero where there is nothing."""
    row = tl.arange(0, ROWS)[:, None]
    at = ptr + tl.cast(begin, tl.int64) * stride
    tiles = ()
    for j in tl.static_range(len(PARTS)):
        col = PARTS[j][0] + tl.arange(0, PARTS[j][1])[None, :]
        inside = row < num_rows - begin
        if PARTS[j][0] + PARTS[j][1] > K:
            inside = inside & (col < K)
        tiles += (tl.load(at + (row.to(OFFSET) * stride + col), mask=inside, other=0.0),)
    return tiles


@triton.jit
def store_rows(
    tiles,  # for each part of K (ROWS, part), fp32
    ptr,  # first row of the matrix (num_rows, K)
    stride,  # elements from row to row
    begin,  # first row of the tile
    num_rows,  # rows that exist
    K: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    row = tl.arange(0, tiles[0].shape[0])[:, None]
    at = ptr + tl.cast(begin, tl.int64) * stride
    for j in tl.static_range(len(PARTS)):
        col = PARTS[j][0] + tl.arange(0, PARTS[j][1])[None, :]
        inside = row < num_rows - begin
        if PARTS[j][0] + PARTS[j][1] > K:
            inside = inside & (col < K)
        tile = tiles[j].to(ptr.dtype.element_ty)
        tl.store(at + (row.to(OFFSET) * stride + col), tile, mask=inside)


@triton.jit
def load_bias(
    ptr,  # (Rn, Rm): bias of a head
    stride,  # elements from row to row; 0 where all rows are one
    n,  # first query
    m,  # first key
    N,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(ROWS, COLS); rows of no query cost no traffic, and their p is 0 whatever they hold."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    at = ptr + tl.cast(n, tl.int64) * stride + m
    return tl.load(at + (row * stride + col), mask=row < N - n, other=0.0)


@triton.jit
def scaled(
    tiles,  # for each part of K a tile
    factor,
):
    """Each tile times factor."""
    out = ()
    for j in tl.static_range(len(tiles)):
        out += (tiles[j] * factor,)
    return out


@triton.jit
def products(
    a,  # for each part of K (ROWS, part)
    b,  # for each part of K (COLS, part)
    acc,  # fp32 (ROWS, COLS)
    PRECISION: tl.constexpr,
):
    """acc + a b^T, summed over the parts."""
    for j in tl.static_range(len(a)):
        acc = tl.dot(a[j], tl.trans(b[j]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_products(
    weights,  # fp32 (ROWS, COLS)
    b,  # for each part of K (COLS, part)
    acc,  # for each part of K (ROWS, part)
    PRECISION: tl.constexpr,
):
    """acc + weights b, part by part; weights are rounded to b's type."""
    weights = weights.to(b[0].dtype)
    out = ()
    for j in tl.static_range(len(b)):
        out += (tl.dot(weights, b[j], acc[j], input_precision=PRECISION),)
    return out


@triton.jit
def dropout_factor(
    rng_ptr,  # (2,) int64: seed and offset
    stream,  # int32: image and head
    n,  # first query of the tile
    m,  # first key of the tile, a multiple of 4
    M,  # keys
    drop_below,  # int32: a weight with a smaller random word is dropped
    gain,  # fp32: what kept weights are multiplied by, 1 / (1 - p)
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Z, (ROWS, COLS) fp32."""
    row = n + tl.arange(0, ROWS)[:, None]
    quad = row * tl.cdiv(M, 4) + m // 4 + tl.arange(0, COLS // 4)[None, :]
    words = random_tile(rng_ptr, quad, stream, ROWS, COLS)
    return tl.where(words >= drop_below, gain, 0.0)
