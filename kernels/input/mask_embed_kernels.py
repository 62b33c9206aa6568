"""The kernels of `mask_embed`, forward and backward, and what launches them.

A program of the backward takes one position after another, through a share of the images, and
keeps its share of the sums in registers. Formulas, shapes and types: `mask_embed`.
"""

# ruff: noqa: RUF005 - Triton takes no starred tuples

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, contiguous_rows, gpu_of, launch, tl, triton
from beit_fast.kernels.rows import best_chunk, columns, load_vector, there


@triton.jit
def _mask_embed_forward_kernel(
    patches_ptr,  # (B, L, D)
    patches_stride_b,
    patches_stride_l,
    mask_ptr,  # (B, L) uint8, or None
    cls_token_ptr,  # (D,)
    mask_token_ptr,  # (D,), or None
    pos_ptr,  # (N, D), or None
    out_ptr,  # (B, N, D), written
    num_rows,  # B N
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = rows < num_rows
    sample = rows // N
    token = rows - sample * N
    is_cls = token == 0
    shown = in_range & (token > 0)
    if mask_ptr is not None:
        at = sample.to(tl.int64) * (N - 1) + token - 1
        hidden = tl.load(mask_ptr + at, mask=shown, other=0) != 0
        shown = shown & (hidden == 0)
    patch_rows = patches_ptr + (
        sample.to(tl.int64) * patches_stride_b + (token - 1).to(tl.int64) * patches_stride_l
    )
    values = ()  # all loads before the first store, which no load moves past
    for i in tl.static_range(NUM_CHUNKS):
        mask = there(shown, i, D, CHUNK)  # what is hidden is not read
        values = values + (tl.load(patch_rows[:, None] + columns(i, CHUNK), mask=mask, other=0.0),)
    positions = ()
    if pos_ptr is not None:
        for i in tl.static_range(NUM_CHUNKS):
            at = token.to(tl.int64)[:, None] * D + columns(i, CHUNK)
            mask = there(in_range, i, D, CHUNK)
            positions = positions + (tl.load(pos_ptr + at, mask=mask, other=0.0),)
    for i in tl.static_range(NUM_CHUNKS):
        value = values[i].to(tl.float32)
        if mask_ptr is not None:
            mask_token = load_vector(mask_token_ptr, i, D, CHUNK)
            value = tl.where(hidden[:, None], mask_token, value)
        value = tl.where(is_cls[:, None], load_vector(cls_token_ptr, i, D, CHUNK), value)
        if pos_ptr is not None:
            value += positions[i].to(tl.float32)
        out = out_ptr + rows.to(tl.int64)[:, None] * D + columns(i, CHUNK)
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=there(in_range, i, D, CHUNK))


