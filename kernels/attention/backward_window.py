"""Backward of attention in windows of at most 64 tokens, in one launch: Swin's and BEiT's at 112.

    delta = rowsum(dout out) - dlse     p = exp2(scale log2(e) (q k^T + u bias) - lse)
    ds = p (dout v^T - delta)           dbias = sum of ds over the images of a group
    dq = scale ds k                     dk = scale ds^T q         dv = p^T dout

All scores of an image and head are one tile, so five matrix products do what two kernels need
seven for. A program owns one head and walks over a chunk of the images (windows) of one group;
dbias stays in its registers until the chunk ends.

Shapes    q, out, dout, dq (B, N, H, K); k, v, dk, dv (B, M, H, K): views, last stride 1;
          bias (G, H, 64, 64) fp16, in units of u raw scores, -inf in keys beyond M;
          lse (B, H, N) fp32, base 2, +inf for a fully masked row; dlse (B, H, N), of the natural
          logarithm, may be absent; image b is of group b mod G
Types     bf16 or fp16; statistics, ds and dbias fp32; p and ds in q's dtype as matrix operands
Cost      bound by memory: each of the tensors is read or written once
Legend    C chunks of images: partial sums of dbias, (C, G, H, 64, 64)
"""

import math

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, tl, triton
from beit_fast.kernels.attention.bias import bias_unit, raw_bias
from beit_fast.kernels.attention.chunks import num_chunks
from beit_fast.kernels.attention.strides import strides_of

TILE = 64  # queries and keys of a program


@triton.jit
def _window_backward_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    out_ptr,  # (B, N, H, K)
    dout_ptr,  # (B, N, H, K)
    bias_ptr,  # (G, H, TILE, TILE) fp16
    lse_ptr,  # (B, H, N) fp32
    dlse_ptr,  # (B, H, N) fp32; None: nothing depends on lse
    dq_ptr,  # (B, N, H, K), or None
    dk_ptr,  # (B, M, H, K), or None
    dv_ptr,  # (B, M, H, K), or None
    partials_ptr,  # (C, G, H, TILE, TILE) fp32, or None: the bias is frozen
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
    B,  # images
    H,  # heads
    N,  # queries
    M,  # keys
    G,  # groups of images
    C,  # chunks of a group's images
    BIAS_STRIDE_N: tl.constexpr,  # 0 or TILE
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    h = tl.cast(tl.program_id(0) % H, tl.int64)
    cg = tl.program_id(0) // H
    c = tl.cast(cg // G, tl.int64)
    g = cg % G
    num_images = tl.cdiv(B - g, G)
    first = (c * num_images // C).to(tl.int32)
    last = ((c + 1) * num_images // C).to(tl.int32)

    offs = tl.arange(0, TILE)
    offs_k = tl.arange(0, K)[None, :]
    queries = (offs < N)[:, None]
    keys = (offs < M)[:, None]
    bias_tile = bias_ptr + tl.cast(g, tl.int64) * bias_stride_g + h * bias_stride_h
    bias_tile += offs[:, None] * BIAS_STRIDE_N + offs[None, :]
    dbias = tl.full((TILE, TILE), 0, tl.float32)
    # The bias is read again for each image: it stays in the L1 cache, and 32 registers stay free.
    for i in tl.range(first, last, num_stages=1, disable_licm=True):
        b = tl.cast(i, tl.int64) * G + g
        q_tile = q_ptr + (b * q_stride_b + h * q_stride_h) + (offs[:, None] * q_stride_n + offs_k)
        k_tile = k_ptr + (b * k_stride_b + h * k_stride_h) + (offs[:, None] * k_stride_m + offs_k)
        v_tile = v_ptr + (b * v_stride_b + h * v_stride_h) + (offs[:, None] * v_stride_m + offs_k)
        out_tile = out_ptr + (b * out_stride_b + h * out_stride_h)
        out_tile += offs[:, None] * out_stride_n + offs_k
        dout_tile = dout_ptr + (b * dout_stride_b + h * dout_stride_h)
        dout_tile += offs[:, None] * dout_stride_n + offs_k
        q = tl.load(q_tile, mask=queries, other=0.0)
        k = tl.load(k_tile, mask=keys, other=0.0)
        lse = tl.load(lse_ptr + (b * H + h) * N + offs, mask=offs < N, other=float("inf"))
        dout = tl.load(dout_tile, mask=queries, other=0.0)
        v = tl.load(v_tile, mask=keys, other=0.0)
        out = tl.load(out_tile, mask=queries, other=0.0)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + (b * H + h) * N + offs, mask=offs < N, other=0.0)
        dp = tl.dot(dout, tl.trans(v)) - delta[:, None]
        bias = tl.load(bias_tile)
        s = tl.dot(q, tl.trans(k), acc=raw_bias(bias, bias_unit))
        p = tl.math.exp2(s * factor - lse[:, None])
        ds = p * dp
        if partials_ptr is not None:
            dbias += ds
        ds = ds.to(q.dtype)
        if dv_ptr is not None:
            dv = tl.dot(tl.trans(p.to(dout.dtype)), dout)
            dv_tile = dv_ptr + (b * dv_stride_b + h * dv_stride_h)
            dv_tile += offs[:, None] * dv_stride_m + offs_k
            tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=keys)
        if dk_ptr is not None:
            dk = tl.dot(tl.trans(ds), q) * scale
            dk_tile = dk_ptr + (b * dk_stride_b + h * dk_stride_h)
            dk_tile += offs[:, None] * dk_stride_m + offs_k
            tl.store(dk_tile, dk.to(dk_ptr.dtype.element_ty), mask=keys)
        if dq_ptr is not None:
            dq = tl.dot(ds, k) * scale
            dq_tile = dq_ptr + (b * dq_stride_b + h * dq_stride_h)
            dq_tile += offs[:, None] * dq_stride_n + offs_k
            tl.store(dq_tile, dq.to(dq_ptr.dtype.element_ty), mask=queries)
    if partials_ptr is not None:
        at = partials_ptr + ((c * G + g) * H + h) * (TILE * TILE)
        tl.store(at + offs[:, None] * TILE + offs[None, :], dbias)


def window_fits(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor) -> bool:
    """Whether `window_backward` can take these."""
    B, N, H, K = q.shape
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == q.dtype for t in (k, v, out, dout))
        and all(t.stride(-1) == 1 for t in (q, k, v, out, dout))
        and B > 0
        and H > 0
        and K in (32, 64)
        and 0 < N <= TILE
        and 0 < k.shape[1] <= TILE
    )


