"""The way back of `gather_norm`: from gradients of listed rows to those of the tensor and the norm.

    dx[r] = sum of the gradients of out[i] over index[i] = r,  0 where no i lists r

Two kernels. The first links the i that list the same row; a program of the second owns a row of dx
and adds its duplicates in the order of i: no atomics. Formulas, shapes and types: `gather_norm`.
"""

# Triton has no unpacking.
# ruff: noqa: RUF005, SIM108

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, contiguous_rows, gpu_of, launch, tl, triton
from beit_fast.kernels.head.gather_norm import inside_of, take, tile_of, vectors_of
from beit_fast.kernels.rows import load_vector


@triton.jit
def _link_rows_kernel(
    index_ptr,  # (I,) integers
    first_ptr,  # (B N,) int32, -1: the lowest i that lists the row is written
    next_ptr,  # (I,) int32, written: the next i that lists the same row, or -1
    repeats_ptr,  # (1,) int32, written: 0 where no row is listed twice
    num_rows,  # I
    num_x_rows,  # B N
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    # Ascending with all padding at the end, as loaders make it, duplicates are neighbours. Each
    # program looks itself, and compares all with all where they need not be.
    LAST: tl.constexpr = 2**31 - 1  # above every row
    falls = tl.zeros((TILE,), tl.int32)
    stays = tl.zeros((TILE,), tl.int32)
    for start in range(0, num_rows - 1, TILE):
        j = tl.cast(start, tl.int32) + tl.arange(0, TILE)
        one = load_row(index_ptr + j, j < num_rows - 1, num_x_rows)
        other = load_row(index_ptr + j + 1, j < num_rows - 1, num_x_rows)
        falls += (other >= 0).to(tl.int32) * ((one > other) | (one < 0)).to(tl.int32)
        stays += ((one == other) & (one >= 0)).to(tl.int32)
    ascends = tl.sum(falls, axis=0) == 0
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = load_row(index_ptr + i, i < num_rows, num_x_rows)
    if ascends:
        before = load_row(index_ptr + i - 1, (i > 0) & (i < num_rows), num_x_rows)
        after = load_row(index_ptr + i + 1, i < num_rows - 1, num_x_rows)
        is_first = before != row
        following = tl.where(after == row, i + 1, LAST)
    else:
        earlier = tl.zeros((BLOCK,), tl.int32)
        following = tl.full((BLOCK,), LAST, tl.int32)
        for start in range(0, num_rows, PAIRS):
            j = tl.cast(start, tl.int32) + tl.arange(0, PAIRS)
            same = load_row(index_ptr + j, j < num_rows, num_x_rows)[None, :] == row[:, None]
            earlier += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), axis=1)
            after = tl.where(same & (j[None, :] > i[:, None]), j[None, :], LAST)
            following = tl.minimum(following, tl.min(after, axis=1))
        is_first = earlier == 0
    following = tl.where((row >= 0) & (following < LAST), following, -1)
    tl.store(next_ptr + i, following, mask=i < num_rows)
    tl.store(first_ptr + row, i, mask=(row >= 0) & is_first)
    if tl.program_id(0) == 0:
        repeats = tl.where(ascends, tl.sum(stays, axis=0), 1)
        tl.store(repeats_ptr, repeats)


@triton.jit
def load_row(at, mask, num_x_rows):
    """Indices as int32, -1 for padding and for what is out of range."""
    row = tl.load(at, mask=mask, other=-1)
    return tl.where((row >= 0) & (row < num_x_rows), row, -1).to(tl.int32)


