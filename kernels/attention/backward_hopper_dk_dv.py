"""The second launch of the backward on Hopper: dk and dv, a program for each image and head.

A program holds all queries of its image and head, and walks over the keys. It reads the statistics
that the first launch wrote. Formulas, shapes and types: `backward_hopper`.
"""

from torch import Tensor

from beit_fast.kernels._triton import launch, tl, triton
from beit_fast.kernels.attention.bias import raw_bias
from beit_fast.kernels.attention.strides import strides_of


@triton.jit
def _add_queries(
    q,  # (ROWS, K)
    dout,  # (ROWS, K)
    k,  # (COLS, K)
    v,  # (COLS, K)
    bias,  # fp16 (ROWS, COLS)
    bias_unit,  # fp32: u; None: 1
    lse,  # fp32 (ROWS,)
    delta,  # fp32 (ROWS,)
    factor,  # fp32: scale log2(e)
    dk,  # fp32 (COLS, K), to add to
    dv,  # fp32 (COLS, K), to add to
    WANTS_DK: tl.constexpr,
    WANTS_DV: tl.constexpr,
):
    """dk and dv with the share of these queries."""
    s = tl.dot(k, tl.trans(q), acc=raw_bias(tl.trans(bias), bias_unit))
    p = tl.math.exp2(s * factor - lse[None, :])
    if WANTS_DV:
        dv = tl.dot(p.to(dout.dtype), dout, acc=dv)
    if WANTS_DK:
        dp = tl.dot(v, tl.trans(dout))
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, acc=dk)
    return dk, dv


@triton.jit
def _dk_dv_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    dout_ptr,  # (B, N, H, K)
    bias_ptr,  # (G, H, padded N, padded M) fp16
    stats_ptr,  # (B, H, 2, ROWS TILES + TAIL) fp32: lse (+inf beyond N) and delta
    dk_ptr,  # (B, M, H, K), or None
    dv_ptr,  # (B, M, H, K), or None
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_m,
    k_stride_h,
    v_stride_b,
    v_stride_m,
    v_stride_h,
    dout_stride_b,
    dout_stride_n,
    dout_stride_h,
    dk_stride_b,
    dk_stride_m,
    dk_stride_h,
    dv_stride_b,
    dv_stride_m,
    dv_stride_h,
    bias_stride_g,
    bias_stride_h,
    scale,  # fp32
    bias_unit,  # fp32: u; None: 1
    factor,  # fp32: scale log2(e)
    H,  # heads
    N,  # queries
    M,  # keys
    G,  # groups of images
    BIAS_STRIDE_N: tl.constexpr,  # 0 or padded M: with a stride known when compiling 167
    # registers instead of 207
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    TAIL: tl.constexpr,
):
    bh = tl.cast(tl.program_id(0), tl.int64)
    b, h = bh // H, bh % H
    rows = tl.arange(0, ROWS)
    offs_k = tl.arange(0, K)[None, :]
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    dout_ptr += b * dout_stride_b + h * dout_stride_h
    bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h
    if dk_ptr is not None:
        dk_ptr += b * dk_stride_b + h * dk_stride_h
    if dv_ptr is not None:
        dv_ptr += b * dv_stride_b + h * dv_stride_h
    padded_rows: tl.constexpr = TILES * ROWS + TAIL
    lse_ptr = stats_ptr + bh * (2 * padded_rows)
    delta_ptr = lse_ptr + padded_rows

    q = ()
    dout = ()
    for t in tl.static_range(TILES):
        n = t * ROWS + rows
        inside = (n < N)[:, None]
        q += (tl.load(q_ptr + n[:, None] * q_stride_n + offs_k, mask=inside, other=0.0),)
        dout_tile = dout_ptr + n[:, None] * dout_stride_n + offs_k
        dout += (tl.load(dout_tile, mask=inside, other=0.0),)
    if TAIL:
        tail_n = TILES * ROWS + tl.arange(0, TAIL)
        inside_tail = (tail_n < N)[:, None]
        q_tile = q_ptr + tail_n[:, None] * q_stride_n + offs_k
        q_tail = tl.load(q_tile, mask=inside_tail, other=0.0)
        dout_tail_tile = dout_ptr + tail_n[:, None] * dout_stride_n + offs_k
        dout_tail = tl.load(dout_tail_tile, mask=inside_tail, other=0.0)

    # Hoisting would keep what depends on the keys of no tile alive through all of them.
    for j in tl.range(0, tl.cdiv(M, COLS), num_stages=1, disable_licm=True):
        m = j * COLS + tl.arange(0, COLS)
        keys = (m < M)[:, None]
        k = tl.load(k_ptr + m[:, None] * k_stride_m + offs_k, mask=keys, other=0.0)
        v = tl.load(v_ptr + m[:, None] * v_stride_m + offs_k, mask=keys, other=0.0)
        dk = tl.full((COLS, K), 0, tl.float32)
        dv = tl.full((COLS, K), 0, tl.float32)
        for t in tl.static_range(TILES):
            n = t * ROWS + rows
            bias = tl.load(bias_ptr + n[:, None] * BIAS_STRIDE_N + m[None, :])
            lse = tl.load(lse_ptr + n)
            delta = tl.load(delta_ptr + n)
            dk, dv = _add_queries(
                q[t], dout[t], k, v, bias, bias_unit, lse, delta, factor, dk, dv,
                dk_ptr is not None, dv_ptr is not None,
            )  # fmt: skip
        if TAIL:
            bias_tail = tl.load(bias_ptr + tail_n[:, None] * BIAS_STRIDE_N + m[None, :])
            lse_tail = tl.load(lse_ptr + tail_n)
            delta_tail = tl.load(delta_ptr + tail_n)
            dk, dv = _add_queries(
                q_tail, dout_tail, k, v, bias_tail, bias_unit, lse_tail, delta_tail, factor,
                dk, dv,
                dk_ptr is not None, dv_ptr is not None,
            )  # fmt: skip
        if dk_ptr is not None:
            dk_tile = dk_ptr + m[:, None] * dk_stride_m + offs_k
            tl.store(dk_tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=keys)
        if dv_ptr is not None:
            dv_tile = dv_ptr + m[:, None] * dv_stride_m + offs_k
            tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=keys)


def launch_dk_dv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    dout: Tensor,
    stats: Tensor,
    *,
    dk: Tensor | None,
    dv: Tensor | None,
    row_tiles: int,
    row_tail: int,
    shared: dict,
) -> None:
    """Write dk and dv where they are tensors; `shared` is what both launches are given."""
    B, _, H, _ = q.shape
    launch(
        _dk_dv_kernel,
        (B * H,),
        on=q,
        num_stages=1,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        dout_ptr=dout,
        bias_ptr=bias,
        stats_ptr=stats,
        dk_ptr=dk,
        dv_ptr=dv,
        **strides_of("q", q, "n"),
        **strides_of("k", k, "m"),
        **strides_of("v", v, "m"),
        **strides_of("dout", dout, "n"),
        **strides_of("dk", dk, "m"),
        **strides_of("dv", dv, "m"),
        bias_stride_g=bias.stride(0),
        bias_stride_h=bias.stride(1),
        BIAS_STRIDE_N=bias.stride(2),
        M=k.shape[1],
        ROWS=64,
        COLS=64,
        TILES=row_tiles,
        TAIL=row_tail,
        **shared,
    )
