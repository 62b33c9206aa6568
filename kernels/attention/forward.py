"""Forward kernels of attention with an additive bias, and what launches them.

    s[n,m] = q[n] . k[m] + u bias[n,m]         the bias is the first value of the accumulator
    lse[n] = log2 sum_m 2^(c s[n,m])           c = scale log2(e)
    out[n] = sum_m Z[n,m] 2^(c s[n,m] - lse[n]) v[m]

for each image and head, by one of two kernels:

whole     a program holds all keys and values of its image and head, and loops over the queries
flash     a program holds a tile of queries, and loops over the keys

Shapes    q, out (B, N, H, K); k, v (B, M, H, K); lse (B, H, N); bias (G, H, >= N, >= M), padded
          as in `bias.py`, in units of u raw scores, -inf for keys m >= M; image b has bias
          b mod G
Types     scores, softmax and sums in fp32; the weights are rounded to v's type before they meet it
Masks     those -inf are the only ones. A query that sees no key has out = 0 and lse = inf
Dropout   Z as in `attention`; lse is that of the weights before dropout
"""

import math

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, tl, triton
from beit_fast.kernels.attention.bias import bias_unit
from beit_fast.kernels.attention.configs import (
    FlashForward,
    WholeForward,
    forward_config,
    head_parts,
    tail_width,
)
from beit_fast.kernels.attention.forward_tiles import (
    attend,
    keep,
    load_bias,
    load_keys,
    load_rows,
    score,
    store_rows,
    zeros,
)
from beit_fast.kernels.attention.strides import strides_in_units
from beit_fast.kernels.philox import threshold_of


@triton.jit
def _attention_whole_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, >= N, >= M), -inf for keys m >= M
    out_ptr,  # (B, N, H, K)
    lse_ptr,  # (B, H, N) fp32
    q_stride_b,  # this and the next eleven in units of UNIT elements
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
    bias_stride_g,  # elements, as the next two; each may be 0
    bias_stride_h,
    bias_stride_n,
    G,  # groups of images
    H,  # heads
    N,  # queries
    M,  # keys, at most the sum of all widths
    bias_unit,  # fp32: u; None: 1
    exponent_factor,  # fp32: c, the scale of the logits times log2(e)
    K: tl.constexpr,  # width of a head
    PARTS: tl.constexpr,  # (begin, width) of the tiles that K is cut into
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,  # widths of the key tiles of the first group
    SECOND: tl.constexpr,  # and of the second, if there is one
    FIRST_KEYS: tl.constexpr,  # sum of FIRST
    ONE_TILE: tl.constexpr,  # N <= BLOCK_N
    UNIT: tl.constexpr,  # known to the compiler, so that it sees how rows are aligned
    OFFSET: tl.constexpr,  # type of offsets inside a tile
):
    """All queries of one head of one image; heads are neighbours, since rows hold all heads."""
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.cast(tl.program_id(0) % H, tl.int64)
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    out_ptr += (b * out_stride_b + h * out_stride_h) * UNIT
    bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h
    lse_ptr += (b * H + h) * N
    q_stride, k_stride = q_stride_n * UNIT, k_stride_n * UNIT
    v_stride, out_stride = v_stride_n * UNIT, out_stride_n * UNIT

    # All loads that can be are under way before the first is waited for.
    q = load_rows(q_ptr, q_stride, N, BLOCK_N, K, PARTS, OFFSET)
    keys0 = load_keys(k_ptr, k_stride, M, 0, FIRST, K, PARTS, OFFSET)
    keys1 = load_keys(k_ptr, k_stride, M, FIRST_KEYS, SECOND, K, PARTS, OFFSET)
    values0 = load_keys(v_ptr, v_stride, M, 0, FIRST, K, PARTS, OFFSET)
    values1 = load_keys(v_ptr, v_stride, M, FIRST_KEYS, SECOND, K, PARTS, OFFSET)
    biases0 = load_bias(bias_ptr, bias_stride_n, N, BLOCK_N, FIRST, OFFSET)

    # With what does not change moved out of the loop, 40 registers would hold addresses.
    for start in tl.range(0, N, BLOCK_N, disable_licm=True):
        start = tl.cast(start, tl.int64)
        left = (N - start).to(tl.int32)
        bias1_ptr = bias_ptr + start * bias_stride_n + FIRST_KEYS
        biases1 = load_bias(bias1_ptr, bias_stride_n, left, BLOCK_N, SECOND, OFFSET)
        highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        acc = zeros(BLOCK_N, PARTS)
        scores = score(q, keys0, biases0, bias_unit, "ieee")
        values = values0
        if len(SECOND) > 0:
            highest, total, acc = attend(
                scores, values, (), highest, total, acc, exponent_factor, True, "ieee"
            )
            scores = score(q, keys1, biases1, bias_unit, "ieee")
            values = values1
        if not ONE_TILE:  # what the next turn begins with arrives during the rest of this one
            after, rest = start + BLOCK_N, left - BLOCK_N
            next_q_ptr, next_bias_ptr = q_ptr + after * q_stride, bias_ptr + after * bias_stride_n
            q = load_rows(next_q_ptr, q_stride, rest, BLOCK_N, K, PARTS, OFFSET)
            biases0 = load_bias(next_bias_ptr, bias_stride_n, rest, BLOCK_N, FIRST, OFFSET)
        IS_FIRST: tl.constexpr = len(SECOND) == 0
        highest, total, acc = attend(
            scores, values, (), highest, total, acc, exponent_factor, IS_FIRST, "ieee"
        )
        out_rows, lse_rows = out_ptr + start * out_stride, lse_ptr + start
        store_rows(highest, total, acc, 1.0, out_rows, out_stride, lse_rows, left, K, PARTS, OFFSET)


