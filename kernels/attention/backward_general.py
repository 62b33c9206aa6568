"""Backward kernels of attention for any length, head width, dtype and architecture; with dropout.

    p[n,m]   = 2^(c s[n,m] - lse[n])                   s, c, lse as in `attention_forward`
    delta[n] = rowsum(dout[n] out[n]) - dlse[n]        dlse, of the natural logarithm, may be absent
    ds[n,m]  = p[n,m] (Z[n,m] dout[n] . v[m] - delta[n])
    dq = scale ds k;  dk = scale ds^T q;  dv = (Z p)^T dout;  dbias = sum over images of ds

in three kernels, nine products of tiles where the least is five, and nothing added by two programs:

dq      a program has a tile of queries and walks over the keys; writes delta for the others
dk, dv  a program has a tile of keys and walks over the queries, on transposed scores
dbias   a program has a tile of the bias and walks over a chunk of the images of its group

Shapes    q, out, dout, dq (B, N, H, K); k, v, dk, dv (B, M, H, K); lse (B, H, N); bias
          (G, H, Rn, Rm), padded as in `attention_bias`; image b has bias b mod G
          stats (B, H, 2, S): lse and delta, S whole tiles of queries, lse = inf beyond N
          partials (C, G, H, N, Rm): dbias is their sum over C
Types     statistics, p, ds and sums in fp32; p and ds are rounded to q's type as operands, and
          dbias adds ds unrounded
Padding   keys m >= M have a bias of -inf, queries n >= N a log-sum-exp of inf: p is 0 there
Legend    C chunks of the images of a group
"""

import math

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, tl, triton
from beit_fast.kernels.attention.bias import bias_unit, raw_bias
from beit_fast.kernels.attention.chunks import num_chunks
from beit_fast.kernels.attention.configs import GeneralBackward, Tile, dbias_ctas, head_parts
from beit_fast.kernels.attention.descriptors import can_describe, describe
from beit_fast.kernels.philox import random_tile, threshold_of


