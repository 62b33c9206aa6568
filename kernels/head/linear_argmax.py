"""The best of many scores, without the scores: a product and its arg-max in one kernel.

    ids[i] = argmax_v  sum_d x[index[i], d] weight[v, d] + bias[v]

A dVAE's visual tokens are one (its last 1x1 convolution is the product), the nearest of V centres
another, the likeliest class a third.

Shapes    x (..., D), its rows counted over the leading axes; weight (V, D); bias (V,);
          index (I,) integers; ids (I,), or without an index the leading axes of x
Types     x and weight in any floating dtypes; ids int64; the bias is added in fp32
Precision of the product, always summed in fp32:
          fp32      operands as they are
          tf32x3    each operand as the sum of two TF32 numbers, three products: fp32's to 2^-21
          fp16x2    x rounded to fp16, the weight as the sum of two of them (to 2^-21, or 3e-8): as
                    good as fp32 for x in fp16, in two products at fp16's rate
          tf32, bf16, fp16    operands rounded to 10, 7, 10 bits; fp16 has a narrow range besides
          Where the best two scores are closer than the rounding, the id may change:
          `bench/tokenizer.py` counts how often
Ties      the lowest id wins, as for torch.argmax; NaN counts as the largest, as there
Padding   index -1 gives id -1, and so does what is out of range on a GPU, where nothing is read
          for it; on a CPU that is an error
Cost      2 I V D operations; the scores of a tile of 128 x 128 leave one value and one id for each
          of its rows, V / 128 of them are compared by a second kernel
Source    dall_e `encoder.py` scores all positions in fp32 and stores 32 KB for each of them
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import (
    cdiv,
    contiguous_rows,
    gpu_of,
    launch,
    launch_obstacle,
    tl,
    triton,
)
from beit_fast.kernels.arguments import (
    check_backend,
    check_floating,
    check_index,
    check_index_values,
    run_or_torch,
    triton_or_torch,
)
from beit_fast.kernels.exact_fp32 import exact_fp32
from beit_fast.kernels.registration import implement

PRECISIONS = ("fp32", "tf32x3", "fp16x2", "tf32", "bf16", "fp16")
BACKENDS = ("triton", "torch")
SCORES_AT_A_TIME = 2**24  # of the torch back end: 64 MiB in fp32, whatever the rows
_OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp16x2": torch.float16}


def linear_argmax_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """The formula above in fp32, for an index within range, -1 included."""
    rows = x if index is None else x.flatten(0, -2)[index.clamp(min=0).long()]
    ids = F.linear(rows.float(), weight.float(), None if bias is None else bias.float()).argmax(-1)
    return ids if index is None else torch.where(index >= 0, ids, -1)


@triton.jit
def _linear_argmax_kernel(
    x_ptr,  # (R, D)
    x_stride,
    index_ptr,  # (I,) integers, or None: I = R, all rows
    weight_ptr,  # (V, D)
    rest_ptr,  # (V, D) what the weight's rounding left, or None
    weight_stride,  # of both
    bias_ptr,  # (V,) or None
    best_ptr,  # (tiles of V, I) fp32, written: the best score of a row within the tile
    ids_ptr,  # (tiles of V, I) int32, written: its id
    num_rows,  # I
    R,
    V,
    D,
    PRECISION: tl.constexpr,  # of tl.dot: ieee, tf32x3 or tf32
    HAS_TAIL: tl.constexpr,  # D is no multiple of BLOCK_D
    GROUP: tl.constexpr,  # tiles of rows that share tiles of the weight in the L2 cache
    BLOCK_I: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_row_tiles = tl.cdiv(num_rows, BLOCK_I)
    num_tiles = tl.cdiv(V, BLOCK_V)
    group = tl.program_id(0) // (GROUP * num_tiles)
    group_rows = tl.minimum(num_row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_tiles)
    row_tile = group * GROUP + within % group_rows
    v_tile = within // group_rows

    i = row_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    v = v_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    row = i.to(tl.int64)
    if index_ptr is not None:
        row = tl.load(index_ptr + i, mask=i < num_rows, other=-1).to(tl.int64)
    # What is not there reads row 0, and its result is thrown away: no mask within the loop.
    row = tl.where((row >= 0) & (row < R) & (i < num_rows), row, 0)
    column = tl.where(v < V, v, 0).to(tl.int64)
    x_tile_ptr = x_ptr + (row * x_stride)[:, None] + d[None, :]
    weight_at = (column * weight_stride)[None, :] + d[:, None]
    scores = tl.zeros((BLOCK_I, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        if HAS_TAIL:
            left = D - tl.cast(start, tl.int32)
            x_tile = tl.load(x_tile_ptr, mask=d[None, :] < left, other=0.0)
            weight_tile = tl.load(weight_ptr + weight_at, mask=d[:, None] < left, other=0.0)
        else:
            x_tile = tl.load(x_tile_ptr)
            weight_tile = tl.load(weight_ptr + weight_at)
        x_tile = x_tile.to(weight_ptr.dtype.element_ty)
        scores = tl.dot(x_tile, weight_tile, scores, input_precision=PRECISION)
        if rest_ptr is not None:
            if HAS_TAIL:
                rest_tile = tl.load(rest_ptr + weight_at, mask=d[:, None] < left, other=0.0)
            else:
                rest_tile = tl.load(rest_ptr + weight_at)
            scores = tl.dot(x_tile, rest_tile, scores, input_precision=PRECISION)
        x_tile_ptr += BLOCK_D
        weight_at += BLOCK_D

    if bias_ptr is not None:
        scores += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    NO_ID: tl.constexpr = 2**31 - 1
    there = (v < V)[None, :]
    is_nan = (scores != scores) & there
    scores = tl.where(is_nan | (there == 0), float("-inf"), scores)
    best = tl.max(scores, axis=1)
    ids = tl.min(tl.where((scores == best[:, None]) & there, v[None, :], NO_ID), axis=1)
    nan_ids = tl.min(tl.where(is_nan, v[None, :], NO_ID), axis=1)
    has_nan = nan_ids < NO_ID
    best = tl.where(has_nan, float("nan"), best)
    ids = tl.where(has_nan, nan_ids, ids)
    at = v_tile.to(tl.int64) * num_rows + i
    tl.store(best_ptr + at, best, mask=i < num_rows)
    tl.store(ids_ptr + at, ids, mask=i < num_rows)


@triton.jit
def _best_tile_kernel(
    best_ptr,  # (num_tiles, I) fp32
    ids_ptr,  # (num_tiles, I) int32
    index_ptr,  # (I,) integers, or None
    out_ptr,  # (I,) int64, written
    num_rows,  # I
    R,
    num_tiles,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.load(best_ptr + i, mask=i < num_rows, other=0.0)
    ids = tl.load(ids_ptr + i, mask=i < num_rows, other=0)
    for tile in range(1, num_tiles):
        at = tl.cast(tile, tl.int64) * num_rows + i
        other = tl.load(best_ptr + at, mask=i < num_rows, other=0.0)
        other_ids = tl.load(ids_ptr + at, mask=i < num_rows, other=0)
        # Not where equal: the earlier tile has the lower ids.
        wins = (other > best) | ((other != other) & (best == best))
        best = tl.where(wins, other, best)
        ids = tl.where(wins, other_ids, ids)
    if index_ptr is not None:
        row = tl.load(index_ptr + i, mask=i < num_rows, other=-1)
        ids = tl.where((row >= 0) & (row < R), ids, -1)
    tl.store(out_ptr + i, ids.to(tl.int64), mask=i < num_rows)


# fp32 products run outside the tensor cores; tf32x3 holds both parts of its operands, for which
# there must be registers where products do not read shared memory.
_TF32X3_REGISTERS = {"BLOCK_I": 64, "BLOCK_V": 128, "BLOCK_D": 16, "num_warps": 4, "num_stages": 3}
_FP16X2_REGISTERS = {"BLOCK_I": 128, "BLOCK_V": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
_TILES = {
    "fp32": {"BLOCK_I": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2},
    "tf32x3": {"BLOCK_I": 128, "BLOCK_V": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2},
    "tf32": {"BLOCK_I": 128, "BLOCK_V": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
    "bf16": {"BLOCK_I": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    "fp16": {"BLOCK_I": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    "fp16x2": {"BLOCK_I": 128, "BLOCK_V": 256, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
}


def linear_argmax_triton(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    precision: str,
    rest: Tensor | None = None,
) -> Tensor:
    """ids of rows (R, D), or of those listed, by the kernels; last strides are 1."""
    num_rows = len(rows) if index is None else len(index)
    V, D = weight.shape
    if precision == "fp16x2":
        weight, rest = split_fp16(weight) if rest is None else (weight, rest)
    weight = weight.to(_OPERANDS.get(precision, torch.float32))
    tile = _TILES[precision]
    if not gpu_of(rows).multiplies_from_shared:
        tile = {"tf32x3": _TF32X3_REGISTERS, "fp16x2": _FP16X2_REGISTERS}.get(precision, tile)
    num_tiles = cdiv(V, tile["BLOCK_V"])
    best = rows.new_empty((num_tiles, num_rows), dtype=torch.float32)
    ids = rows.new_empty((num_tiles, num_rows), dtype=torch.int32)
    out = rows.new_empty(num_rows, dtype=torch.int64)
    launch(
        _linear_argmax_kernel,
        (cdiv(num_rows, tile["BLOCK_I"]) * num_tiles,),
        on=rows,
        x_ptr=rows,
        x_stride=rows.stride(0),
        index_ptr=index,
        weight_ptr=weight,
        rest_ptr=rest,
        weight_stride=weight.stride(0),
        bias_ptr=bias,
        best_ptr=best,
        ids_ptr=ids,
        num_rows=num_rows,
        R=len(rows),
        V=V,
        D=D,
        PRECISION=precision if precision in ("tf32x3", "tf32") else "ieee",
        HAS_TAIL=D % tile["BLOCK_D"] != 0,
        GROUP=8,
        **tile,
    )
    launch(
        _best_tile_kernel,
        (cdiv(num_rows, 128),),
        on=rows,
        best_ptr=best,
        ids_ptr=ids,
        index_ptr=index,
        out_ptr=out,
        num_rows=num_rows,
        R=len(rows),
        num_tiles=num_tiles,
        BLOCK=128,
    )
    return out


def linear_argmax_torch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    precision: str,
    rest: Tensor | None = None,
) -> Tensor:
    """`linear_argmax_triton` in torch, some rows at a time; operands are rounded beforehand."""
    num_rows = len(rows) if index is None else len(index)
    out = torch.empty(num_rows, dtype=torch.int64, device=rows.device)
    if precision == "fp16x2":
        weight, rest = split_fp16(weight) if rest is None else (weight, rest)
        weight_VD = weight.float() + rest.float()
    else:
        weight_VD = round_operand(weight, precision)
    bias_V = None if bias is None else bias.to(weight_VD.dtype)
    at_a_time = max(1, SCORES_AT_A_TIME // len(weight))
    for start in range(0, num_rows, at_a_time):
        part = slice(start, start + at_a_time)
        if index is None:
            rows_CD = rows[part]
        else:
            inside = (index[part] >= 0) & (index[part] < len(rows))
            rows_CD = rows.index_select(0, torch.where(inside, index[part], 0))
        rows_CD = round_operand(rows_CD, precision).to(weight_VD.dtype)
        torch.argmax(F.linear(rows_CD, weight_VD, bias_V), dim=1, out=out[part])
        if index is not None:
            out[part].masked_fill_(~inside, -1)
    return out


def split_fp16(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous weight as the sum of two fp16 tensors."""
    weight = weight.contiguous()
    rounded = weight.half()
    return rounded, (weight.float() - rounded.float()).half()