def window_backward(
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
    """Write the gradients that are wanted; return partial sums of dbias (C, G, H, 64, 64), fp32.

    Shapes as on top of this file. None is returned where the bias is frozen. What
    `window_fits` refuses must not come here.
    """
    B, N, H, K = q.shape
    M, G = k.shape[1], len(bias)
    if dq is None and dk is None and dv is None and not trains_bias:
        return None
    # Three CTAs on a multiprocessor where 168 registers are enough, else two.
    ctas, maxnreg = (3, 168) if K == 32 else (2, None)
    slots = ctas * gpu_of(q).num_sms
    C = num_chunks(H * G, cdiv(B, G), 4 * G * H * TILE * TILE, slots)
    partials = q.new_empty((C, G, H, TILE, TILE), dtype=torch.float32) if trains_bias else None
    launch(
        _window_backward_kernel,
        (H * G * C,),
        on=q,
        num_stages=1,
        maxnreg=maxnreg,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        dout_ptr=dout,
        bias_ptr=bias,
        lse_ptr=lse,
        dlse_ptr=dlse,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        partials_ptr=partials,
        **strides_of("q", q, "n"),
        **strides_of("k", k, "m"),
        **strides_of("v", v, "m"),
        **strides_of("out", out, "n"),
        **strides_of("dout", dout, "n"),
        **strides_of("dq", dq, "n"),
        **strides_of("dk", dk, "m"),
        **strides_of("dv", dv, "m"),
        bias_stride_g=bias.stride(0),
        bias_stride_h=bias.stride(1),
        scale=scale,
        bias_unit=bias_unit(q.dtype, scale),
        factor=scale * math.log2(math.e),
        B=B,
        H=H,
        N=N,
        M=M,
        G=G,
        C=C,
        BIAS_STRIDE_N=bias.stride(2),
        K=K,
        TILE=TILE,
    )
    return partials