@triton.jit
def _load_rows(
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
def _store_rows(
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
def _load_bias(
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
def _zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """For each part of K (ROWS, part) fp32."""
    tiles = ()
    for j in tl.static_range(len(PARTS)):
        tiles += (tl.full((ROWS, PARTS[j][1]), 0.0, tl.float32),)
    return tiles


@triton.jit
def _scaled(
    tiles,  # for each part of K a tile
    factor,
):
    """Each tile times factor."""
    out = ()
    for j in tl.static_range(len(tiles)):
        out += (tiles[j] * factor,)
    return out


@triton.jit
def _products(
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
def _add_products(
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
def _dropout_factor(
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


@triton.jit
def _dq_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, Rn, Rm)
    out_ptr,  # (B, N, H, K)
    dout_ptr,  # (B, N, H, K)
    lse_ptr,  # (B, H, N) fp32
    dlse_ptr,  # (B, H, N) fp32; None: nothing depends on lse
    rng_ptr,  # (2,) int64: seed and offset; None without dropout
    stats_ptr,  # (B, H, 2, S) fp32: lse and delta, written
    dq_ptr,  # (B, N, H, K), written; None: only stats are
    q_stride_b,  # this and the next strides of activations in units of UNIT elements
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    out_stride_b,
    out_stride_n,
    out_stride_h,
    dout_stride_b,
    dout_stride_n,
    dout_stride_h,
    dq_stride_b,
    dq_stride_n,
    dq_stride_h,
    bias_stride_g,  # elements, as the next two; each may be 0
    bias_stride_h,
    bias_stride_n,
    G,  # groups of images
    H,  # heads
    N,  # queries
    M,  # keys
    S,  # queries in whole tiles
    scale,  # fp32
    bias_unit,  # fp32: u; None: 1
    exponent_factor,  # fp32: c
    drop_below,  # int32: see _dropout_factor
    gain,  # fp32: see _dropout_factor
    K: tl.constexpr,
    PARTS: tl.constexpr,  # (begin, width) of the tiles that K is cut into
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,  # see _strides
    OFFSET: tl.constexpr,  # type of offsets inside a tile
    PRECISION: tl.constexpr,
):
    """A tile of queries of one head of one image; tiles are neighbours, then heads."""
    tiles = S // BLOCK_N
    n = (tl.program_id(0) % tiles) * BLOCK_N
    bh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b, h = bh // H, bh % H
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    out_ptr += (b * out_stride_b + h * out_stride_h) * UNIT
    dout_ptr += (b * dout_stride_b + h * dout_stride_h) * UNIT
    bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h
    row = n + tl.arange(0, BLOCK_N)

    out = _load_rows(out_ptr, out_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
    dout = _load_rows(dout_ptr, dout_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
    delta = tl.full((BLOCK_N,), 0.0, tl.float32)
    for j in tl.static_range(len(PARTS)):
        delta += tl.sum(out[j].to(tl.float32) * dout[j].to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * N + row, mask=row < N, other=0.0)
    lse = tl.load(lse_ptr + bh * N + row, mask=row < N, other=float("inf"))
    tl.store(stats_ptr + bh * 2 * S + row, lse)
    tl.store(stats_ptr + bh * 2 * S + S + row, delta)
    if dq_ptr is not None:
        q = _load_rows(q_ptr, q_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
        dq = _zeros(BLOCK_N, PARTS)
        for m in tl.range(0, M, BLOCK_M, disable_licm=True):
            k = _load_rows(k_ptr, k_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
            v = _load_rows(v_ptr, v_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
            bias = _load_bias(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
            s = _products(q, k, raw_bias(bias, bias_unit), PRECISION)
            p = tl.exp2(s * exponent_factor - lse[:, None])
            dp = _products(dout, v, tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32), PRECISION)
            if rng_ptr is not None:
                dp *= _dropout_factor(
                    rng_ptr, bh.to(tl.int32), n, m, M, drop_below, gain, BLOCK_N, BLOCK_M
                )
            ds = p * (dp - delta[:, None])
            dq = _add_products(ds, k, dq, PRECISION)
        dq_ptr += (b * dq_stride_b + h * dq_stride_h) * UNIT
        _store_rows(_scaled(dq, scale), dq_ptr, dq_stride_n * UNIT, n, N, K, PARTS, OFFSET)


@triton.jit
def _dk_dv_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, Rn, Rm)
    dout_ptr,  # (B, N, H, K)
    stats_ptr,  # (B, H, 2, S) fp32: lse and delta
    rng_ptr,  # (2,) int64: seed and offset; None without dropout
    dk_ptr,  # (B, M, H, K), written; None: it is not wanted
    dv_ptr,  # (B, M, H, K), written; None: it is not wanted
    q_stride_b,  # this and the next strides of activations in units of UNIT elements
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    dout_stride_b,
    dout_stride_n,
    dout_stride_h,
    dk_stride_b,
    dk_stride_n,
    dk_stride_h,
    dv_stride_b,
    dv_stride_n,
    dv_stride_h,
    bias_stride_g,  # elements, as the next two; each may be 0
    bias_stride_h,
    bias_stride_n,
    G,  # groups of images
    H,  # heads
    N,  # queries
    M,  # keys
    S,  # queries in whole tiles
    scale,  # fp32
    bias_unit,  # fp32: u; None: 1
    exponent_factor,  # fp32: c
    drop_below,  # int32: see _dropout_factor
    gain,  # fp32: see _dropout_factor
    K: tl.constexpr,
    PARTS: tl.constexpr,  # (begin, width) of the tiles that K is cut into
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,  # see _strides
    OFFSET: tl.constexpr,  # type of offsets inside a tile
    PRECISION: tl.constexpr,
):
    """A tile of keys of one head of one image; tiles are neighbours, then heads."""
    tiles = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles) * BLOCK_M
    bh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b, h = bh // H, bh % H
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    dout_ptr += (b * dout_stride_b + h * dout_stride_h) * UNIT
    bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h
    lse_ptr = stats_ptr + bh * 2 * S
    delta_ptr = lse_ptr + S

    k = _load_rows(k_ptr, k_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
    v = _load_rows(v_ptr, v_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
    dk = _zeros(BLOCK_M, PARTS)
    dv = _zeros(BLOCK_M, PARTS)
    for n in tl.range(0, N, BLOCK_N, disable_licm=True):
        row = n + tl.arange(0, BLOCK_N)
        q = _load_rows(q_ptr, q_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
        dout = _load_rows(dout_ptr, dout_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
        bias = _load_bias(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
        s = _products(k, q, raw_bias(tl.trans(bias), bias_unit), PRECISION)
        p = tl.exp2(s * exponent_factor - tl.load(lse_ptr + row)[None, :])
        zp = p
        if rng_ptr is not None:
            z = tl.trans(
                _dropout_factor(
                    rng_ptr, bh.to(tl.int32), n, m, M, drop_below, gain, BLOCK_N, BLOCK_M
                )
            )
            zp = p * z
        if dv_ptr is not None:
            dv = _add_products(zp, dout, dv, PRECISION)
        if dk_ptr is not None:
            dp = _products(v, dout, tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32), PRECISION)
            if rng_ptr is not None:
                dp *= z
            ds = p * (dp - tl.load(delta_ptr + row)[None, :])
            dk = _add_products(ds, q, dk, PRECISION)
    if dk_ptr is not None:
        dk_ptr += (b * dk_stride_b + h * dk_stride_h) * UNIT
        _store_rows(_scaled(dk, scale), dk_ptr, dk_stride_n * UNIT, m, M, K, PARTS, OFFSET)
    if dv_ptr is not None:
        dv_ptr += (b * dv_stride_b + h * dv_stride_h) * UNIT
        _store_rows(dv, dv_ptr, dv_stride_n * UNIT, m, M, K, PARTS, OFFSET)


@triton.jit
def _dbias_kernel(
    q_desc,  # (B, H, N, K), blocks of BLOCK_N queries; None: the next four are read by pointers
    k_desc,  # (B, H, M, K), blocks of BLOCK_M keys
    v_desc,  # (B, H, M, K), blocks of BLOCK_M keys
    dout_desc,  # (B, H, N, K), blocks of BLOCK_N queries
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, Rn, Rm)
    dout_ptr,  # (B, N, H, K)
    stats_ptr,  # (B, H, 2, S) fp32: lse and delta
    rng_ptr,  # (2,) int64: seed and offset; None without dropout
    partials_ptr,  # (C, G, H, N, Rm) fp32, contiguous, written
    q_stride_b,  # this and the next strides of activations in units of UNIT elements
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    dout_stride_b,
    dout_stride_n,
    dout_stride_h,
    bias_stride_g,  # elements, as the next two; each may be 0
    bias_stride_h,
    bias_stride_n,
    G,  # groups of images
    H,  # heads
    N,  # queries
    M,  # keys
    S,  # queries in whole tiles
    Rm,
    images,  # of each group
    C,
    bias_unit,  # fp32: u; None: 1
    exponent_factor,  # fp32: c
    drop_below,  # int32: see _dropout_factor
    gain,  # fp32: see _dropout_factor
    K: tl.constexpr,
    PARTS: tl.constexpr,  # (begin, width) of the tiles that K is cut into
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,  # see _strides
    OFFSET: tl.constexpr,  # type of offsets inside a tile
    PRECISION: tl.constexpr,
):
    """A tile of the bias of one head and group, over one chunk of the group's images."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    n = (tl.program_id(0) % tiles) // tiles_m * BLOCK_N
    m = tl.program_id(0) % tiles_m * BLOCK_M
    cgh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    h = cgh % H
    g = cgh // H % G
    c = cgh // H // G
    row = n + tl.arange(0, BLOCK_N)
    bias_ptr += g * bias_stride_g + h * bias_stride_h
    begin = (c * images // C).to(tl.int32)
    end = ((c + 1) * images // C).to(tl.int32)
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for i in tl.range(begin, end, disable_licm=True):
        b = tl.cast(i, tl.int64) * G + g
        if q_desc is not None:
            at_n = [b.to(tl.int32), h.to(tl.int32), n, 0]
            at_m = [b.to(tl.int32), h.to(tl.int32), m, 0]
            q = (q_desc.load(at_n).reshape(BLOCK_N, K),)
            k = (k_desc.load(at_m).reshape(BLOCK_M, K),)
            dout = (dout_desc.load(at_n).reshape(BLOCK_N, K),)
            v = (v_desc.load(at_m).reshape(BLOCK_M, K),)
        else:
            q_at = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT
            k_at = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT
            v_at = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT
            dout_at = dout_ptr + (b * dout_stride_b + h * dout_stride_h) * UNIT
            q = _load_rows(q_at, q_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
            k = _load_rows(k_at, k_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
            dout = _load_rows(dout_at, dout_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
            v = _load_rows(v_at, v_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
        # `i < end` is always true: it keeps the bias, the same for all images, out of the loads
        # that are pipelined through shared memory, and out of registers held through the loop.
        bias = tl.full((BLOCK_N, BLOCK_M), 0.0, bias_ptr.dtype.element_ty)
        if i < end:
            bias = _load_bias(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
        lse_ptr = stats_ptr + (b * H + h) * 2 * S
        lse = tl.load(lse_ptr + row, mask=row < S, other=float("inf"))
        delta = tl.load(lse_ptr + S + row, mask=row < S, other=0.0)
        s = _products(q, k, raw_bias(bias, bias_unit), PRECISION)
        p = tl.exp2(s * exponent_factor - lse[:, None])
        dp = _products(dout, v, tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32), PRECISION)
        if rng_ptr is not None:
            stream = (b * H + h).to(tl.int32)
            dp *= _dropout_factor(rng_ptr, stream, n, m, M, drop_below, gain, BLOCK_N, BLOCK_M)
        acc += p * (dp - delta[:, None])
    partials_ptr += cgh * N * Rm
    at = partials_ptr + tl.cast(row[:, None], tl.int64) * Rm + m
    tl.store(at + tl.arange(0, BLOCK_M)[None, :], acc, mask=row[:, None] < N)


def general_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    tf32: bool,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    trains_bias: bool,
    config: GeneralBackward,
) -> Tensor | None:
    """Write dq, dk, dv where they are tensors; return partials (C, G, H, N, Rm) of dbias.

    Shapes as on top of this file. None is returned where the bias is frozen.
    """
    if dq is None and dk is None and dv is None and not trains_bias:
        return None
    B, N, H, K = q.shape
    M, G, padded_cols = k.shape[1], len(bias), bias.shape[3]
    # Of whole tiles of dq, which writes the statistics, dk and dv read whole ones.
    assert config.dq.block_n % config.dk_dv.block_n == 0
    padded_rows = cdiv(N, config.dq.block_n) * config.dq.block_n
    stats = torch.empty((B, H, 2, padded_rows), dtype=torch.float32, device=q.device)
    strides, unit, offset = _strides(q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv)

    def shared(tile: Tile, *names: str) -> dict:
        assert padded_cols % tile.block_m == 0
        return {
            "on": q,
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "bias_ptr": bias,
            "dout_ptr": dout,
            "stats_ptr": stats,
            "rng_ptr": rng if dropout_p > 0 else None,
            **{name: value for name, value in strides.items() if name.split("_")[0] in names},
            "bias_stride_g": bias.stride(0),
            "bias_stride_h": bias.stride(1),
            "bias_stride_n": bias.stride(2),
            "G": G,
            "H": H,
            "N": N,
            "M": M,
            "S": padded_rows,
            "bias_unit": bias_unit(q.dtype, scale),
            "exponent_factor": scale * math.log2(math.e),
            "drop_below": threshold_of(dropout_p),
            "gain": 1 / (1 - dropout_p),
            "K": K,
            "PARTS": head_parts(K, tile.part),
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "UNIT": unit,
            "OFFSET": offset,
            "PRECISION": "tf32" if tf32 else "ieee",
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    launch(
        _dq_kernel,
        (padded_rows // config.dq.block_n * B * H,),
        out_ptr=out,
        lse_ptr=lse,
        dlse_ptr=dlse,
        dq_ptr=dq,
        scale=scale,
        **shared(config.dq, "q", "k", "v", "out", "dout", "dq"),
    )
    if dk is not None or dv is not None:
        launch(
            _dk_dv_kernel,
            (cdiv(M, config.dk_dv.block_m) * B * H,),
            dk_ptr=dk,
            dv_ptr=dv,
            scale=scale,
            **shared(config.dk_dv, "q", "k", "v", "dout", "dk", "dv"),
        )
    if not trains_bias:
        return None
    tile = config.dbias
    programs = cdiv(N, tile.block_n) * cdiv(M, tile.block_m) * H * G
    chunk_bytes = 4 * G * H * N * padded_cols
    gpu = gpu_of(q)
    slots = dbias_ctas(gpu, q.dtype, K, tile, dropout_p > 0) * gpu.num_sms
    C = num_chunks(programs, B // G, chunk_bytes, slots)
    partials = torch.empty((C, G, H, N, padded_cols), dtype=torch.float32, device=q.device)
    launch(
        _dbias_kernel,
        (C * programs,),
        **_descriptors(tile, q, k, v, dout),
        partials_ptr=partials,
        Rm=padded_cols,
        images=B // G,
        C=C,
        **shared(tile, "q", "k", "v", "dout"),
    )
    return partials


def _descriptors(tile: Tile, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict:
    """Tensor descriptors by kernel argument, or None by each where they do not apply.

    They are for Hopper, where they free 30 to 70 registers of a thread, and heads of one part.
    """
    tensors = {"q_desc": q, "k_desc": k, "v_desc": v, "dout_desc": dout}
    is_possible = (
        gpu_of(q).capability == (9, 0)
        and q.dtype != torch.float32
        and head_parts(q.shape[3], tile.part) == ((0, q.shape[3]),)
        and all(can_describe(tensor) for tensor in tensors.values())
    )
    if not is_possible:
        return dict.fromkeys(tensors)
    rows = (tile.block_n, tile.block_m, tile.block_m, tile.block_n)
    return {
        name: describe(tensor, block)
        for (name, tensor), block in zip(tensors.items(), rows, strict=True)
    }


def _strides(**tensors: Tensor | None) -> tuple[dict[str, int], int, tl.dtype]:
    """Strides by kernel argument in units, the unit in elements, and the type of tile offsets.

    The unit is known to the compiler, so that it sees how rows are aligned: at most 8 elements,
    what one load takes.
    """
    strides = {
        f"{name}_stride_{dim}": tensor.stride(i)
        if tensor is not None and tensor.shape[i] > 1
        else 0
        for name, tensor in tensors.items()
        for i, dim in enumerate("bnh")
    }
    unit = math.gcd(8, *strides.values())
    farthest = 128 * max(stride for name, stride in strides.items() if name.endswith("_n"))
    offset = tl.int32 if farthest < 2**31 else tl.int64
    return {name: stride // unit for name, stride in strides.items()}, unit, offset