def round_operand(tensor: Tensor, precision: str) -> Tensor:
    """The tensor as a factor of that precision sees it, in fp32 (fp64 stays, for fp32)."""
    if precision in _OPERANDS:
        return tensor.to(_OPERANDS[precision]).float()
    if precision == "tf32":  # 10 bits of the mantissa, ties away from zero
        bits = tensor.float().contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


torch.library.define(
    "beit_fast::linear_argmax",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? index, str precision, str backend, "
    "Tensor? rest=None) -> Tensor",
)


def _linear_argmax(x, weight, bias, index, precision, backend, rest=None):
    shape = x.shape[:-1] if index is None else index.shape
    if 0 in x.shape:
        return x.new_full(shape, -1, dtype=torch.int64)
    arguments = (x, weight, bias, index, precision, rest)
    if _resolve(backend, x) == "torch":
        return _by_torch(*arguments).view(shape)

    def on_kernels() -> Tensor:
        rows, listed = _as_matrix(x, index)
        return linear_argmax_triton(rows, contiguous_rows(weight), bias, listed, precision, rest)

    on_torch = functools.partial(_by_torch, *arguments)
    return run_or_torch("linear_argmax", on_kernels, on_torch, backend=backend).view(shape)


def _by_torch(x, weight, bias, index, precision, rest):
    if x.device.type == "cpu" and index is not None:
        check_index_values(index, x[..., 0].numel())
    with torch.autocast(x.device.type, enabled=False), exact_fp32():
        rows, listed = _as_matrix(x, index)
        return linear_argmax_torch(rows, weight, bias, listed, precision, rest)


