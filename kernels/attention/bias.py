"""The bias as the attention kernels read it, and the sum of the gradients as they write them.

    padded[g,h,n,m] = bias[g,h,n,m] / (scale u)     n < N, m < M;    -inf for m >= M, else 0
    dbias[g,h,n,m]  = sum_c partials[c,g,h,n,m]

Divided by the scale of the logits it is the first value of the accumulator of q k^T; its -inf
columns are the only mask a kernel needs. Rows and columns are padded to whole tiles.

u, the unit of what is stored, is 1 where division by the scale rounds nothing: in fp32, or where
the scale is a power of two, which heads of 16 and 64 channels have. Elsewhere u is 1 / scale: the
bias is stored as it is, and a kernel multiplies by u in fp32 (`raw_bias`). In fp16 the quotient
would be off by up to 2^-12 of itself, where a 16-bit bias is exact: with heads of 32 that cost
outputs in fp16 up to 1e-2.

Shapes    bias (G, H, N, M); padded (G, H, padded_length(N), padded_length(M)), some strides 0
          where there is no bias; partials (C, G, H, >= N, >= M) fp32
Types     padded is fp16 for 16-bit queries: it costs what bf16 costs and rounds 8 times less.
          fp32 for fp32 queries.
          Finite values beyond fp16's range (a mask of -1e9) become its largest: exp2 gives 0
Cost      bound by memory; 2 to 3 MB a layer for Base at 224
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, launch, tl, triton
from beit_fast.kernels.arguments import run_or_torch
from beit_fast.kernels.attention.rel_pos_bias import expand_table
from beit_fast.kernels.registration import implement

# Below this scale a bias of 2000 would leave fp16's range when divided by it.
SMALLEST_DIVISOR = 1 / 32


def padded_length(length: int) -> int:
    """64, or the next multiple of 128."""
    tiles = cdiv(length, 64)
    # Without a branch: the compiler's lengths may be symbols.
    return 64 * (tiles + tiles % 2 * torch.sym_min(tiles // 2, 1))


def padded_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the padded bias of queries of `dtype` is stored in."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def bias_unit(dtype: torch.dtype, scale: float) -> float | None:
    """u on top of this file, of queries or a padded bias of `dtype`; None: 1.

    >>> bias_unit(torch.bfloat16, 64**-0.5), bias_unit(torch.bfloat16, 0.2)
    (None, 5.0)
    """
    is_power_of_two = math.frexp(scale)[0] == 0.5
    if dtype == torch.float32 or (is_power_of_two and scale >= SMALLEST_DIVISOR):
        return None
    return 1 / scale


@triton.jit
def raw_bias(
    tile,  # of the padded bias
    unit,  # fp32: u; None: 1
):
    """The tile in units of the raw scores, fp32."""
    tile = tile.to(tl.float32)
    if unit is not None:
        tile *= unit
    return tile


def pad_bias_reference(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The first formula above, transcribed, for a bias (G, H, N, M)."""
    G, H, N, M = bias.shape
    stored = bias.float() * _factor(dtype, scale)
    limit = torch.finfo(dtype).max
    stored = torch.where(stored.isfinite(), stored.clamp(-limit, limit), stored)
    padded = bias.new_zeros((G, H, padded_length(N), padded_length(M)), dtype=dtype)
    padded[:, :, :N, :M] = stored
    padded[..., M:] = -torch.inf
    return padded


def _factor(dtype: torch.dtype, scale: float) -> float:
    """What the bias is multiplied by where it is stored: 1 / (scale u)."""
    return 1 / scale if bias_unit(dtype, scale) is None else 1.0


