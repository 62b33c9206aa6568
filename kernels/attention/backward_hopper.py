"""Backward of attention on Hopper for sequences of 65 to 208 tokens, BEiT's at 224 pixels.

    delta = rowsum(dout out) - dlse     p = exp2(scale log2(e) (q k^T + u bias) - lse)
    ds = p (dout v^T - delta)           dbias = sum of ds over the images of a group
    dq = scale ds k                     dk = scale ds^T q         dv = p^T dout

Two launches. A program of the first owns 64 queries of one head and walks over a chunk of the
images: dbias never leaves the registers before the chunk ends, the bias tile stays in the L1
cache, and q, k, v, out and dout arrive through tensor descriptors. They are asked for when the
image before is done; meanwhile the other program of the multiprocessor computes. The second
launch computes dk and dv, a program for each image and head. With a frozen bias the first one is
of that kind too.

Shapes    q, out, dout, dq (B, N, H, K); k, v, dk, dv (B, M, H, K): views, last stride 1;
          bias (G, H, padded N, padded M) fp16, in units of u raw scores, -inf in keys beyond M;
          lse (B, H, N) fp32, base 2, +inf for a fully masked row; dlse (B, H, N), of the natural
          logarithm, may be absent; image b is of group b mod G
Types     bf16 or fp16; statistics, ds and dbias fp32; p and ds in q's dtype as matrix operands
Cost      7 matrix products and 2 exponentials per score; each tensor is read once or twice
Legend    Queries and keys are cut into tiles of 64 and one tail of 16 or 32 (197 = 3 64 + 16).
          C chunks of images: partial sums of dbias, (C, G, H, N, tiles' columns)
"""

import math

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, tl, triton
from beit_fast.kernels.attention.backward_hopper_dk_dv import launch_dk_dv
from beit_fast.kernels.attention.bias import bias_unit, raw_bias
from beit_fast.kernels.attention.chunks import num_chunks
from beit_fast.kernels.attention.descriptors import can_describe, describe
from beit_fast.kernels.attention.strides import strides_of

LONGEST = 208  # dbias of 64 queries takes 104 of 255 registers a thread at this many keys


