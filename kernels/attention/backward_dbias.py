"""The third of the general backward kernels: the gradient of the bias.

A program has a tile of the bias of one head and group, and walks over a chunk of the group's
images; dbias is the sum of the chunks' partial sums. Formulas, shapes, types: `backward_general`.
"""

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, tl, triton
from beit_fast.kernels.attention.backward_tiles import (
    dropout_factor,
    load_bias,
    load_rows,
    products,
)
from beit_fast.kernels.attention.bias import raw_bias
from beit_fast.kernels.attention.chunks import num_chunks
from beit_fast.kernels.attention.configs import Tile, dbias_ctas, head_parts
from beit_fast.kernels.attention.descriptors import can_describe, describe


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
    UNIT: tl.constexpr,  # see strides_in_units
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
            q = load_rows(q_at, q_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
            k = load_rows(k_at, k_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
            dout = load_rows(dout_at, dout_stride_n * UNIT, n, N, BLOCK_N, K, PARTS, OFFSET)
            v = load_rows(v_at, v_stride_n * UNIT, m, M, BLOCK_M, K, PARTS, OFFSET)
        # `i < end` is always true: it keeps the bias, the same for all images, out of the loads
        # that are pipelined through shared memory, and out of registers held through the loop.
        bias = tl.full((BLOCK_N, BLOCK_M), 0.0, bias_ptr.dtype.element_ty)
        if i < end:
            bias = load_bias(bias_ptr, bias_stride_n, n, m, N, BLOCK_N, BLOCK_M)
        lse_ptr = stats_ptr + (b * H + h) * 2 * S
        lse = tl.load(lse_ptr + row, mask=row < S, other=float("inf"))
        delta = tl.load(lse_ptr + S + row, mask=row < S, other=0.0)
        s = products(q, k, raw_bias(bias, bias_unit), PRECISION)
        p = tl.exp2(s * exponent_factor - lse[:, None])
        dp = products(dout, v, tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32), PRECISION)
        if rng_ptr is not None:
            stream = (b * H + h).to(tl.int32)
            dp *= dropout_factor(rng_ptr, stream, n, m, M, drop_below, gain, BLOCK_N, BLOCK_M)
        acc += p * (dp - delta[:, None])
    partials_ptr += cgh * N * Rm
    at = partials_ptr + tl.cast(row[:, None], tl.int64) * Rm + m
    tl.store(at + tl.arange(0, BLOCK_M)[None, :], acc, mask=row[:, None] < N)


def dbias_partials(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    dout: Tensor,
    *,
    tile: Tile,
    has_dropout: bool,
    shared: dict,
) -> Tensor:
    """Partial sums (C, G, H, N, Rm) of dbias; `shared` is what all three kernels are given."""
    B, N, H, K = q.shape
    M, G, padded_cols = k.shape[1], len(bias), bias.shape[3]
    programs = cdiv(N, tile.block_n) * cdiv(M, tile.block_m) * H * G
    chunk_bytes = 4 * G * H * N * padded_cols
    gpu = gpu_of(q)
    slots = dbias_ctas(gpu, q.dtype, K, tile, has_dropout) * gpu.num_sms
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
        **shared,
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
