"""Backward kernels of attention for any length, head width, dtype and architecture; with dropout.

    p[n,m]  = 2^(c s[n,m] - lse[n])                    s, c, lse as in `attention_forward`
    delta[n] = rowsum(dout[n] out[n])
    ds[n,m] = p[n,m] (Z[n,m] dout[n] . v[m] - delta[n])
    dq = scale ds k;  dk = scale ds^T q;  dv = (Z p)^T dout;  dbias = sum over images of ds

in three kernels, nine products of tiles where the least is five, and nothing added by two programs:
dq      one program has a tile of queries and walks over keys; writes delta for the others
dk, dv  one program has a tile of keys and walks over queries, on transposed scores
dbias   one program has a tile of the bias and walks over a chunk of the images of its group

Shapes    q, out, dout, dq (B, N, H, K); k, v, dk, dv (B, M, H, K); lse, delta (B, H, N); bias
          (G, H, Rn, Rm) padded as in `attention_bias`; partials (chunks, G, H, Rn, Rm)
Types     p and ds are rounded to q's dtype as operands; dbias adds ds in fp32, unrounded
Padding   keys m >= M have a bias of -inf, queries n >= N a log-sum-exp of inf: p is 0 there
"""

import math

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, tl, triton
from beit_fast.kernels.attention_configs import GeneralBackward
from beit_fast.kernels.philox import random_tile, threshold_of