@triton.jit
def _attention_flash_kernel(
    q_ptr,  # (B, N, H, K)
    k_ptr,  # (B, M, H, K)
    v_ptr,  # (B, M, H, K)
    bias_ptr,  # (G, H, >= N, >= M), -inf for keys m >= M
    rng_ptr,  # (2,) int64: seed and offset; None without dropout
    out_ptr,  # (B, N, H, K)
    lse_ptr,  # (B, H, N) fp32
    q_stride_b,  # this and the next eleven in units of UNIT elements
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
    bias_stride_g,  # elements, as the next two; each may be 0
    bias_stride_h,
    bias_stride_n,
    G,  # groups of images
    H,  # heads
    N,  # queries
    M,  # keys
    bias_unit,  # fp32: u; None: 1
    exponent_factor,  # fp32: c, the scale of the logits times log2(e)
    drop_below,  # int32: a weight with a smaller random word is dropped
    gain,  # fp32: what kept weights are multiplied by, 1 / (1 - p)
    K: tl.constexpr,  # width of a head
    PARTS: tl.constexpr,  # (begin, width) of the tiles that K is cut into
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,  # width of the last tile of keys, 0 where BLOCK_M divides M
    UNIT: tl.constexpr,  # known to the compiler, so that it sees how rows are aligned
    OFFSET: tl.constexpr,  # type of offsets inside a tile
    PRECISION: tl.constexpr,  # of fp32 products: ieee or tf32
):
    """A tile of queries of one head of one image; tiles are neighbours, then heads."""
    tiles = tl.cdiv(N, BLOCK_N)
    start = tl.cast(tl.program_id(0) % tiles, tl.int64) * BLOCK_N
    b = tl.cast(tl.program_id(0) // tiles // H, tl.int64)
    h = tl.cast(tl.program_id(0) // tiles % H, tl.int64)
    q_stride, k_stride = q_stride_n * UNIT, k_stride_n * UNIT
    v_stride, out_stride = v_stride_n * UNIT, out_stride_n * UNIT
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT + start * q_stride
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    out_ptr += (b * out_stride_b + h * out_stride_h) * UNIT + start * out_stride
    bias_ptr += (b % G) * bias_stride_g + h * bias_stride_h + start * bias_stride_n
    lse_ptr += (b * H + h) * N + start
    left = (N - start).to(tl.int32)
    stream = (b * H + h).to(tl.int32)

    q = load_rows(q_ptr, q_stride, left, BLOCK_N, K, PARTS, OFFSET)
    highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = zeros(BLOCK_N, PARTS)
    full = M // BLOCK_M * BLOCK_M
    for begin in tl.range(0, full, BLOCK_M, disable_licm=True):
        begin = tl.cast(begin, tl.int64)
        k = load_rows(k_ptr + begin * k_stride, k_stride, None, BLOCK_M, K, PARTS, OFFSET)
        biases = load_bias(bias_ptr + begin, bias_stride_n, left, BLOCK_N, (BLOCK_M,), OFFSET)
        scores = score(q, (k,), biases, bias_unit, PRECISION)
        v = load_rows(v_ptr + begin * v_stride, v_stride, None, BLOCK_M, K, PARTS, OFFSET)
        keeps = ()
        if rng_ptr is not None:
            keeps = (keep(rng_ptr, stream, start, begin, M, drop_below, BLOCK_N, BLOCK_M),)
        highest, total, acc = attend(
            scores, (v,), keeps, highest, total, acc, exponent_factor, False, PRECISION
        )
    if TAIL > 0:
        begin = tl.cast(full, tl.int64)
        k = load_rows(k_ptr + begin * k_stride, k_stride, M - full, TAIL, K, PARTS, OFFSET)
        v = load_rows(v_ptr + begin * v_stride, v_stride, M - full, TAIL, K, PARTS, OFFSET)
        biases = load_bias(bias_ptr + begin, bias_stride_n, left, BLOCK_N, (TAIL,), OFFSET)
        scores = score(q, (k,), biases, bias_unit, PRECISION)
        keeps = ()
        if rng_ptr is not None:
            keeps = (keep(rng_ptr, stream, start, begin, M, drop_below, BLOCK_N, TAIL),)
        highest, total, acc = attend(
            scores, (v,), keeps, highest, total, acc, exponent_factor, False, PRECISION
        )
    store_rows(highest, total, acc, gain, out_ptr, out_stride, lse_ptr, left, K, PARTS, OFFSET)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    tf32: bool,
    out: Tensor,
    lse: Tensor,
    config: WholeForward | FlashForward | None = None,
) -> None:
    """Write out (B, N, H, K) and lse (B, H, N) of padded bias and q, k, v, rows contiguous.

    `config` is for tests and tuning: which kernel and tiles, instead of those in the table.
    """
    B, N, H, K = q.shape
    M = k.shape[1]
    assert q.dtype == k.dtype == v.dtype == out.dtype
    assert all(t.stride(-1) == 1 for t in (q, k, v, out, bias))
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    if config is None:
        config = forward_config(gpu_of(q), q.dtype, N, M, K, dropout_p > 0, tf32)
    strides, unit, offset = strides_in_units(q=q, k=k, v=v, out=out)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "out_ptr": out,
        "lse_ptr": lse,
        **strides,
        "bias_stride_g": bias.stride(0),
        "bias_stride_h": bias.stride(1),
        "bias_stride_n": bias.stride(2),
        "G": bias.shape[0],
        "H": H,
        "N": N,
        "M": M,
        "bias_unit": bias_unit(q.dtype, scale),
        "exponent_factor": scale * math.log2(math.e),
        "K": K,
        "PARTS": head_parts(K, config.part),
        "BLOCK_N": config.block_n,
        "UNIT": unit,
        "OFFSET": offset,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if isinstance(config, WholeForward):
        assert q.dtype != torch.float32
        assert dropout_p == 0
        assert sum(config.first + config.second) >= M
        launch(
            _attention_whole_kernel,
            (B * H,),
            on=q,
            FIRST=config.first,
            SECOND=config.second,
            FIRST_KEYS=sum(config.first),
            ONE_TILE=config.block_n >= N,
            maxnreg=config.maxnreg,
            **arguments,
        )
    else:
        launch(
            _attention_flash_kernel,
            (B * H * cdiv(N, config.block_n),),
            on=q,
            rng_ptr=rng if dropout_p > 0 else None,
            drop_below=threshold_of(dropout_p),
            gain=1 / (1 - dropout_p),
            BLOCK_M=config.block_m,
            TAIL=tail_width(M, config.block_m),
            PRECISION="tf32" if tf32 else "ieee",
            **arguments,
        )
