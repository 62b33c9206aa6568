"""What enters the first block, in one pass: patches, mask token, [CLS] and positions.

    out[b,0]   = cls_token + pos[0]
    out[b,1+l] = (mask_token where mask[b,l] else patches[b,l]) + pos[1+l]

Shapes    patches (B, L, D); mask (B, L) bool; cls_token, mask_token (D,); pos (N, D), N = L + 1;
          out (B, N, D). The mask goes with its token; positions may be absent
Types     each bf16, fp16, fp32 (on a CPU fp64), and so is out; arithmetic and sums in fp32
Backward  dpatches = dout, 0 where hidden;  dpos = sum_b dout;  dcls_token = sum_b dout[b,0];
          dmask_token = sum of dout over the hidden: added up in the same pass, by shares, in a
          fixed order. What needs no gradient is not computed. Differentiable again
Cost      bytes per element, bf16 patches and fp32 out: forward reads patches, writes out: 6, less
          what is hidden; backward reads dout, writes dpatches: 6. Bound by memory
Source    arXiv:2106.08254, 2.1 and 2.3
"""

# ruff: noqa: RUF005 - Triton takes no starred tuples

import torch
from torch import Tensor

from beit_fast.kernels._triton import (
    cdiv,
    check_floating,
    exporting,
    gpu_of,
    launch,
    launch_obstacle,
    tl,
    triton,
    warn_once,
)
from beit_fast.kernels.residual.forward import best_chunk, columns, there

BACKENDS = ("triton", "torch")
WIDEST = 8192
MOST_ROWS = 2**30  # rows are counted in int32


