"""The backward kernel of `scale_residual`, and the sum of the shares it leaves.

A program walks over rows, a tile of ROWS at a time, and keeps its share of the gradients of bias,
gamma and the norm's weight and bias in registers: 24 columns of each in a thread at most, so a row
has one warp up to D = 768 and two up to 1536. `disable_licm` keeps the vectors gamma and
norm_weight, which come from the L1 cache, out of the registers. A second kernel adds the shares of
all programs in a fixed order: no atomics, the same bits every time on GPUs of one size.
"""

# ruff: noqa: RUF005 - Triton takes no starred tuples

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, tl, triton
from beit_fast.kernels.philox import threshold_of
from beit_fast.kernels.residual.drop_path import DROP_PATH_QUAD
from beit_fast.kernels.residual.forward import drop_elements, sample_factor
from beit_fast.kernels.rows import best_chunk, columns, there


@triton.jit
def _load_vector(
    ptr,  # (D,)
    i: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Chunk i of a vector for every row: a thread loads just what it needs, 16 bytes at a time."""
    cols = columns(i, CHUNK) + tl.zeros((ROWS, 1), tl.int32)
    if (i + 1) * CHUNK > D:
        vector = tl.load(ptr + cols, mask=cols < D, other=0.0)
    else:
        vector = tl.load(ptr + cols)
    return vector.to(tl.float32)


@triton.jit
def _scale_residual_backward_kernel(
    dout_ptr,  # (B, N, D), gradient of the residual stream; or None
    dout_stride_b,
    dout_stride_n,
    dln_ptr,  # (normed, N, D), gradient of the norm's output; or None
    dln_stride_b,
    dln_stride_n,
    x_ptr,  # (B, N, D), what was normed
    x_stride_b,
    x_stride_n,
    mean_ptr,  # (normed, N) fp32
    rstd_ptr,  # (normed, N) fp32
    norm_weight_ptr,  # (D,) or None
    norm_slots_ptr,  # (B,) int32 or None
    branch_ptr,  # (C, N, D); None unless gamma is trained
    branch_stride_b,
    branch_stride_n,
    bias_ptr,  # (D,) or None
    gamma_ptr,  # (D,) or None
    keep_ptr,  # (B,) or None
    branch_slots_ptr,  # (B,) int32 or None
    rng_ptr,  # (2,) int64 or None
    dx_ptr,  # (B, N, D), written; or None
    dbranch_ptr,  # (C, N, D), written; or None
    dbias_ptr,  # (programs, D) fp32, written, the share of each; or None
    dgamma_ptr,  # the same
    dnorm_weight_ptr,  # the same
    dnorm_bias_ptr,  # the same
    num_rows,  # B N
    N,
    scale,
    dropout_threshold,
    drop_path_threshold,
    D: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DROP_PATH: tl.constexpr,
    DROP_PATH_QUAD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    dbias = ()
    dgamma = ()
    dnorm_weight = ()
    dnorm_bias = ()
    for _i in tl.static_range(NUM_CHUNKS):
        dbias = dbias + (tl.zeros((ROWS, CHUNK), tl.float32),)
        dgamma = dgamma + (tl.zeros((ROWS, CHUNK), tl.float32),)
        dnorm_weight = dnorm_weight + (tl.zeros((ROWS, CHUNK), tl.float32),)
        dnorm_bias = dnorm_bias + (tl.zeros((ROWS, CHUNK), tl.float32),)

    program = tl.program_id(0)
    for start in tl.range(program * ROWS, num_rows, tl.num_programs(0) * ROWS, disable_licm=True):
        rows = tl.cast(start, tl.int32) + tl.arange(0, ROWS)
        in_range = rows < num_rows
        sample = rows // N
        token = (rows - sample * N).to(tl.int64)
        sample_64 = sample.to(tl.int64)
        slot, present, factor = sample_factor(
            sample,
            in_range,
            keep_ptr,
            branch_slots_ptr,
            rng_ptr,
            scale,
            drop_path_threshold,
            HAS_DROP_PATH,
            DROP_PATH_QUAD,
        )
        slot = slot.to(tl.int64)
        if dout_ptr is not None:
            dout_rows = dout_ptr + (sample_64 * dout_stride_b + token * dout_stride_n)
        if branch_ptr is not None:
            branch_rows = branch_ptr + (slot * branch_stride_b + token * branch_stride_n)
        if dln_ptr is not None:
            normed = in_range
            ln_sample = sample_64
            if norm_slots_ptr is not None:
                ln_sample = tl.load(norm_slots_ptr + sample, mask=in_range, other=-1).to(tl.int64)
                normed = ln_sample >= 0
            dln_rows = dln_ptr + (ln_sample * dln_stride_b + token * dln_stride_n)
            x_rows = x_ptr + (sample_64 * x_stride_b + token * x_stride_n)
            mean = tl.load(mean_ptr + ln_sample * N + token, mask=normed, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + ln_sample * N + token, mask=normed, other=0.0)[:, None]

        # All loads before the first store, which no load moves past.
        douts = ()
        dlns = ()
        xs = ()
        branches = ()
        for i in tl.static_range(NUM_CHUNKS):
            cols = columns(i, CHUNK)
            if dln_ptr is not None:
                mask = there(normed, i, D, CHUNK)
                dlns = dlns + (tl.load(dln_rows[:, None] + cols, mask=mask, other=0.0),)
                xs = xs + (tl.load(x_rows[:, None] + cols, mask=mask, other=0.0),)
            if dout_ptr is not None:
                mask = there(in_range, i, D, CHUNK)
                douts = douts + (tl.load(dout_rows[:, None] + cols, mask=mask, other=0.0),)
            if branch_ptr is not None:
                mask = there(factor != 0.0, i, D, CHUNK)
                branches = branches + (tl.load(branch_rows[:, None] + cols, mask=mask, other=0.0),)

        if dln_ptr is not None:
            weighted = tl.zeros((ROWS, CHUNK), tl.float32)
            projected = tl.zeros((ROWS, CHUNK), tl.float32)
            dweights = ()
            dbiases = ()
            for i in tl.static_range(NUM_CHUNKS):
                dnormed = dlns[i].to(tl.float32)
                normalised = (xs[i].to(tl.float32) - mean) * rstd
                if dnorm_weight_ptr is not None:
                    dweights = dweights + (dnorm_weight[i] + dnormed * normalised,)
                if dnorm_bias_ptr is not None:
                    dbiases = dbiases + (dnorm_bias[i] + dnormed,)
                if norm_weight_ptr is not None:
                    dnormed *= _load_vector(norm_weight_ptr, i, D, ROWS, CHUNK)
                weighted += dnormed
                projected += dnormed * normalised
            if dnorm_weight_ptr is not None:
                dnorm_weight = dweights
            if dnorm_bias_ptr is not None:
                dnorm_bias = dbiases
            # One reduction for both: where warps share a row, each waits for the others.
            weighted, projected = tl.split(tl.sum(tl.join(weighted, projected), axis=1) / D)
            weighted = weighted[:, None]
            projected = projected[:, None]

        dbiases = ()
        dgammas = ()
        for i in tl.static_range(NUM_CHUNKS):
            cols = columns(i, CHUNK)
            dx = tl.zeros((ROWS, CHUNK), tl.float32)
            if dout_ptr is not None:
                dx += douts[i].to(tl.float32)
            if dln_ptr is not None:
                dnormed = dlns[i].to(tl.float32)
                normalised = (xs[i].to(tl.float32) - mean) * rstd
                if norm_weight_ptr is not None:
                    dnormed *= _load_vector(norm_weight_ptr, i, D, ROWS, CHUNK)
                dx += (dnormed - weighted - normalised * projected) * rstd
            if dx_ptr is not None:
                tl.store(
                    dx_ptr + rows.to(tl.int64)[:, None] * D + cols,
                    dx.to(dx_ptr.dtype.element_ty),
                    mask=there(in_range, i, D, CHUNK),
                )
            dterm = factor[:, None] * dx
            if HAS_DROPOUT:
                dterm = drop_elements(dterm, rng_ptr, rows, dropout_threshold, i, ROWS, CHUNK)
            if dgamma_ptr is not None:
                term = branches[i].to(tl.float32)
                if bias_ptr is not None:
                    term += _load_vector(bias_ptr, i, D, ROWS, CHUNK)
                dgammas = dgammas + (dgamma[i] + dterm * term,)
            if gamma_ptr is not None:
                dterm *= _load_vector(gamma_ptr, i, D, ROWS, CHUNK)
            if dbias_ptr is not None:
                dbiases = dbiases + (dbias[i] + dterm,)
            if dbranch_ptr is not None:
                tl.store(
                    dbranch_ptr + (slot * N + token)[:, None] * D + cols,
                    dterm.to(dbranch_ptr.dtype.element_ty),
                    mask=there(present, i, D, CHUNK),
                )
        if dgamma_ptr is not None:
            dgamma = dgammas
        if dbias_ptr is not None:
            dbias = dbiases

    share = program.to(tl.int64) * D
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + share + cols, tl.sum(dbias[i], axis=0), mask=cols < D)
        if dgamma_ptr is not None:
            tl.store(dgamma_ptr + share + cols, tl.sum(dgamma[i], axis=0), mask=cols < D)
        if dnorm_weight_ptr is not None:
            total = tl.sum(dnorm_weight[i], axis=0)
            tl.store(dnorm_weight_ptr + share + cols, total, mask=cols < D)
        if dnorm_bias_ptr is not None:
            tl.store(dnorm_bias_ptr + share + cols, tl.sum(dnorm_bias[i], axis=0), mask=cols < D)


@triton.jit
def _sum_shares_kernel(
    shares_ptr,  # (vectors, num_shares, D) fp32
    dbias_ptr,  # (D,) fp32, written: the sum of the next of `vectors`; or None
    dgamma_ptr,  # the same
    dnorm_weight_ptr,  # the same
    dnorm_bias_ptr,  # the same
    num_shares,
    D,
    SHARES: tl.constexpr,
    COLS: tl.constexpr,
):
    vector = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    # In fp64: some hundred additions for a column are little beside reading the shares.
    total = tl.zeros((SHARES, COLS), tl.float64)
    first = tl.cast(vector, tl.int64) * num_shares
    for start in range(0, num_shares, SHARES):
        share = start + tl.arange(0, SHARES)[:, None]
        mask = (share < num_shares) & (cols < D)
        shares = tl.load(shares_ptr + (first + share) * D + cols, mask=mask, other=0.0)
        total += shares.to(tl.float64)
    total = tl.sum(total, axis=0).to(tl.float32)[None, :]
    number = 0
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, total, mask=(cols < D) & (vector == number))
        number += 1
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + cols, total, mask=(cols < D) & (vector == number))
        number += 1
    if dnorm_weight_ptr is not None:
        tl.store(dnorm_weight_ptr + cols, total, mask=(cols < D) & (vector == number))
        number += 1
    if dnorm_bias_ptr is not None:
        tl.store(dnorm_bias_ptr + cols, total, mask=(cols < D) & (vector == number))


def _tiles(D: int) -> dict[str, int]:
    """For 192, 384, 768: three chunks and a warp a row; 1024: two chunks, 1280, 1408: three, and
    two warps a row."""
    warps_of_a_row = 1
    while warps_of_a_row * 768 < D:
        warps_of_a_row *= 2
    chunk = best_chunk(D, widest=256 * warps_of_a_row, most=3)
    # Two warps share a program's shares up to 768: half as many to write and to add.
    num_warps = max(warps_of_a_row, 2)
    rows = 256 * num_warps // chunk
    return {"num_warps": num_warps, "ROWS": rows, "CHUNK": chunk, "NUM_CHUNKS": cdiv(D, chunk)}


def _num_programs(tensor: Tensor, num_rows: int, num_vectors: int, tiles: dict[str, int]) -> int:
    """As many as run at a time: registers decide, about 40 and 8 NUM_CHUNKS (vectors + 5)."""
    registers = 40 + 8 * tiles["NUM_CHUNKS"] * (num_vectors + 5)
    resident = max(65536 // (registers * 32 * tiles["num_warps"]), 1)
    return min(cdiv(num_rows, tiles["ROWS"]), gpu_of(tensor).num_sms * resident)


def scale_residual_backward(
    dout: Tensor | None,
    dln: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    norm_slots: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_slots: Tensor | None,
    *,
    shape: tuple[int, int, int],
    scale: float,
    dropout_p: float,
    drop_path_p: float,
    rng: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
    dbias: Tensor | None,
    dgamma: Tensor | None,
    dnorm_weight: Tensor | None,
    dnorm_bias: Tensor | None,
) -> None:
    """Write the gradients that are tensors; `shape` is (B, N, D), others are the kernel's.

    Rows of all inputs are contiguous, dx and dbranch wholly; gradients of vectors are fp32.
    """
    (B, N, D), on = shape, dln if dout is None else dout
    vectors = {
        "dbias_ptr": dbias,
        "dgamma_ptr": dgamma,
        "dnorm_weight_ptr": dnorm_weight,
        "dnorm_bias_ptr": dnorm_bias,
    }
    wanted = [name for name, vector in vectors.items() if vector is not None]
    tiles = _tiles(D)
    num_programs = _num_programs(on, B * N, len(wanted), tiles)
    shares = torch.empty((len(wanted), num_programs, D), dtype=torch.float32, device=on.device)
    launch(
        _scale_residual_backward_kernel,
        (num_programs,),
        on=on,
        **_rows_of("dout", dout),
        **_rows_of("dln", dln),
        **_rows_of("x", x),
        mean_ptr=mean,
        rstd_ptr=rstd,
        norm_weight_ptr=norm_weight,
        norm_slots_ptr=norm_slots,
        **_rows_of("branch", branch),
        bias_ptr=bias,
        gamma_ptr=gamma,
        keep_ptr=keep,
        branch_slots_ptr=branch_slots,
        rng_ptr=rng,
        dx_ptr=dx,
        dbranch_ptr=dbranch,
        **{name: shares[wanted.index(name)] if name in wanted else None for name in vectors},
        num_rows=B * N,
        N=N,
        scale=scale / ((1 - dropout_p) * (1 - drop_path_p)),
        dropout_threshold=threshold_of(dropout_p),
        drop_path_threshold=threshold_of(drop_path_p),
        D=D,
        HAS_DROPOUT=dropout_p > 0,
        HAS_DROP_PATH=drop_path_p > 0,
        DROP_PATH_QUAD=DROP_PATH_QUAD,
        **tiles,
    )
    sum_shares(shares, **vectors)


def sum_shares(shares: Tensor, **vectors: Tensor | None) -> None:
    """Write the sums of shares (vectors, num_shares, D) into what is there of the four, in order.

    Summed in fp64, rounded once.
    """
    _, num_shares, D = shares.shape
    cols = 32
    launch(
        _sum_shares_kernel,
        (cdiv(D, cols), len(shares)),
        on=shares,
        shares_ptr=shares,
        **vectors,
        num_shares=num_shares,
        D=D,
        SHARES=128,
        COLS=cols,
    )


def _rows_of(name: str, tensor: Tensor | None) -> dict[str, Tensor | int | None]:
    strides = (0, 0) if tensor is None else tensor.stride()
    return {
        f"{name}_ptr": tensor,
        f"{name}_stride_b": strides[0],
        f"{name}_stride_n": strides[1],
    }