implement("linear_argmax", _linear_argmax)


@torch.library.register_fake("beit_fast::linear_argmax")
def _(x, weight, bias, index, precision, backend, rest=None):
    return x.new_empty(x.shape[:-1] if index is None else index.shape, dtype=torch.int64)


def _as_matrix(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows (R, D) whose last stride is 1, and what to take of them, copying no more than listed."""
    D = x.shape[-1]
    if x.is_contiguous() or index is None:
        return x.reshape(-1, D).contiguous(), index
    if x.ndim == 2 and x.stride(1) == 1:
        return x, index
    inside = (index >= 0) & (index < x[..., 0].numel())
    taken = torch.where(inside, index, 0)
    rows = x[torch.unravel_index(taken, x.shape[:-1])].contiguous()
    return rows, torch.where(inside, torch.arange(len(index), device=x.device), -1)


def linear_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    *,
    precision: str = "fp32",
    backend: str | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """The best scored of V rows of the weight for each row of x, or for each one listed: int64 ids.

    x (..., D), any strides; weight (V, D); bias (V,) or None; index int32 or int64 (I,) into the
    rows of x, -1 is padding and gives -1. Without an index ids have x's leading axes. `precision`
    of the product, see above; autocast does not change it. `backend` "triton" is the default on
    CUDA, "torch" on CPUs. With `rest`, it and weight are what `split_fp16` made of the weight, once
    for many calls with fp16x2. Carries no gradient.
    Raises ValueError where shapes do not fit, and on a CPU for an index out of range.

    >>> linear_argmax(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2))
    tensor([0, 1])
    """
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"x is {tuple(x.shape)}, the weight {tuple(weight.shape)}: pass x (..., D) and weight "
            "(V, D)"
        )
    check_floating(x=x, weight=weight, bias=bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias is {tuple(bias.shape)}: pass ({weight.shape[0]},), or None")
    if index is not None:
        check_index(index, "rows of x with its leading axes flattened")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: pass one of {', '.join(PRECISIONS)}")
    check_backend(backend, BACKENDS)
    if rest is not None and (
        precision != "fp16x2"
        or {weight.dtype, rest.dtype} != {torch.float16}
        or rest.shape != weight.shape
        or not (weight.is_contiguous() and rest.is_contiguous())
    ):
        raise ValueError(
            f"a rest {rest.dtype} {tuple(rest.shape)} of a weight {weight.dtype} "
            f"{tuple(weight.shape)} at {precision}: pass both as split_fp16 gives them, with "
            "precision='fp16x2'"
        )
    index = None if index is None else index.contiguous()
    return torch.ops.beit_fast.linear_argmax(
        x.detach(), weight.detach(), bias if bias is None else bias.detach(), index, precision,
        backend or "", None if rest is None else rest.detach(),
    )  # fmt: skip


def _resolve(backend: str, x: Tensor) -> str:
    """The one place that decides, and says once for each reason where something slower runs."""
    if backend == "torch" or (backend == "" and x.device.type == "cpu"):
        return "torch"
    return triton_or_torch(
        "linear_argmax", backend, launch_obstacle(x, x.dtype, operator="linear_argmax")
    )
