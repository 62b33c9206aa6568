"""The forward kernel of `scale_residual`: residual and the LayerNorm after it in one pass.

A program owns ROWS rows, held in registers as NUM_CHUNKS tiles (ROWS, CHUNK). With CHUNK = 256
and 16-bit inputs one warp owns a row: 32 lanes of 16 bytes, sums by shuffles alone, and widths like
768 fill every lane, where a power of two would leave a quarter idle. All loads come before the
first store, because no load moves past a store.
"""

# ruff: noqa: RUF005 - Triton takes no starred tuples

from torch import Tensor

from beit_fast.kernels._triton import cdiv, launch, tl, triton
from beit_fast.kernels.philox import random_tile, random_words, threshold_of
from beit_fast.kernels.residual.drop_path import DROP_PATH_QUAD
from beit_fast.kernels.rows import best_chunk, columns, there


@triton.jit
def sample_factor(
    sample,  # (ROWS,) int32
    in_range,  # (ROWS,) bool
    keep_ptr,  # (B,) factor of each sample, or None
    slots_ptr,  # (B,) int32: which image of a compact branch is the sample's, -1 none; or None
    rng_ptr,  # (2,) int64, or None
    scale,  # float: 1 / (1 - p) of all that is dropped at random
    drop_path_threshold,  # int: of a word
    HAS_DROP_PATH: tl.constexpr,
    DROP_PATH_QUAD: tl.constexpr,
):
    """Where each row's sample is in the branch, whether it is there; its factor, 0 if dropped."""
    slot = sample
    present = in_range
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + sample, mask=in_range, other=-1)
        present = slot >= 0
    factor = tl.where(present, scale, 0.0)
    if keep_ptr is not None:
        factor *= tl.load(keep_ptr + sample, mask=in_range, other=0.0).to(tl.float32)
    if HAS_DROP_PATH:
        word, _, _, _ = random_words(rng_ptr, sample * 0 + DROP_PATH_QUAD, sample)
        factor = tl.where(word >= drop_path_threshold, factor, 0.0)
    return slot, present, factor


