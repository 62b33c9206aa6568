"""Backward kernels of attention for any length, head width, dtype and architecture; with dropout.

    p[n,m]   = 2^(c s[n,m] - lse[n])                   s, c, lse as in `forward.py`
    delta[n] = rowsum(dout[n] out[n]) - dlse[n]        dlse, of the natural logarithm, may be absent
    ds[n,m]  = p[n,m] (Z[n,m] dout[n] . v[m] - delta[n])
    dq = scale ds k;  dk = scale ds^T q;  dv = (Z p)^T dout;  dbias = sum over images of ds

in three kernels, nine products of tiles where the least is five, and nothing added by two programs:

dq      a program has a tile of queries and walks over the keys; writes delta for the others
dk, dv  a program has a tile of keys and walks over the queries, on transposed scores
dbias   a program has a tile of the bias and walks over a chunk of the images of its group

Shapes    q, out, dout, dq (B, N, H, K); k, v, dk, dv (B, M, H, K); lse (B, H, N); bias
          (G, H, Rn, Rm), padded as in `bias.py`; image b has bias b mod G
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

from beit_fast.kernels._triton import cdiv, launch, tl, triton
from beit_fast.kernels.attention.backward_dbias import dbias_partials
from beit_fast.kernels.attention.backward_tiles import (
    add_products,
    dropout_factor,
    load_bias,
    load_rows,
    products,
    scaled,
    store_rows,
)
from beit_fast.kernels.attention.bias import bias_unit, raw_bias
from beit_fast.kernels.attention.configs import GeneralBackward, Tile, head_parts
from beit_fast.kernels.attention.forward_tiles import zeros
from beit_fast.kernels.attention.strides import strides_in_units
from beit_fast.kernels.philox import threshold_of


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
    UNIT: tl.constexpr,  # see strides_in_units
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

    out = load_rows(out_ptr, out_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
    dout = load_rows(dout_ptr, dout_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
    delta = tl.full((BLOCK_N,), 0.0, tl.float32)
    for j in tl.static_range(len(PARTS)):
        delta += tl.sum(out[j].to(tl.float32) * dout[j].to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * N + row, mask=row < N, other=0.0)
    lse = tl.load(lse_ptr + bh * N + row, mask=row < N, other=float("inf"))
    tl.store(stats_ptr + bh * 2 * S + row, lse)
    tl.store(stats_ptr + bh * 2 * S + S + row, delta)
    if dq_ptr is not None:
        q = load_rows(q_ptr, q_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
        dq = zeros(BLOCK_N, PARTS)
        for m in tl.range(0, M, BLOCK_M, disable_licm=True):
            k = load_rows(k_ptr, k_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
            v = load_rows(v_ptr, v_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
            bias = load_bias(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
            s = products(q, k, raw_bias(bias, bias_unit), PRECISION)
            p = tl.exp2(s * exponent_factor - lse[:, None])
            dp = products(dout, v, tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32), PRECISION)
            if rng_ptr is not None:
                dp *= dropout_factor(
                    rng_ptr, bh.to(tl.int32), n, m, M, drop_below, gain, BLOCK_N, BLOCK_M
                )
            ds = p * (dp - delta[:, None])
            dq = add_products(ds, k, dq, PRECISION)
        dq_ptr += (b * dq_stride_b + h * dq_stride_h) * UNIT
        store_rows(scaled(dq, scale), dq_ptr, dq_stride_n * UNIT, n, N, K, PARTS, OFFSET)


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
    UNIT: tl.constexpr,  # see strides_in_units
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

    k = load_rows(k_ptr, k_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
    v = load_rows(v_ptr, v_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
    dk = zeros(BLOCK_M, PARTS)
    dv = zeros(BLOCK_M, PARTS)
    for n in tl.range(0, N, BLOCK_N, disable_licm=True):
        row = n + tl.arange(0, BLOCK_N)
        q = load_rows(q_ptr, q_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
        dout = load_rows(dout_ptr, dout_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
        bias = load_bias(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
        s = products(k, q, raw_bias(tl.trans(bias), bias_unit), PRECISION)
        p = tl.exp2(s * exponent_factor - tl.load(lse_ptr + row)[None, :])
        zp = p
        if rng_ptr is not None:
            z = tl.trans(
                dropout_factor(
                    rng_ptr, bh.to(tl.int32), n, m, M, drop_below, gain, BLOCK_N, BLOCK_M
                )
            )
            zp = p * z
        if dv_ptr is not None:
            dv = add_products(zp, dout, dv, PRECISION)
        if dk_ptr is not None:
            dp = products(v, dout, tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32), PRECISION)
            if rng_ptr is not None:
                dp *= z
            ds = p * (dp - tl.load(delta_ptr + row)[None, :])
            dk = add_products(ds, q, dk, PRECISION)
    if dk_ptr is not None:
        dk_ptr += (b * dk_stride_b + h * dk_stride_h) * UNIT
        store_rows(scaled(dk, scale), dk_ptr, dk_stride_n * UNIT, m, M, K, PARTS, OFFSET)
    if dv_ptr is not None:
        dv_ptr += (b * dv_stride_b + h * dv_stride_h) * UNIT
        store_rows(dv, dv_ptr, dv_stride_n * UNIT, m, M, K, PARTS, OFFSET)


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
    strides, unit, offset = strides_in_units(q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv)

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
    return dbias_partials(
        q,
        k,
        v,
        bias,
        dout,
        tile=config.dbias,
        has_dropout=dropout_p > 0,
        shared=shared(config.dbias, "q", "k", "v", "dout"),
    )