@triton.jit
def _unpack_bias(
    pairs,  # int32 (ROWS, COLS / 2): two fp16 each
    bias_unit,  # fp32: u; None: 1
):
    """fp32 (ROWS, COLS)."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    joined = tl.join(low, high).reshape(pairs.shape[0], 2 * pairs.shape[1])
    return raw_bias(joined, bias_unit)


@triton.jit
def _scores_gradient(
    q,  # (ROWS, K)
    dout,  # (ROWS, K)
    k,  # (COLS, K)
    v,  # (COLS, K)
    bias,  # fp32 (ROWS, COLS), the first value of the accumulator
    lse,  # fp32 (ROWS,)
    delta,  # fp32 (ROWS,)
    factor,  # fp32: scale log2(e)
):
    """ds, fp32 (ROWS, COLS)."""
    dp = tl.dot(dout, tl.trans(v)) - delta[:, None]
    s = tl.dot(q, tl.trans(k), acc=bias)
    return tl.math.exp2(s * factor - lse[:, None]) * dp


@triton.jit
def _keep_to_one_buffer(
    tile,  # (ROWS, COLS) from a tensor descriptor
    anywhere_ptr,  # fp32
    never,  # a condition that never holds
):
    """A second use of a loaded tile, which the compiler sees and removes after pipelining.

    A pipelined tile whose only use is a matrix product gets one more buffer in shared memory, for
    products still running when the next load starts. Ours have ended by then, and without that
    buffer two programs share a multiprocessor: 84 KiB each instead of 145.
    """
    if never:
        offs_row = tl.arange(0, tile.shape[0])[:, None] * tile.shape[1]
        tl.store(anywhere_ptr + offs_row + tl.arange(0, tile.shape[1])[None, :], tile)


@triton.jit
def _dq_dbias_kernel(
    q_desc,  # (B, H, N, K), blocks of ROWS queries
    k_desc,  # (B, H, M, K), blocks of COLS keys
    v_desc,  # (B, H, M, K), blocks of COLS keys
    k_tail_desc,  # (B, H, M, K), blocks of TAIL keys, or None
    v_tail_desc,  # (B, H, M, K), blocks of TAIL keys, or None
    out_desc,  # (B, H, N, K), blocks of ROWS queries
    dout_desc,  # (B, H, N, K), blocks of ROWS queries
    pairs_ptr,  # (G, H, padded N, padded M / 2) int32: two fp16 of the bias each
    lse_ptr,  # (B, H, N) fp32
    dlse_ptr,  # (B, H, N) fp32; None: nothing depends on lse
    dq_ptr,  # (B, N, H, K), or None
    stats_ptr,  # (B, H, 2, PADDED_ROWS) fp32: lse (+inf beyond N) and delta, written here
    partials_ptr,  # (C, G, H, N, TILES COLS + TAIL) fp32
    dq_stride_b,
    dq_stride_n,
    dq_stride_h,
    pairs_stride_g,
    pairs_stride_h,
    scale,  # fp32
    bias_unit,  # fp32: u; None: 1
    factor,  # fp32: scale log2(e)
    B,  # images
    H,  # heads
    N,  # queries
    G,  # groups of images
    C,  # chunks of a group's images
    PADDED_ROWS: tl.constexpr,  # of stats
    PAIRS_STRIDE_N: tl.constexpr,  # 0 or padded M / 2: offsets known when compiling, no addresses
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    TAIL: tl.constexpr,
):
    row_tiles = tl.cdiv(N, ROWS)
    n0 = (tl.program_id(0) % row_tiles) * ROWS
    h = tl.program_id(0) // row_tiles % H
    cg = tl.program_id(0) // (row_tiles * H)
    c = tl.cast(cg // G, tl.int64)
    g = cg % G
    num_images = tl.cdiv(B - g, G)
    first = (c * num_images // C).to(tl.int32)
    last = ((c + 1) * num_images // C).to(tl.int32)

    rows = tl.arange(0, ROWS)
    inside = rows < N - n0
    h64 = tl.cast(h, tl.int64)
    pairs_ptr += tl.cast(g, tl.int64) * pairs_stride_g + h64 * pairs_stride_h
    pairs_rows = pairs_ptr + n0 * PAIRS_STRIDE_N + rows[:, None] * PAIRS_STRIDE_N
    pairs_cols = tl.arange(0, COLS // 2)[None, :]

    dbias = ()
    for _ in tl.static_range(TILES):
        dbias += (tl.full((ROWS, COLS), 0, tl.float32),)
    if TAIL:
        tail_cols = TILES * COLS // 2 + tl.arange(0, TAIL // 2)[None, :]
        dbias_tail = tl.full((ROWS, TAIL), 0, tl.float32)

    # Hoisting would only fill the stack with addresses.
    for i in tl.range(first, last, disable_licm=True):
        b = i * G + g
        bh = tl.cast(b, tl.int64) * H + h
        # The smallest tiles first: the loads of an image arrive in the order of the program.
        q = q_desc.load([b, h, n0, 0]).reshape(ROWS, K)
        dout = dout_desc.load([b, h, n0, 0]).reshape(ROWS, K)
        out = out_desc.load([b, h, n0, 0]).reshape(ROWS, K)
        _keep_to_one_buffer(q, partials_ptr, i >= last)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        # `i < last` is always true. It keeps what it guards out of the loads that are pipelined
        # through shared memory, and the pairs out of the registers of the whole loop.
        lse = tl.full((ROWS,), 0, tl.float32)
        if i < last:
            lse = tl.load(lse_ptr + bh * N + n0 + rows, mask=inside, other=float("inf"))
            if dlse_ptr is not None:
                delta -= tl.load(dlse_ptr + bh * N + n0 + rows, mask=inside, other=0.0)
        stats = stats_ptr + bh * 2 * PADDED_ROWS + n0 + rows
        stored = rows < PADDED_ROWS - n0
        tl.store(stats, lse, mask=stored)
        tl.store(stats + PADDED_ROWS, delta, mask=stored)
        dq = tl.full((ROWS, K), 0, tl.float32)
        if TAIL:
            k = k_tail_desc.load([b, h, TILES * COLS, 0]).reshape(TAIL, K)
            v = v_tail_desc.load([b, h, TILES * COLS, 0]).reshape(TAIL, K)
            _keep_to_one_buffer(k, partials_ptr, i >= last)
            _keep_to_one_buffer(v, partials_ptr, i >= last)
            pairs = tl.full((ROWS, TAIL // 2), 0, tl.int32)
            if i < last:
                pairs = tl.load(pairs_rows + tail_cols)
            ds = _scores_gradient(q, dout, k, v, _unpack_bias(pairs, bias_unit), lse, delta, factor)
            dbias_tail += ds
            if dq_ptr is not None:
                dq = tl.dot(ds.to(k.dtype), k, acc=dq)
        sums = ()
        for t in tl.static_range(TILES):
            k = k_desc.load([b, h, t * COLS, 0]).reshape(COLS, K)
            v = v_desc.load([b, h, t * COLS, 0]).reshape(COLS, K)
            _keep_to_one_buffer(k, partials_ptr, i >= last)
            _keep_to_one_buffer(v, partials_ptr, i >= last)
            pairs = tl.full((ROWS, COLS // 2), 0, tl.int32)
            if i < last:
                pairs = tl.load(pairs_rows + (t * COLS // 2 + pairs_cols))
            ds = _scores_gradient(q, dout, k, v, _unpack_bias(pairs, bias_unit), lse, delta, factor)
            sums += (dbias[t] + ds,)
            if dq_ptr is not None:
                dq = tl.dot(ds.to(k.dtype), k, acc=dq)
        dbias = sums
        if dq_ptr is not None:
            at = tl.cast(b, tl.int64) * dq_stride_b + h64 * dq_stride_h + n0 * dq_stride_n
            tile = rows[:, None] * dq_stride_n + tl.arange(0, K)[None, :]
            dq = (dq * scale).to(dq_ptr.dtype.element_ty)
            tl.store(dq_ptr + at + tile, dq, mask=inside[:, None])

    width: tl.constexpr = TILES * COLS + TAIL
    partials_ptr += (((c * G + g) * H + h) * N + n0) * width
    for t in tl.static_range(TILES):
        cols = t * COLS + tl.arange(0, COLS)[None, :]
        tl.store(partials_ptr + rows[:, None] * width + cols, dbias[t], mask=inside[:, None])
    if TAIL:
        cols = TILES * COLS + tl.arange(0, TAIL)[None, :]
        tl.store(partials_ptr + rows[:, None] * width + cols, dbias_tail, mask=inside[:, None])


@triton.jit
def _dq_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    out_ptr,  # (B, N, H, K)
    dout_ptr,  # (B, N, H, K)
    bias_ptr,  # (G, H, padded N, padded M) fp16
    lse_ptr,  # (B, H, N) fp32
    dlse_ptr,  # (B, H, N) fp32; None: nothing depends on lse
    dq_ptr,  # (B, N, H, K), or None: only the statistics are wanted
    stats_ptr,  # (B, H, 2, PADDED_ROWS) fp32: lse (+inf beyond N) and delta, written here
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_m,
    k_stride_h,
    v_stride_b,
    v_stride_m,
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
    bias_stride_g,
    bias_stride_h,
    scale,  # fp32
    bias_unit,  # fp32: u; None: 1
    factor,  # fp32: scale log2(e)
    H,  # heads
    N,  # queries
    M,  # keys
    G,  # groups of images
    PADDED_ROWS: tl.constexpr,  # of stats
    BIAS_STRIDE_N: tl.constexpr,  # 0 or padded M
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    TAIL: tl.constexpr,
):
    bh = tl.cast(tl.program_id(0), tl.int64)
    b, h = bh // H, bh % H
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    offs_k = tl.arange(0, K)[None, :]
    out_ptr += b * out_stride_b + h * out_stride_h
    dout_ptr += b * dout_stride_b + h * dout_stride_h
    lse_ptr += bh * N
    stats_ptr += bh * (2 * PADDED_ROWS)

    if dq_ptr is not None:
        q_ptr += b * q_stride_b + h * q_stride_h
        k_ptr += b * k_stride_b + h * k_stride_h
        v_ptr += b * v_stride_b + h * v_stride_h
        dq_ptr += b * dq_stride_b + h * dq_stride_h
        bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h
        k = ()
        v = ()
        for t in tl.static_range(TILES):
            m = t * COLS + cols
            keys = (m < M)[:, None]
            k += (tl.load(k_ptr + m[:, None] * k_stride_m + offs_k, mask=keys, other=0.0),)
            v += (tl.load(v_ptr + m[:, None] * v_stride_m + offs_k, mask=keys, other=0.0),)
        if TAIL:
            tail_m = TILES * COLS + tl.arange(0, TAIL)
            tail_keys = (tail_m < M)[:, None]
            k_tile = k_ptr + tail_m[:, None] * k_stride_m + offs_k
            v_tile = v_ptr + tail_m[:, None] * v_stride_m + offs_k
            k_tail = tl.load(k_tile, mask=tail_keys, other=0.0)
            v_tail = tl.load(v_tile, mask=tail_keys, other=0.0)

    for j in tl.range(0, tl.cdiv(N, ROWS), num_stages=1, disable_licm=True):
        n = j * ROWS + rows
        inside = (n < N)[:, None]
        dout = tl.load(dout_ptr + n[:, None] * dout_stride_n + offs_k, mask=inside, other=0.0)
        out = tl.load(out_ptr + n[:, None] * out_stride_n + offs_k, mask=inside, other=0.0)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + bh * N + n, mask=n < N, other=0.0)
        lse = tl.load(lse_ptr + n, mask=n < N, other=float("inf"))
        tl.store(stats_ptr + n, lse, mask=n < PADDED_ROWS)
        tl.store(stats_ptr + PADDED_ROWS + n, delta, mask=n < PADDED_ROWS)
        if dq_ptr is not None:
            q = tl.load(q_ptr + n[:, None] * q_stride_n + offs_k, mask=inside, other=0.0)
            dq = tl.full((ROWS, K), 0, tl.float32)
            bias_rows = bias_ptr + n[:, None] * BIAS_STRIDE_N
            for t in tl.static_range(TILES):
                bias = raw_bias(tl.load(bias_rows + (t * COLS + cols)[None, :]), bias_unit)
                ds = _scores_gradient(q, dout, k[t], v[t], bias, lse, delta, factor)
                dq = tl.dot(ds.to(q.dtype), k[t], acc=dq)
            if TAIL:
                tail_bias = raw_bias(tl.load(bias_rows + tail_m[None, :]), bias_unit)
                tail_ds = _scores_gradient(q, dout, k_tail, v_tail, tail_bias, lse, delta, factor)
                dq = tl.dot(tail_ds.to(q.dtype), k_tail, acc=dq)
            dq_tile = dq_ptr + n[:, None] * dq_stride_n + offs_k
            tl.store(dq_tile, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


def hopper_fits(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor) -> bool:
    """Whether `hopper_backward` can take these: GPU, dtype, lengths, and what descriptors need."""
    B, N, H, K = q.shape
    return (
        gpu_of(q).capability == (9, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == q.dtype for t in (k, v, out, dout))
        and B > 0
        and H > 0
        and K in (32, 64)
        and all(64 < length <= LONGEST for length in (N, k.shape[1]))
        and all(can_describe(t) for t in (q, k, v, out, dout))
    )


def _tiles(length: int) -> tuple[int, int]:
    """How many tiles of 64, and the length of the tail after them: 0, 16 or 32."""
    whole, rest = divmod(length, 64)
    return (whole + 1, 0) if rest > 32 else (whole, 0 if rest == 0 else 16 if rest <= 16 else 32)


def hopper_backward(
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
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    trains_bias: bool,
) -> Tensor | None:
    """Write the gradients that are wanted; return partial sums of dbias (C, G, H, N, >= M), fp32.

    Shapes as on top of this file. None is returned where the bias is frozen. What
    `hopper_fits` refuses must not come here.
    """
    B, N, H, K = q.shape
    M, G = k.shape[1], len(bias)
    row_tiles, row_tail = _tiles(N)
    tiles, tail = _tiles(M)
    padded_rows, padded_cols = 64 * row_tiles + row_tail, 64 * tiles + tail
    stats = q.new_empty((B, H, 2, padded_rows), dtype=torch.float32)
    factor = scale * math.log2(math.e)
    shared = {"scale": scale, "factor": factor, "H": H, "N": N, "G": G, "K": K}
    shared["bias_unit"] = bias_unit(q.dtype, scale)
    partials = None
    if trains_bias:
        rows = 64
        programs = cdiv(N, rows) * H * G
        slots = 2 * gpu_of(q).num_sms  # 255 registers of 128 threads, twice
        chunk_bytes = 4 * G * H * N * padded_cols
        C = num_chunks(programs, cdiv(B, G), chunk_bytes, slots)
        partials = q.new_empty((C, G, H, N, padded_cols), dtype=torch.float32)
        pairs = bias.view(torch.int32)
        launch(
            _dq_dbias_kernel,
            (programs * C,),
            on=q,
            num_stages=2,
            q_desc=describe(q, rows),
            k_desc=describe(k, 64),
            v_desc=describe(v, 64),
            k_tail_desc=describe(k, tail) if tail else None,
            v_tail_desc=describe(v, tail) if tail else None,
            out_desc=describe(out, rows),
            dout_desc=describe(dout, rows),
            pairs_ptr=pairs,
            lse_ptr=lse,
            dlse_ptr=dlse,
            dq_ptr=dq,
            stats_ptr=stats,
            partials_ptr=partials,
            **strides_of("dq", dq, "n"),
            pairs_stride_g=pairs.stride(0),
            pairs_stride_h=pairs.stride(1),
            PAIRS_STRIDE_N=pairs.stride(2),
            B=B,
            C=C,
            PADDED_ROWS=padded_rows,
            ROWS=rows,
            COLS=64,
            TILES=tiles,
            TAIL=tail,
            **shared,
        )
    elif dq is not None or dk is not None or dv is not None:
        launch(
            _dq_kernel,
            (B * H,),
            on=q,
            num_stages=1,
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            dout_ptr=dout,
            bias_ptr=bias,
            lse_ptr=lse,
            dlse_ptr=dlse,
            dq_ptr=dq,
            stats_ptr=stats,
            **strides_of("q", q, "n"),
            **strides_of("k", k, "m"),
            **strides_of("v", v, "m"),
            **strides_of("out", out, "n"),
            **strides_of("dout", dout, "n"),
            **strides_of("dq", dq, "n"),
            bias_stride_g=bias.stride(0),
            bias_stride_h=bias.stride(1),
            BIAS_STRIDE_N=bias.stride(2),
            M=M,
            PADDED_ROWS=padded_rows,
            ROWS=64,
            COLS=64,
            TILES=tiles,
            TAIL=tail,
            **shared,
        )
    if dk is not None or dv is not None:
        queries = {"row_tiles": row_tiles, "row_tail": row_tail}
        launch_dk_dv(q, k, v, bias, dout, stats, dk=dk, dv=dv, **queries, shared=shared)
    return partials