def mask_embed_reference(
    patches: Tensor,
    cls_token: Tensor,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
    pos: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formulas above, transcribed."""
    x_BLD = patches
    if mask is not None:
        x_BLD = torch.where(mask[:, :, None], mask_token, x_BLD)
    x_BND = torch.cat((cls_token.expand(x_BLD.shape[0], 1, -1), x_BLD), dim=1)
    x_BND = x_BND if pos is None else x_BND + pos
    return x_BND if dtype is None else x_BND.to(dtype)


@triton.jit
def _load_vector(
    ptr,  # (D,)
    i: tl.constexpr,  # number of the chunk
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    cols = columns(i, CHUNK)
    return tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32)


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
            mask_token = _load_vector(mask_token_ptr, i, D, CHUNK)
            value = tl.where(hidden[:, None], mask_token, value)
        value = tl.where(is_cls[:, None], _load_vector(cls_token_ptr, i, D, CHUNK), value)
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
    patches = patches if patches.stride(2) == 1 else patches.contiguous()
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
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
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


def mask_embed_torch(
    patches: Tensor,
    cls_token: Tensor,
    mask_token: Tensor | None,
    mask: Tensor | None,
    pos: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`mask_embed_forward` in torch, on any device, written in place."""
    B, L, D = patches.shape
    present = [t.dtype for t in (patches, cls_token, mask_token, pos) if t is not None]
    wide = present[0]
    for each in present:
        wide = torch.promote_types(wide, each)
    out = patches.new_empty((B, L + 1, D), dtype=wide)
    out[:, 0] = cls_token
    if mask is None:
        out[:, 1:] = patches
    else:
        shown, hidden = patches.to(wide), mask_token.to(wide)
        torch.where(mask[:, :, None], hidden, shown, out=out[:, 1:])
    if pos is not None:
        out += pos
    return out.to(dtype)


def _sum_hidden(dout_BND: Tensor, mask_BL: Tensor) -> Tensor:
    """Sum over the hidden patches, (D,): by products, which make no copy of dout. Each adds up 32
    rows; one over all rows loses up to four times as much to rounding as torch's sum does."""
    hidden_BN = torch.nn.functional.pad(mask_BL, (1, 0))
    place_N = torch.arange(hidden_BN.shape[1], device=mask_BL.device) // 32
    piece_P = torch.arange(-(-len(place_N) // 32), device=mask_BL.device)
    pieces_BPN = hidden_BN[:, None] & (piece_P[:, None] == place_N)
    return torch.bmm(pieces_BPN.to(dout_BND.dtype), dout_BND).sum((0, 1))


def mask_embed_backward_torch(
    dout: Tensor, mask: Tensor | None, dtype: torch.dtype, needs: list[bool]
) -> list[Tensor | None]:
    """`mask_embed_backward` in torch, on any device; sums in fp32 or better."""
    needs_patches, needs_cls, needs_mask_token, needs_pos = needs
    dpatches = dcls = dmask_token = dpos = None
    wide = torch.promote_types(dout.dtype, torch.float32)
    if needs_pos:
        dpos = dout.sum(dim=0, dtype=wide).contiguous()
    if needs_cls:
        dcls = dout[:, 0].sum(dim=0, dtype=wide)
    if needs_mask_token:
        dmask_token = _sum_hidden(dout.to(wide), mask)
    if needs_patches:
        B, N, D = dout.shape
        dpatches = dout.new_empty((B, N - 1, D), dtype=dtype).copy_(dout[:, 1:])
        if mask is not None:
            dpatches.masked_fill_(mask[:, :, None], 0)
    return [dpatches, dcls, dmask_token, dpos]


torch.library.define(
    "beit_fast::mask_embed",
    "(Tensor patches, Tensor cls_token, Tensor? mask_token, Tensor? mask, Tensor? pos, "
    "ScalarType dtype, str backend) -> Tensor",
)
# `needs` says which of dpatches, dcls_token, dmask_token, dpos are wanted; others come back empty.
torch.library.define(
    "beit_fast::mask_embed_backward",
    "(Tensor dout, Tensor? mask, ScalarType dtype, bool[] needs, str backend) "
    "-> (Tensor dpatches, Tensor dcls_token, Tensor dmask_token, Tensor dpos)",
)


@torch.library.impl("beit_fast::mask_embed", "default")
def _mask_embed(patches, cls_token, mask_token, mask, pos, dtype, backend):
    on_triton = _resolve(backend, patches, dtype) == "triton"
    function = mask_embed_forward if on_triton else mask_embed_torch
    return function(patches, cls_token, mask_token, mask, pos, dtype)


@torch.library.impl("beit_fast::mask_embed_backward", "default")
def _mask_embed_backward(dout, mask, dtype, needs, backend):
    on_triton = _resolve(backend, dout, dtype) == "triton"
    function = mask_embed_backward if on_triton else mask_embed_backward_torch
    with torch.autocast(dout.device.type, enabled=False):
        return _or_empty(dout, function(dout, mask, dtype, needs))


@torch.library.register_fake("beit_fast::mask_embed")
def _(patches, cls_token, mask_token, mask, pos, dtype, backend):
    B, L, D = patches.shape
    return patches.new_empty((B, L + 1, D), dtype=dtype)


@torch.library.register_fake("beit_fast::mask_embed_backward")
def _(dout, mask, dtype, needs, backend):
    B, N, D = dout.shape
    wide = torch.promote_types(dout.dtype, torch.float32)
    kinds = [((B, N - 1, D), dtype), ((D,), wide), ((D,), wide), ((N, D), wide)]
    gradients = [
        dout.new_empty(shape, dtype=kind) if needed else None
        for (shape, kind), needed in zip(kinds, needs, strict=True)
    ]
    return _or_empty(dout, gradients)


def _or_empty(like: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(tensors[3])  # the mask
    del tensors[3]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]


def _differentiate(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    patches, cls_token, mask_token, _, pos, *_ = ctx.needs_input_grad
    needs = [patches, cls_token, mask_token and mask is not None, pos]
    results = torch.ops.beit_fast.mask_embed_backward(dout, mask, ctx.dtypes[0], needs, ctx.backend)
    gradients = [
        result.to(dtype) if needed else None
        for result, dtype, needed in zip(results, ctx.dtypes, needs, strict=True)
    ]
    return *gradients[:3], None, gradients[3], None, None


def _save_backward(ctx, inputs, output) -> None:
    dout, mask, _, ctx.needs, ctx.backend = inputs
    ctx.save_for_backward(mask)
    ctx.shape, ctx.dtype = dout.shape, dout.dtype
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, *gradients: Tensor | None):
    # All are linear in dout: its gradient is the sequence of theirs.
    B, N, D = ctx.shape
    (mask,) = ctx.saved_tensors
    given = zip(gradients, ctx.needs, strict=True)
    patches, cls_token, mask_token, pos = (g if needed else None for g, needed in given)
    some = next((g for g in (patches, cls_token, mask_token, pos) if g is not None), None)
    if some is None:
        return (None,) * 5
    patches = some.new_zeros((B, N - 1, D), dtype=ctx.dtype) if patches is None else patches
    cls_token = some.new_zeros(D) if cls_token is None else cls_token
    if mask is not None and mask_token is None:
        mask_token = some.new_zeros(D)
    inputs = (patches, cls_token, mask_token, mask, pos)
    ddout = torch.ops.beit_fast.mask_embed(*inputs, ctx.dtype, ctx.backend)
    return ddout, None, None, None, None


torch.library.register_autograd("beit_fast::mask_embed", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "beit_fast::mask_embed_backward", _differentiate_backward, setup_context=_save_backward
)


def mask_embed(
    patches: Tensor,
    cls_token: Tensor,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
    pos: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sequence (B, N, D), N = L + 1, [CLS] first, in one pass over memory.

    patches (B, L, D); cls_token (D,); mask bool (B, L), True where hidden, and mask_token (D,), or
    neither; pos (N, D) or None; `dtype` else the widest of the inputs'. `backend` "triton" is the
    default on CUDA, "torch" elsewhere. Raises ValueError where shapes do not fit.
    """
    _check(patches, cls_token, mask_token, mask, pos)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend is {backend!r}: pass one of {', '.join(BACKENDS)}, or None")
    mask_token = None if mask is None else mask_token
    if dtype is None:
        dtype = patches.dtype
        for tensor in (cls_token, mask_token, pos):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    if exporting() and backend is None:
        return mask_embed_reference(patches, cls_token, mask_token, mask, pos).to(dtype)
    return torch.ops.beit_fast.mask_embed(
        patches, cls_token, mask_token, mask, pos, dtype, backend or ""
    )


def _resolve(backend: str, x: Tensor, dtype: torch.dtype) -> str:
    """The wish, or the kernels on a GPU if they can, with a warning if they cannot."""
    if backend == "torch" or (backend == "" and x.device.type == "cpu"):
        return "torch"
    obstacle = launch_obstacle(x, x.dtype, dtype)
    if x.shape[2] > WIDEST:
        obstacle = f"the kernels take rows of up to {WIDEST} channels, not {x.shape[2]}"
    if x.shape[0] * (x.shape[1] + 1) >= MOST_ROWS:
        obstacle = f"the kernels take fewer than {MOST_ROWS} rows"
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run here: {obstacle}; pass backend=None")
    warn_once(f"mask_embed runs on torch, slower: {obstacle}")
    return "torch"


def _check(patches, cls_token, mask_token, mask, pos) -> None:
    if patches.ndim != 3:
        raise ValueError(f"the patches are {tuple(patches.shape)}: pass (B, L, D)")
    check_floating(patches=patches, cls_token=cls_token, mask_token=mask_token, pos=pos)
    B, L, D = patches.shape
    for name, vector in {"cls_token": cls_token, "mask_token": mask_token}.items():
        if vector is not None and vector.shape != (D,):
            raise ValueError(f"{name} is {tuple(vector.shape)}: pass ({D},), one per channel")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, L)):
        raise ValueError(
            f"the mask is {mask.dtype} {tuple(mask.shape)}: pass bool {(B, L)}, True where a patch "
            "is hidden"
        )
    if mask is not None and mask_token is None:
        raise ValueError("a mask came without a mask_token: pass both or neither")
    if pos is not None and pos.shape != (L + 1, D):
        raise ValueError(f"pos is {tuple(pos.shape)}: pass {(L + 1, D)}, [CLS] first")