@triton.jit
def _mask_embed_backward_kernel(
    dout_ptr,  # (B, N, D)
    dout_stride_b,
    dout_stride_n,
    mask_ptr,  # (B, L) uint8, or None
    dpatches_ptr,  # (B, L, D), written; or None
    dmask_token_ptr,  # (programs, D) fp32, written: each program's share; or None
    dpos_ptr,  # (shares, N, D) fp32, written: the share of some images; or None
    B,
    N,
    images,  # of a share
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    """A program takes one position after another, through a share of the images."""
    hidden_sums = ()
    for _i in tl.static_range(NUM_CHUNKS):
        hidden_sums = hidden_sums + (tl.zeros((ROWS, CHUNK), tl.float32),)
    share = tl.program_id(1)
    begin = share * images
    end = tl.minimum(begin + images, B)
    first = tl.program_id(0)
    if dpos_ptr is None:
        first += 1  # nobody asks for [CLS] here
    for position in tl.range(first, N, tl.num_programs(0)):
        token = tl.cast(position, tl.int32)
        sums = ()
        for _i in tl.static_range(NUM_CHUNKS):
            sums = sums + (tl.zeros((ROWS, CHUNK), tl.float32),)
        for start in tl.range(begin, end, ROWS):
            sample = tl.cast(start, tl.int32) + tl.arange(0, ROWS)
            in_range = sample < end
            sample = sample.to(tl.int64)
            is_patch = in_range & (token > 0)
            patch = sample * (N - 1) + token - 1
            shown = is_patch
            read = in_range
            if mask_ptr is not None:
                hidden = tl.load(mask_ptr + patch, mask=is_patch, other=0) != 0
                shown = is_patch & (hidden == 0)
                if dmask_token_ptr is None and dpos_ptr is None:
                    read = shown
            dout_rows = dout_ptr + (
                sample * dout_stride_b + tl.cast(token, tl.int64) * dout_stride_n
            )
            douts = ()
            for i in tl.static_range(NUM_CHUNKS):
                mask = there(read, i, D, CHUNK)
                at = dout_rows[:, None] + columns(i, CHUNK)
                douts = douts + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
            new_sums = ()
            new_hidden_sums = ()
            for i in tl.static_range(NUM_CHUNKS):
                dpatch = tl.where(shown[:, None], douts[i], 0.0)
                if dpatches_ptr is not None:
                    at = dpatches_ptr + patch[:, None] * D + columns(i, CHUNK)
                    value = dpatch.to(dpatches_ptr.dtype.element_ty)
                    tl.store(at, value, mask=there(is_patch, i, D, CHUNK))
                if dpos_ptr is not None:
                    new_sums = new_sums + (sums[i] + douts[i],)
                if dmask_token_ptr is not None:
                    masked = tl.where(hidden[:, None], douts[i], 0.0)
                    new_hidden_sums = new_hidden_sums + (hidden_sums[i] + masked,)
            if dpos_ptr is not None:
                sums = new_sums
            if dmask_token_ptr is not None:
                hidden_sums = new_hidden_sums
        if dpos_ptr is not None:
            dpos_row = dpos_ptr + (tl.cast(share, tl.int64) * N + token) * D
            for i in tl.static_range(NUM_CHUNKS):
                cols = i * CHUNK + tl.arange(0, CHUNK)
                tl.store(dpos_row + cols, tl.sum(sums[i], axis=0), mask=cols < D)
    if dmask_token_ptr is not None:
        program = share * tl.num_programs(0) + tl.program_id(0)
        for i in tl.static_range(NUM_CHUNKS):
            cols = i * CHUNK + tl.arange(0, CHUNK)
            at = dmask_token_ptr + tl.cast(program, tl.int64) * D + cols
            tl.store(at, tl.sum(hidden_sums[i], axis=0), mask=cols < D)


def _tiles(D: int) -> dict[str, int]:
    """For 192, 384, 768: three chunks, two warps; 1024: two chunks, 1280, 1408: three, four warps.

    24 columns of a sum in a thread at most.
    """
    num_warps = 2
    while num_warps * 384 < D:
        num_warps *= 2
    chunk = best_chunk(D, widest=128 * num_warps, most=3)
    rows = 256 * num_warps // chunk
    return {"num_warps": num_warps, "ROWS": rows, "CHUNK": chunk, "NUM_CHUNKS": cdiv(D, chunk)}


def mask_embed_forward(
    patches: Tensor,
    cls_token: Tensor,
    mask_token: Tensor | None,
    mask: Tensor | None,
    pos: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """out (B, N, D) by the kernel."""
    B, L, D = patches.shape
    patches = contiguous_rows(patches)
    out = patches.new_empty((B, L + 1, D), dtype=dtype)
    tiles = _tiles(D)
    launch(
        _mask_embed_forward_kernel,
        (cdiv(B * (L + 1), tiles["ROWS"]),),
        on=patches,
        patches_ptr=patches,
        patches_stride_b=patches.stride(0),
        patches_stride_l=patches.stride(1),
        mask_ptr=_bytes(mask),
        cls_token_ptr=cls_token.contiguous(),
        mask_token_ptr=None if mask is None else mask_token.contiguous(),
        pos_ptr=None if pos is None else pos.contiguous(),
        out_ptr=out,
        num_rows=B * (L + 1),
        N=L + 1,
        D=D,
        **tiles,
    )
    return out


def mask_embed_backward(
    dout: Tensor, mask: Tensor | None, dtype: torch.dtype, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of patches (in `dtype`), cls_token, mask_token and pos (fp32), by the kernel.

    None where `needs` says that it is not wanted.
    """
    B, N, D = dout.shape
    needs_patches, needs_cls, needs_mask_token, needs_pos = needs
    dout = contiguous_rows(dout)
    tiles = _tiles(D)
    resident = _num_resident(dout, tiles["num_warps"])
    positions = N if needs_pos else N - 1
    per_share = cdiv(B, max(min(resident // max(positions, 1), cdiv(B, tiles["ROWS"])), 1))
    grid = min(positions, resident), cdiv(B, max(per_share, 1))
    dpatches = dout.new_empty((B, N - 1, D), dtype=dtype) if needs_patches else None
    sums = {"dtype": torch.float32, "device": dout.device}
    dpos = torch.empty((grid[1], N, D), **sums) if needs_pos else None
    dmask_token = torch.empty((grid[0] * grid[1], D), **sums) if needs_mask_token else None
    if needs_patches or needs_mask_token or needs_pos:
        launch(
            _mask_embed_backward_kernel,
            grid,
            on=dout,
            dout_ptr=dout,
            dout_stride_b=dout.stride(0),
            dout_stride_n=dout.stride(1),
            mask_ptr=_bytes(mask),
            dpatches_ptr=dpatches,
            dmask_token_ptr=dmask_token,
            dpos_ptr=dpos,
            B=B,
            N=N,
            images=per_share,
            D=D,
            **tiles,
        )
    dpos = None if dpos is None else dpos.sum(dim=0)
    dcls = None
    if needs_cls:
        dcls = dout[:, 0].sum(dim=0, dtype=torch.float32) if dpos is None else dpos[0].clone()
    return [dpatches, dcls, None if dmask_token is None else dmask_token.sum(dim=0), dpos]


def _num_resident(tensor: Tensor, num_warps: int) -> int:
    """Programs that run at a time, at about 120 registers a thread."""
    return gpu_of(tensor).num_sms * max(65536 // (120 * 32 * num_warps), 1)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