@triton.jit
def _scatter_norm_backward_kernel(
    dout_ptr,  # (I, D)
    first_ptr,  # (B N,) int32: the lowest i that lists the row, or -1
    next_ptr,  # (I,) int32: the next i that lists the same row, or -1
    repeats_ptr,  # (1,) int32: 0 where no row is listed twice
    factor_ptr,  # (1,) fp32: of all gradients
    x_ptr,  # (B, N, D)
    x_stride_b,
    x_stride_n,
    mean_ptr,  # (I,) fp32
    rstd_ptr,  # (I,) fp32
    weight_ptr,  # (D,) or None: no norm
    dx_ptr,  # (B, N, D), written; or None
    dweight_ptr,  # (programs, D) fp32, written: each program's share; or None
    dbias_ptr,  # (programs, D) fp32, written: each program's share; or None
    num_x_rows,  # B N
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    has_repeats = tl.load(repeats_ptr) != 0
    dweights = ()
    dbiases = ()
    for _ in tl.static_range(NUM_CHUNKS):
        dweights = dweights + (tl.zeros((ROWS, CHUNK), tl.float32),)
        dbiases = dbiases + (tl.zeros((ROWS, CHUNK), tl.float32),)
    begin = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    rows = begin + tl.arange(0, ROWS)
    ahead = tl.load(first_ptr + rows, mask=rows < num_x_rows, other=-1)
    # Without hoisting: the norm's weight in registers would cost a third of the warps.
    for start in tl.range(begin, num_x_rows, step, disable_licm=True):
        rows = tl.cast(start, tl.int32) + tl.arange(0, ROWS)
        in_range = rows < num_x_rows
        first = ahead  # loaded a round ahead: everything else waits for it
        ahead = tl.load(first_ptr + rows + step, mask=rows + step < num_x_rows, other=-1)
        listed = first >= 0
        douts = ()
        values = ()
        sample = (rows // N).to(tl.int64)
        token = rows.to(tl.int64) - sample * N
        x_rows = x_ptr + sample * x_stride_b + token * x_stride_n
        dout_rows = dout_ptr + first.to(tl.int64) * D
        for c in tl.static_range(NUM_CHUNKS):
            cols = c * CHUNK + tl.arange(0, CHUNK)[None, :]
            there = listed[:, None]
            if (c + 1) * CHUNK > D:
                there = there & (cols < D)
            dout = tl.load(dout_rows[:, None] + cols, mask=there, other=0.0)
            douts = douts + (dout.to(tl.float32),)
            if weight_ptr is not None:
                values = values + (tl.load(x_rows[:, None] + cols, mask=there, other=0.0),)
        if has_repeats:  # the loop makes the warps wait for one another
            following = tl.load(next_ptr + first, mask=listed, other=-1)
            while tl.max(following, axis=0) >= 0:
                dout_rows = dout_ptr + following.to(tl.int64) * D
                for c in tl.static_range(NUM_CHUNKS):
                    cols = c * CHUNK + tl.arange(0, CHUNK)[None, :]
                    again = (following >= 0)[:, None]
                    if (c + 1) * CHUNK > D:
                        again = again & (cols < D)
                    dout = tl.load(dout_rows[:, None] + cols, mask=again, other=0.0)
                    douts = with_item(douts, c, douts[c] + dout.to(tl.float32))
                following = tl.load(next_ptr + following, mask=following >= 0, other=-1)
        if weight_ptr is not None:
            mean = tl.load(mean_ptr + first, mask=listed, other=0.0)
            rstd = tl.load(rstd_ptr + first, mask=listed, other=0.0)
            dy_sum = tl.zeros((ROWS, CHUNK), tl.float32)
            dyy_sum = tl.zeros((ROWS, CHUNK), tl.float32)
            for c in tl.static_range(NUM_CHUNKS):
                y = (values[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
                if dweight_ptr is not None:
                    dweights = with_item(dweights, c, dweights[c] + douts[c] * y)
                if dbias_ptr is not None:
                    dbiases = with_item(dbiases, c, dbiases[c] + douts[c])
                dy = douts[c] * load_vector(weight_ptr, c, D, CHUNK)
                dy_sum += dy
                dyy_sum += dy * y
            dy_mean = tl.sum(dy_sum, axis=1) / D
            dyy_mean = tl.sum(dyy_sum, axis=1) / D
        if dx_ptr is not None:
            for c in tl.static_range(NUM_CHUNKS):
                cols = c * CHUNK + tl.arange(0, CHUNK)[None, :]
                dx = douts[c]
                if weight_ptr is not None:
                    y = (values[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
                    dx *= load_vector(weight_ptr, c, D, CHUNK)
                    dx = (dx - dy_mean[:, None] - y * dyy_mean[:, None]) * rstd[:, None]
                dx = tl.where(listed[:, None], factor * dx, 0.0)
                there = in_range[:, None]
                if (c + 1) * CHUNK > D:
                    there = there & (cols < D)
                dx_rows = dx_ptr + rows.to(tl.int64) * D
                tl.store(dx_rows[:, None] + cols, dx.to(dx_ptr.dtype.element_ty), mask=there)
    share = tl.program_id(0).to(tl.int64) * D
    for c in tl.static_range(NUM_CHUNKS):
        cols = c * CHUNK + tl.arange(0, CHUNK)
        if dweight_ptr is not None:
            dweight = factor * tl.sum(dweights[c], axis=0)
            tl.store(dweight_ptr + share + cols, dweight, mask=cols < D)
        if dbias_ptr is not None:
            dbias = factor * tl.sum(dbiases[c], axis=0)
            tl.store(dbias_ptr + share + cols, dbias, mask=cols < D)


@triton.jit
def with_item(items, index: tl.constexpr, value):
    """The tuple with one item replaced."""
    out = ()
    for i in tl.static_range(len(items)):
        if i == index:
            out = out + (value,)
        else:
            out = out + (items[i],)
    return out


def scatter_norm_backward(
    dout: Tensor,
    index: Tensor,
    factor: Tensor,
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    *,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """factor times the gradients of x, norm_weight and norm_bias (the last two fp32), by kernels.

    dout (I, D) is the gradient of `gather_norm`'s rows, stats are its; factor (1,) fp32.
    """
    x = contiguous_rows(x)
    B, N, D = x.shape
    first = torch.full((B * N,), -1, dtype=torch.int32, device=x.device)
    following = torch.empty(index.shape, dtype=torch.int32, device=x.device)
    repeats = torch.zeros(1, dtype=torch.int32, device=x.device)  # what an empty index leaves
    launch(
        _link_rows_kernel,
        (cdiv(len(index), 128),),
        on=x,
        index_ptr=index,
        first_ptr=first,
        next_ptr=following,
        repeats_ptr=repeats,
        num_rows=len(index),
        num_x_rows=B * N,
        BLOCK=128,
        TILE=1024,
        PAIRS=32,
    )
    tile = tile_of(D)
    # As many as run at a time, by their registers: each owns a share of the norm's gradients.
    per_sm = 1 if tile["num_warps"] > 4 else 2 if tile["NUM_CHUNKS"] > 3 else 3
    num_programs = min(cdiv(B * N, tile["ROWS"]), per_sm * gpu_of(x).num_sms)
    dx = x.new_empty(x.shape) if needs_x else None
    shares = (num_programs, D)
    dweight = x.new_empty(shares, dtype=torch.float32) if needs_weight else None
    dbias = x.new_empty(shares, dtype=torch.float32) if needs_bias else None
    launch(
        _scatter_norm_backward_kernel,
        (num_programs,),
        on=x,
        dout_ptr=dout,
        first_ptr=first,
        next_ptr=following,
        repeats_ptr=repeats,
        factor_ptr=factor,
        x_ptr=x,
        x_stride_b=x.stride(0),
        x_stride_n=x.stride(1),
        mean_ptr=stats[0],
        rstd_ptr=stats[1],
        weight_ptr=norm_weight,
        dx_ptr=dx,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        num_x_rows=B * N,
        N=N,
        D=D,
        **tile,
    )
    return dx, *(None if share is None else share.sum(dim=0) for share in (dweight, dbias))


def scatter_norm_backward_torch(
    dout: Tensor,
    index: Tensor,
    factor: Tensor,
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    *,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    rows_at_a_time: int = 4096,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`scatter_norm_backward` in torch, on any device, some rows at a time.

    On a CPU deterministic; on a GPU torch adds the rows with atomics.
    """
    D = x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    dx_RD = x.new_zeros((x.shape[0] * x.shape[1], D), dtype=wide) if needs_x else None
    dweight = x.new_zeros(D, dtype=wide) if needs_weight else None
    dbias = x.new_zeros(D, dtype=wide) if needs_bias else None
    for start in range(0, len(index), rows_at_a_time):
        part = slice(start, start + rows_at_a_time)
        drows = dout[part].to(wide)
        if norm_weight is None:
            inside = inside_of(x, index[part])
        else:
            rows, _, inside = take(x, index[part])
            weight, bias = vectors_of(norm_weight, norm_weight if needs_bias else None, wide)
            drows, dweight_part, dbias_part = torch.ops.aten.native_layer_norm_backward(
                drows.masked_fill(~inside[:, None], 0),
                rows, (D,), stats[0, part, None], stats[1, part, None], weight, bias,
                (needs_x, needs_weight, needs_bias),
            )  # fmt: skip
            if needs_weight:
                dweight += dweight_part
            if needs_bias:
                dbias += dbias_part
        if dx_RD is not None and len(dx_RD):
            # x may be NaN where it is not listed.
            drows = (drows * factor).masked_fill_(~inside[:, None], 0)
            dx_RD.index_add_(0, torch.where(inside, index[part], 0), drows)
    dx = None if dx_RD is None else dx_RD.to(x.dtype).view(x.shape)
    return dx, *(None if sum_D is None else sum_D.mul_(factor) for sum_D in (dweight, dbias))