@triton.jit
def _rows(
    ptr,  # first row of the matrix (num_rows, K)
    stride,  # elements from row to row
    begin,  # first row of the tile
    num_rows,  # rows that exist
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """A tile (ROWS, BLOCK_K) from row `begin` on; zero where there is nothing."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    inside = row < num_rows - begin
    if K < BLOCK_K:
        inside = inside & (col < K)
    at = ptr + tl.cast(begin, tl.int64) * stride
    return tl.load(at + row.to(OFFSET) * stride + col, mask=inside, other=0.0)


@triton.jit
def _store(
    tile,  # (ROWS, BLOCK_K) fp32
    ptr,  # first row of the matrix (num_rows, K)
    stride,  # elements from row to row
    begin,  # first row of the tile
    num_rows,  # rows that exist
    K: tl.constexpr,
    OFFSET: tl.constexpr,
):
    row = tl.arange(0, tile.shape[0])[:, None]
    col = tl.arange(0, tile.shape[1])[None, :]
    inside = row < num_rows - begin
    if tile.shape[1] > K:
        inside = inside & (col < K)
    at = ptr + tl.cast(begin, tl.int64) * stride
    tl.store(at + row.to(OFFSET) * stride + col, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_tile(
    ptr,  # (Rn, Rm): bias of a head
    stride,  # elements from row to row; 0 where all rows are one
    n,  # first query
    m,  # first key
    num_queries,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(ROWS, COLS) fp32; rows of no query cost no traffic, and their p is 0 whatever they hold."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    at = ptr + tl.cast(n, tl.int64) * stride + m
    return tl.load(at + row * stride + col, mask=row < num_queries - n, other=0.0).to(tl.float32)


@triton.jit
def _drop(
    tile,  # (ROWS, COLS) fp32
    rng_ptr,  # (2,) int64: seed and offset
    stream,  # int32: image and head
    n,  # first query of the tile
    m,  # first key of the tile, a multiple of 4
    M,  # keys
    drop_below,  # int32: a weight with a smaller random word is dropped
    gain,  # fp32: what kept weights are multiplied by, 1 / (1 - p)
):
    """Z tile."""
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    row = n + tl.arange(0, ROWS)[:, None]
    quad = row * tl.cdiv(M, 4) + m // 4 + tl.arange(0, COLS // 4)[None, :]
    words = random_tile(rng_ptr, quad, stream, ROWS, COLS)
    return tl.where(words >= drop_below, tile * gain, 0.0)


@triton.jit
def _dq_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, Rn, Rm), raw scores, -inf for keys m >= M
    out_ptr,  # (B, N, H, K)
    dout_ptr,  # (B, N, H, K)
    lse_ptr,  # (B, H, N) fp32
    rng_ptr,  # (2,) int64: seed and offset; None without dropout
    delta_ptr,  # (B, H, N) fp32, written
    dq_ptr,  # (B, N, H, K), written; None: only delta is
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
    scale,  # fp32
    exponent_factor,  # fp32: c
    drop_below,  # int32: see _drop
    gain,  # fp32: see _drop
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,  # see _strides
    OFFSET: tl.constexpr,  # type of offsets inside a tile
    PRECISION: tl.constexpr,
):
    """A tile of queries of one head of one image; tiles are neighbours, then heads."""
    tiles = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % tiles) * BLOCK_N
    b = tl.cast(tl.program_id(0) // tiles // H, tl.int64)
    h = tl.cast(tl.program_id(0) // tiles % H, tl.int64)
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    out_ptr += (b * out_stride_b + h * out_stride_h) * UNIT
    dout_ptr += (b * dout_stride_b + h * dout_stride_h) * UNIT
    bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h
    first = (b * H + h) * N
    row = n + tl.arange(0, BLOCK_N)

    out = _rows(out_ptr, out_stride_n * UNIT, n, N, BLOCK_N, K, BLOCK_K, OFFSET)
    dout = _rows(dout_ptr, dout_stride_n * UNIT, n, N, BLOCK_N, K, BLOCK_K, OFFSET)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + first + row, delta, mask=row < N)
    if dq_ptr is not None:
        q = _rows(q_ptr, q_stride_n * UNIT, n, N, BLOCK_N, K, BLOCK_K, OFFSET)
        lse = tl.load(lse_ptr + first + row, mask=row < N, other=float("inf"))
        dq = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for m in tl.range(0, M, BLOCK_M, disable_licm=True):
            k = _rows(k_ptr, k_stride_n * UNIT, m, M, BLOCK_M, K, BLOCK_K, OFFSET)
            v = _rows(v_ptr, v_stride_n * UNIT, m, M, BLOCK_M, K, BLOCK_K, OFFSET)
            bias = _bias_tile(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
            s = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
            p = tl.exp2(s * exponent_factor - lse[:, None])
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if rng_ptr is not None:
                stream = (b * H + h).to(tl.int32)
                dp = _drop(dp, rng_ptr, stream, n, m, M, drop_below, gain)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        dq_ptr += (b * dq_stride_b + h * dq_stride_h) * UNIT
        _store(dq * scale, dq_ptr, dq_stride_n * UNIT, n, N, K, OFFSET)


@triton.jit
def _dk_dv_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, Rn, Rm), raw scores, -inf for keys m >= M
    dout_ptr,  # (B, N, H, K)
    lse_ptr,  # (B, H, N) fp32
    delta_ptr,  # (B, H, N) fp32
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
    scale,  # fp32
    exponent_factor,  # fp32: c
    drop_below,  # int32: see _drop
    gain,  # fp32: see _drop
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,  # see _strides
    OFFSET: tl.constexpr,  # type of offsets inside a tile
    PRECISION: tl.constexpr,
):
    """A tile of keys of one head of one image; tiles are neighbours, then heads."""
    tiles = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles) * BLOCK_M
    b = tl.cast(tl.program_id(0) // tiles // H, tl.int64)
    h = tl.cast(tl.program_id(0) // tiles % H, tl.int64)
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    dout_ptr += (b * dout_stride_b + h * dout_stride_h) * UNIT
    bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h
    first = (b * H + h) * N

    k = _rows(k_ptr, k_stride_n * UNIT, m, M, BLOCK_M, K, BLOCK_K, OFFSET)
    v = _rows(v_ptr, v_stride_n * UNIT, m, M, BLOCK_M, K, BLOCK_K, OFFSET)
    dk = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    # Left alone, the compiler keeps the transposed operands of all turns in registers.
    for n in tl.range(0, N, BLOCK_N, disable_licm=True):
        row = n + tl.arange(0, BLOCK_N)
        q = _rows(q_ptr, q_stride_n * UNIT, n, N, BLOCK_N, K, BLOCK_K, OFFSET)
        dout = _rows(dout_ptr, dout_stride_n * UNIT, n, N, BLOCK_N, K, BLOCK_K, OFFSET)
        lse = tl.load(lse_ptr + first + row, mask=row < N, other=float("inf"))
        bias = _bias_tile(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
        s = tl.dot(k, tl.trans(q), tl.trans(bias), input_precision=PRECISION)
        p = tl.exp2(s * exponent_factor - lse[None, :])
        if dv_ptr is not None:
            zp = p
            if rng_ptr is not None:
                stream = (b * H + h).to(tl.int32)
                zp = tl.trans(_drop(tl.trans(p), rng_ptr, stream, n, m, M, drop_below, gain))
            dv = tl.dot(zp.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if dk_ptr is not None:
            delta = tl.load(delta_ptr + first + row, mask=row < N, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            if rng_ptr is not None:
                stream = (b * H + h).to(tl.int32)
                dp = tl.trans(_drop(tl.trans(dp), rng_ptr, stream, n, m, M, drop_below, gain))
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if dk_ptr is not None:
        dk_ptr += (b * dk_stride_b + h * dk_stride_h) * UNIT
        _store(dk * scale, dk_ptr, dk_stride_n * UNIT, m, M, K, OFFSET)
    if dv_ptr is not None:
        dv_ptr += (b * dv_stride_b + h * dv_stride_h) * UNIT
        _store(dv, dv_ptr, dv_stride_n * UNIT, m, M, K, OFFSET)


@triton.jit
def _dbias_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, Rn, Rm), raw scores, -inf for keys m >= M
    dout_ptr,  # (B, N, H, K)
    lse_ptr,  # (B, H, N) fp32
    delta_ptr,  # (B, H, N) fp32
    rng_ptr,  # (2,) int64: seed and offset; None without dropout
    partials_ptr,  # (chunks, G, H, Rn, Rm) fp32, contiguous, written
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
    images,  # of each group
    chunks,
    padded_rows,  # Rn
    padded_cols,  # Rm
    exponent_factor,  # fp32: c
    drop_below,  # int32: see _drop
    gain,  # fp32: see _drop
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    h = tl.cast(tl.program_id(0) // tiles % H, tl.int64)
    g = tl.cast(tl.program_id(0) // tiles // H % G, tl.int64)
    chunk = tl.cast(tl.program_id(0) // tiles // H // G, tl.int64)
    row = n + tl.arange(0, BLOCK_N)
    bias_ptr += g * bias_stride_g + h * bias_stride_h
    begin = (chunk * images // chunks).to(tl.int32)
    end = ((chunk + 1) * images // chunks).to(tl.int32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for image in tl.range(begin, end):
        b = tl.cast(image, tl.int64) * G + g
        q_at = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT
        k_at = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT
        v_at = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT
        dout_at = dout_ptr + (b * dout_stride_b + h * dout_stride_h) * UNIT
        first = (b * H + h) * N
        q = _rows(q_at, q_stride_n * UNIT, n, N, BLOCK_N, K, BLOCK_K, OFFSET)
        k = _rows(k_at, k_stride_n * UNIT, m, M, BLOCK_M, K, BLOCK_K, OFFSET)
        bias = _bias_tile(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
        s = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
        lse = tl.load(lse_ptr + first + row, mask=row < N, other=float("inf"))
        p = tl.exp2(s * exponent_factor - lse[:, None])
        dout = _rows(dout_at, dout_stride_n * UNIT, n, N, BLOCK_N, K, BLOCK_K, OFFSET)
        v = _rows(v_at, v_stride_n * UNIT, m, M, BLOCK_M, K, BLOCK_K, OFFSET)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if rng_ptr is not None:
            stream = (b * H + h).to(tl.int32)
            dp = _drop(dp, rng_ptr, stream, n, m, M, drop_below, gain)
        delta = tl.load(delta_ptr + first + row, mask=row < N, other=0.0)
        acc += p * (dp - delta[:, None])
    partials_ptr += ((chunk * G + g) * H + h) * padded_rows * padded_cols
    col = m + tl.arange(0, BLOCK_M)[None, :]
    inside = (row[:, None] < padded_rows) & (col < padded_cols)
    tl.store(partials_ptr + row[:, None] * padded_cols + col, acc, mask=inside)


def general_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
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
    """Write dq, dk, dv where they are tensors; return partials (chunks, G, H, Rn, Rm) of dbias."""
    B, N, H, K = q.shape
    M, G = k.shape[1], bias.shape[0]
    given = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    written = {"dq": dq, "dk": dk, "dv": dv}
    strides, unit, offset = _strides({**given, **written})
    common = {
        "on": q,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "rng_ptr": rng if dropout_p > 0 else None,
        **_strides_of(("q", "k", "v", "dout"), strides),
        "bias_stride_g": bias.stride(0),
        "bias_stride_h": bias.stride(1),
        "bias_stride_n": bias.stride(2),
        "G": G,
        "H": H,
        "N": N,
        "M": M,
        "exponent_factor": scale * math.log2(math.e),
        "drop_below": threshold_of(dropout_p),
        "gain": 1 / (1 - dropout_p),
        "K": K,
        "BLOCK_K": max(16, triton.next_power_of_2(K)),
        "UNIT": unit,
        "OFFSET": offset,
        "PRECISION": "tf32" if tf32 else "ieee",
    }
    delta = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    if dq is not None or dk is not None or trains_bias:
        launch(
            _dq_kernel,
            (cdiv(N, config.dq.block_n) * B * H,),
            out_ptr=out,
            delta_ptr=delta,
            dq_ptr=dq,
            scale=scale,
            **_strides_of(("out", "dq"), strides),
            **config.dq.options,
            **common,
        )
    if dk is not None or dv is not None:
        launch(
            _dk_dv_kernel,
            (cdiv(M, config.dk_dv.block_m) * B * H,),
            delta_ptr=delta,
            dk_ptr=dk,
            dv_ptr=dv,
            scale=scale,
            **_strides_of(("dk", "dv"), strides),
            **config.dk_dv.options,
            **common,
        )
    if not trains_bias:
        return None
    images = B // G
    tiles = cdiv(N, config.dbias.block_n) * cdiv(M, config.dbias.block_m) * H * G
    # Enough chunks to fill the GPU twice; more cost memory, and a sum over more partials.
    chunks = min(images, max(1, cdiv(2 * gpu_of(q).num_sms, tiles)))
    partials = torch.empty((chunks, G, *bias.shape[1:]), dtype=torch.float32, device=q.device)
    launch(
        _dbias_kernel,
        (chunks * tiles,),
        delta_ptr=delta,
        partials_ptr=partials,
        images=images,
        chunks=chunks,
        padded_rows=bias.shape[2],
        padded_cols=bias.shape[3],
        **config.dbias.options,
        **common,
    )
    return partials


def _strides(tensors: dict[str, Tensor | None]) -> tuple[dict[str, int], int, tl.dtype]:
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


def _strides_of(names: tuple[str, ...], strides: dict[str, int]) -> dict[str, int]:
    return {name: stride for name, stride in strides.items() if name.split("_")[0] in names}
