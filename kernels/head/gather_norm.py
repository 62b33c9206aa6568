"""Listed rows of a tensor through LayerNorm into a compact matrix, and the way back.

    out[i] = LayerNorm(x[index[i]])                          without a norm x[index[i]] itself
    dx[r]  = sum of the gradients of out[i] over index[i] = r,  0 where no i lists r

Shapes    x (B, N, D), its rows counted over B N; index (I,) integers; out, dout (I, D);
          norm_weight, norm_bias (D,); mean, rstd (I,)
Types     statistics and arithmetic in fp32; out in any dtype, dx in x's
Padding   index -1: out is 0, and nothing goes back. Any other index outside 0 .. B N - 1 reads
          nothing and makes its row of out NaN
Backward  dy = sum of dout over i, times norm_weight;  y = (x - mean) rstd
          dx = factor rstd (dy - mean(dy) - y mean(dy y));  dnorm_weight = factor sum dout y
          One program owns a row of dx and adds its duplicates in the order of i: no atomics
Cost      forward reads and writes I D elements, backward reads 2 I D and writes B N D: bound by
          memory
"""

# ruff: noqa: RUF005 - Triton takes no starred tuples

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import cdiv, contiguous_rows, launch, tl, triton
from beit_fast.kernels.rows import load_vector

WIDEST = 8192


def gather_norm_reference(
    x: Tensor,
    index: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """The first formula above for an index within range, -1 included."""
    rows_ID = x.flatten(0, 1)[index.clamp(min=0).long()]
    if norm_weight is not None:
        rows_ID = F.layer_norm(rows_ID, rows_ID.shape[1:], norm_weight, norm_bias, eps)
    return rows_ID * (index >= 0)[:, None].to(rows_ID.dtype)


@triton.jit
def _gather_norm_kernel(
    x_ptr,  # (B, N, D)
    x_stride_b,
    x_stride_n,
    index_ptr,  # (I,) integers
    weight_ptr,  # (D,) or None: no norm
    bias_ptr,  # (D,) or None
    out_ptr,  # (I, D), written
    mean_ptr,  # (I,) fp32, written
    rstd_ptr,  # (I,) fp32, written
    num_rows,  # I
    num_x_rows,  # B N
    N,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = i < num_rows
    index = tl.load(index_ptr + i, mask=in_range, other=-1).to(tl.int64)
    inside = (index >= 0) & (index < num_x_rows)
    sample = index // N
    x_rows = x_ptr + sample * x_stride_b + (index - sample * N) * x_stride_n
    values = ()
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(NUM_CHUNKS):
        cols = c * CHUNK + tl.arange(0, CHUNK)[None, :]
        there = inside[:, None]
        if (c + 1) * CHUNK > D:
            there = there & (cols < D)
        value = tl.load(x_rows[:, None] + cols, mask=there, other=0.0).to(tl.float32)
        values = values + (value,)
        total += value
    if weight_ptr is not None:
        mean = tl.sum(total, axis=1) / D
        squares = tl.zeros((ROWS, CHUNK), tl.float32)
        for c in tl.static_range(NUM_CHUNKS):
            cols = c * CHUNK + tl.arange(0, CHUNK)[None, :]
            centred = values[c] - mean[:, None]
            if (c + 1) * CHUNK > D:
                centred = tl.where(cols < D, centred, 0.0)
            squares += centred * centred
        rstd = 1 / tl.sqrt_rn(tl.sum(squares, axis=1) / D + eps)
        tl.store(mean_ptr + i, mean, mask=in_range)
        tl.store(rstd_ptr + i, rstd, mask=in_range)
    out_rows = out_ptr + i.to(tl.int64) * D
    wrong = (index != -1) & (inside == 0)
    for c in tl.static_range(NUM_CHUNKS):
        cols = c * CHUNK + tl.arange(0, CHUNK)[None, :]
        there = in_range[:, None]
        if (c + 1) * CHUNK > D:
            there = there & (cols < D)
        value = values[c]
        if weight_ptr is not None:
            value = (value - mean[:, None]) * rstd[:, None]
            value *= load_vector(weight_ptr, c, D, CHUNK)
            if bias_ptr is not None:
                value += load_vector(bias_ptr, c, D, CHUNK)
        value = tl.where(inside[:, None], value, 0.0)
        value = tl.where(wrong[:, None], float("nan"), value)
        tl.store(out_rows[:, None] + cols, value.to(out_ptr.dtype.element_ty), mask=there)


def gather_norm(
    x: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(rows (I, D) in dtype, mean and rstd (2, I)) by the kernel; (2, 0) without a norm."""
    x = contiguous_rows(x)
    B, N, D = x.shape
    num_rows = len(index)
    out_ID = x.new_empty((num_rows, D), dtype=dtype)
    stats = x.new_empty((2, num_rows if norm_weight is not None else 0), dtype=torch.float32)
    tile = tile_of(D)
    launch(
        _gather_norm_kernel,
        (cdiv(num_rows, tile["ROWS"]),),
        on=x,
        x_ptr=x,
        x_stride_b=x.stride(0),
        x_stride_n=x.stride(1),
        index_ptr=index,
        weight_ptr=norm_weight,
        bias_ptr=norm_bias,
        out_ptr=out_ID,
        mean_ptr=stats[0],
        rstd_ptr=stats[1],
        num_rows=num_rows,
        num_x_rows=B * N,
        N=N,
        eps=eps,
        D=D,
        **tile,
    )
    return out_ID, stats


def gather_norm_torch(
    x: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`gather_norm` in torch, on any device."""
    rows_ID, real, inside = take(x, index)
    stats = rows_ID.new_empty(2, 0)
    if norm_weight is not None:
        shape, vectors = rows_ID.shape[1:], vectors_of(norm_weight, norm_bias, rows_ID.dtype)
        rows_ID, mean, rstd = torch.native_layer_norm(rows_ID, shape, *vectors, eps)
        stats = torch.cat((mean, rstd), dim=1).t()
    rows_ID.masked_fill_(~inside[:, None], 0)
    rows_ID.masked_fill_((real & ~inside)[:, None], torch.nan)
    return rows_ID.to(dtype), stats.contiguous()


def tile_of(D: int) -> dict[str, int]:
    """A warp for each 1024 channels of a row, 16-bit inputs in 16-byte loads: 768 fills its lanes.

    >>> tile_of(768), tile_of(8192)
    ({'ROWS': 4, 'CHUNK': 256, 'NUM_CHUNKS': 3, 'num_warps': 4}, \
{'ROWS': 1, 'CHUNK': 2048, 'NUM_CHUNKS': 4, 'num_warps': 8})
    """
    warps = triton.next_power_of_2(cdiv(D, 1024))
    chunk = min(256 * warps, triton.next_power_of_2(D))
    return {
        "ROWS": max(4 // warps, 1),
        "CHUNK": chunk,
        "NUM_CHUNKS": cdiv(D, chunk),
        "num_warps": max(4, warps),
    }


def inside_of(x: Tensor, index: Tensor) -> Tensor:
    return (index >= 0) & (index < x.shape[0] * x.shape[1])


def take(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Listed rows in fp32 or better, which are not padding, and which are there to be read."""
    inside = inside_of(x, index)
    if x.numel():
        rows_ID = x.flatten(0, 1).index_select(0, torch.where(inside, index, 0))
    else:
        rows_ID = x.new_zeros(len(index), x.shape[2])
    return rows_ID.to(torch.promote_types(x.dtype, torch.float32)), index != -1, inside


def vectors_of(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)