@triton.jit
def _pad_bias_kernel(
    bias_ptr,  # (G, H, N, M)
    out_ptr,  # (G, H, padded_rows, padded_cols), contiguous
    stride_g,  # of bias
    stride_h,  # of bias
    stride_n,  # of bias
    stride_m,  # of bias
    factor,  # fp32: 1 / (scale u)
    limit,  # fp32: finite entries are clamped to [-limit, limit]
    H,  # heads
    N,  # queries
    M,  # keys
    padded_rows,  # whole tiles of queries
    padded_cols,  # whole tiles of keys
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row_tiles = tl.cdiv(padded_rows, ROWS)
    gh = tl.cast(tl.program_id(0) // row_tiles, tl.int64)
    n = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    m = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    at = bias_ptr + (gh // H) * stride_g + (gh % H) * stride_h
    at += tl.cast(n, tl.int64) * stride_n + tl.cast(m, tl.int64) * stride_m
    value = tl.load(at, mask=(n < N) & (m < M), other=0.0).to(tl.float32) * factor
    clamped = tl.minimum(tl.maximum(value, -limit), limit)
    value = tl.where(tl.abs(value) < float("inf"), clamped, value)  # inf and NaN stay visible
    value = tl.where(m < M, value, float("-inf")).to(out_ptr.dtype.element_ty)
    stored = (n < padded_rows) & (m < padded_cols)
    tl.store(out_ptr + gh * padded_rows * padded_cols + n * padded_cols + m, value, mask=stored)


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # (C, G, H, >= N, >= M) fp32
    out_ptr,  # (G, H, N, M), contiguous
    stride_c,  # of partials
    stride_g,  # of partials
    stride_h,  # of partials
    stride_n,  # of partials; the last is 1
    C,  # partials
    H,  # heads
    N,  # queries
    M,  # keys
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row_tiles = tl.cdiv(N, ROWS)
    gh = tl.cast(tl.program_id(0) // row_tiles, tl.int64)
    n = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    m = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (n < N) & (m < M)
    at = partials_ptr + (gh // H) * stride_g + (gh % H) * stride_h + n * stride_n + m
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for c in range(C):
        acc += tl.load(at + tl.cast(c, tl.int64) * stride_c, mask=inside, other=0.0)
    tl.store(out_ptr + gh * N * M + n * M + m, acc.to(out_ptr.dtype.element_ty), mask=inside)


def pad_bias(
    bias: Tensor | None, grid: list[int], q: Tensor, num_keys: int, scale: float
) -> Tensor:
    """The padded bias for queries q (B, N, H, K) from a dense bias, a table of `grid`, or nothing.

    bias (H, N, M) or (G, H, N, M), or, where `grid` is not empty, a table (R, H).
    """
    _, N, H, _ = q.shape
    dtype = padded_dtype(q.dtype)
    padded_rows, padded_cols = padded_length(N), padded_length(num_keys)
    if bias is None:
        row = q.new_zeros(padded_cols, dtype=dtype)
        row[num_keys:] = -torch.inf
        return row.expand(1, H, padded_rows, padded_cols)
    if grid:
        factor = _factor(dtype, scale)
        return expand_table(bias, tuple(grid), padded=padded_rows, dtype=dtype, factor=factor)[None]
    return pad_dense(bias, dtype, scale)


def pad_dense(bias: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """The padded bias, in `dtype`, of a dense bias (H, N, M) or (G, H, N, M)."""
    bias_GHNM = bias if bias.ndim == 4 else bias[None]
    G, H, N, M = bias_GHNM.shape
    padded_rows, padded_cols = padded_length(N), padded_length(M)
    out = bias.new_empty((G, H, padded_rows, padded_cols), dtype=dtype)
    rows, cols = 16, 64
    launch(
        _pad_bias_kernel,
        (G * H * cdiv(padded_rows, rows), cdiv(padded_cols, cols)),
        on=bias,
        bias_ptr=bias_GHNM,
        out_ptr=out,
        stride_g=bias_GHNM.stride(0),
        stride_h=bias_GHNM.stride(1),
        stride_n=bias_GHNM.stride(2),
        stride_m=bias_GHNM.stride(3),
        factor=_factor(dtype, scale),
        limit=torch.finfo(dtype).max,
        H=H,
        N=N,
        M=M,
        padded_rows=padded_rows,
        padded_cols=padded_cols,
        ROWS=rows,
        COLS=cols,
    )
    return out


torch.library.define(
    "beit_fast::pad_bias", "(Tensor bias, ScalarType dtype, float scale) -> Tensor"
)


def _pad_bias(bias: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    def on_torch() -> Tensor:
        return pad_bias_reference(bias if bias.ndim == 4 else bias[None], scale, dtype)

    return run_or_torch("pad_bias", lambda: pad_dense(bias, dtype, scale), on_torch)


implement("pad_bias", _pad_bias)


@torch.library.register_fake("beit_fast::pad_bias")
def _(bias, dtype, scale):
    # `len` would make a number of a symbol.
    G, (H, N, M) = bias.shape[0] if bias.ndim == 4 else 1, bias.shape[-3:]
    return bias.new_empty((G, H, padded_length(N), padded_length(M)), dtype=dtype)


# Inside `padding_once`: the bias that was padded last, how, and the result.
_last_padded: contextvars.ContextVar[list | None] = contextvars.ContextVar("padded", default=None)


@contextlib.contextmanager
def padding_once() -> Iterator[None]:
    """Inside, a bias that is given to one call of attention after another is padded once.

    Not needed in what torch.compile traces: there equal calls of an operator are one. A bias that
    is written in between is padded again, unless it is written through `.data`, which no tensor
    tells; one made in inference mode, which does not tell either, is padded by every call.
    """
    token = _last_padded.set([])
    try:
        yield
    finally:
        _last_padded.reset(token)


def pad_for(q: Tensor, bias: Tensor, scale: float) -> Tensor | None:
    """The padded bias of a dense bias for queries q, by an operator; it carries no gradient.

    None where no other call would read it: attention pads then, there and back, and keeps nothing.
    """
    dtype = padded_dtype(q.dtype)
    if torch.compiler.is_compiling():
        return torch.ops.beit_fast.pad_bias(bias.detach(), dtype, scale)
    last = _last_padded.get()
    if last is None or bias.is_inference():
        return None
    made_of = (bias._version, dtype, scale)  # a bias may be written in between
    if not last or last[0] is not bias or last[1] != made_of:
        last[:] = bias, made_of, torch.ops.beit_fast.pad_bias(bias.detach(), dtype, scale)
    return last[2]


def sum_partials(partials: Tensor, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """dbias (G, H, N, M) from partials (C, G, H, >= N, >= M), added in the order of C in fp32."""
    assert partials.stride(-1) == 1
    C, G, H = partials.shape[:3]
    out = partials.new_empty((G, H, num_queries, num_keys), dtype=dtype)
    rows, cols = 8, 64
    launch(
        _sum_partials_kernel,
        (G * H * cdiv(num_queries, rows), cdiv(num_keys, cols)),
        on=partials,
        partials_ptr=partials,
        out_ptr=out,
        stride_c=partials.stride(0),
        stride_g=partials.stride(1),
        stride_h=partials.stride(2),
        stride_n=partials.stride(3),
        C=C,
        H=H,
        N=num_queries,
        M=num_keys,
        ROWS=rows,
        COLS=cols,
    )
    return out