@triton.jit
def drop_elements(
    tile,  # (ROWS, CHUNK)
    rng_ptr,  # (2,) int64
    rows,  # (ROWS,) int32, counted over all rows of x
    threshold,  # int: of a word
    i: tl.constexpr,  # number of the chunk
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The tile with dropped elements at 0: stream row, quad col / 4, word col mod 4."""
    quad = i * (CHUNK // 4) + tl.arange(0, CHUNK // 4)[None, :] + rows[:, None] * 0
    words = random_tile(rng_ptr, quad, rows[:, None], ROWS, CHUNK)
    return tl.where(words >= threshold, tile, 0.0)


@triton.jit
def _scale_residual_forward_kernel(
    x_ptr,  # (B, N, D)
    x_stride_b,
    x_stride_n,
    branch_ptr,  # (C, N, D), C = B without slots; None: the norm alone
    branch_stride_b,
    branch_stride_n,
    bias_ptr,  # (D,) or None
    gamma_ptr,  # (D,) or None
    keep_ptr,  # (B,) or None
    branch_slots_ptr,  # (B,) int32 or None
    rng_ptr,  # (2,) int64 or None
    out_ptr,  # (B, N, D), written; None without a branch
    ln_ptr,  # (normed, N, D), written; None: no norm
    norm_weight_ptr,  # (D,) or None
    norm_bias_ptr,  # (D,) or None
    norm_slots_ptr,  # (B,) int32: which image of ln is the sample's, -1 none; or None
    mean_ptr,  # (normed, N) fp32, written
    rstd_ptr,  # (normed, N) fp32, written
    num_rows,  # B N
    N,
    scale,
    eps,
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
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = rows < num_rows
    sample = rows // N
    token = (rows - sample * N).to(tl.int64)
    row_D = rows.to(tl.int64)[:, None] * D
    normed = in_range
    ln_sample = sample
    if norm_slots_ptr is not None:
        ln_sample = tl.load(norm_slots_ptr + sample, mask=in_range, other=-1)
        normed = ln_sample >= 0
    ln_row = ln_sample.to(tl.int64) * N + token
    x_rows = x_ptr + (sample.to(tl.int64) * x_stride_b + token * x_stride_n)
    read = in_range
    if branch_ptr is None:
        read = normed
    else:
        slot, _, factor = sample_factor(
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
        branch_rows = branch_ptr + (slot * branch_stride_b + token * branch_stride_n)

    xs = ()
    branches = ()
    for i in tl.static_range(NUM_CHUNKS):
        cols = columns(i, CHUNK)
        mask = there(read, i, D, CHUNK)
        xs = xs + (tl.load(x_rows[:, None] + cols, mask=mask, other=0.0),)
        if branch_ptr is not None:
            mask = there(factor != 0.0, i, D, CHUNK)  # what is dropped is not read
            branches = branches + (tl.load(branch_rows[:, None] + cols, mask=mask, other=0.0),)

    total = tl.zeros((ROWS, CHUNK), tl.float32)
    values = ()
    for i in tl.static_range(NUM_CHUNKS):
        cols = columns(i, CHUNK)
        value = xs[i].to(tl.float32)
        if branch_ptr is not None:
            term = branches[i].to(tl.float32)
            if bias_ptr is not None:
                term += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            if HAS_DROPOUT:
                term = drop_elements(term, rng_ptr, rows, dropout_threshold, i, ROWS, CHUNK)
            if gamma_ptr is not None:
                term *= tl.load(gamma_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            stored = (value + factor[:, None] * term).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row_D + cols, stored, mask=there(in_range, i, D, CHUNK))
            value = stored.to(tl.float32)  # the norm is that of what is stored
        total += value
        values = values + (value,)

    if ln_ptr is not None:
        mean = tl.sum(total, axis=1) / D
        squares = tl.zeros((ROWS, CHUNK), tl.float32)
        for i in tl.static_range(NUM_CHUNKS):
            centred = tl.where(there(read, i, D, CHUNK), values[i] - mean[:, None], 0.0)
            squares += centred * centred
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps)
        tl.store(mean_ptr + ln_row, mean, mask=normed)
        tl.store(rstd_ptr + ln_row, rstd, mask=normed)
        for i in tl.static_range(NUM_CHUNKS):
            cols = columns(i, CHUNK)
            ln = (values[i] - mean[:, None]) * rstd[:, None]
            if norm_weight_ptr is not None:
                ln *= tl.load(norm_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            if norm_bias_ptr is not None:
                ln += tl.load(norm_bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            ln = ln.to(ln_ptr.dtype.element_ty)
            tl.store(ln_ptr + ln_row[:, None] * D + cols, ln, mask=there(normed, i, D, CHUNK))


def _tiles(D: int) -> dict[str, int]:
    """For 192, 384, 768: three chunks; 1024: four; 1280, 1408: five, six; above 1536 more warps."""
    num_warps = 1
    while num_warps * 1536 < D:
        num_warps *= 2
    chunk = best_chunk(D, widest=256 * num_warps, most=6)
    num_chunks = cdiv(D, chunk)
    rows_of_a_thread = 2 if num_chunks <= 4 else 1
    rows = 256 * num_warps // chunk * rows_of_a_thread
    return {"num_warps": num_warps, "ROWS": rows, "CHUNK": chunk, "NUM_CHUNKS": num_chunks}


def scale_residual_forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_slots: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_slots: Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    drop_path_p: float,
    rng: Tensor | None,
    eps: float,
    out: Tensor | None,
    ln: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Write out, ln, mean and rstd, those that are tensors; shapes as the kernel's arguments say.

    Rows of x and branch are contiguous, out and ln wholly.
    """
    B, N, D = x.shape
    tiles = _tiles(D)
    launch(
        _scale_residual_forward_kernel,
        (cdiv(B * N, tiles["ROWS"]),),
        on=x,
        x_ptr=x,
        x_stride_b=x.stride(0),
        x_stride_n=x.stride(1),
        branch_ptr=branch,
        branch_stride_b=0 if branch is None else branch.stride(0),
        branch_stride_n=0 if branch is None else branch.stride(1),
        bias_ptr=bias,
        gamma_ptr=gamma,
        keep_ptr=keep,
        branch_slots_ptr=branch_slots,
        rng_ptr=rng,
        out_ptr=out,
        ln_ptr=ln,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        norm_slots_ptr=norm_slots,
        mean_ptr=mean,
        rstd_ptr=rstd,
        num_rows=B * N,
        N=N,
        scale=scale / ((1 - dropout_p) * (1 - drop_path_p)),
        eps=eps,
        dropout_threshold=threshold_of(dropout_p),
        drop_path_threshold=threshold_of(drop_path_p),
        D=D,
        HAS_DROPOUT=dropout_p > 0,
        HAS_DROP_PATH=drop_path_p > 0,
        DROP_PATH_QUAD=DROP_PATH_QUAD,
        **tiles,
    )
