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

import torch
from torch import Tensor

from beit_fast.kernels._triton import exporting, launch_obstacle
from beit_fast.kernels.arguments import check_backend, check_floating, run_or_torch, triton_or_torch
from beit_fast.kernels.input.mask_embed_kernels import mask_embed_backward, mask_embed_forward
from beit_fast.kernels.registration import or_empty

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
    arguments = (patches, cls_token, mask_token, mask, pos, dtype)
    if _resolve(backend, patches, dtype) == "torch":
        return mask_embed_torch(*arguments)
    return run_or_torch(
        "mask_embed",
        lambda: mask_embed_forward(*arguments),
        lambda: mask_embed_torch(*arguments),
        backend=backend,
    )


@torch.library.impl("beit_fast::mask_embed_backward", "default")
def _mask_embed_backward(dout, mask, dtype, needs, backend):
    arguments = (dout, mask, dtype, needs)
    with torch.autocast(dout.device.type, enabled=False):
        if _resolve(backend, dout, dtype) == "torch":
            return or_empty(dout, mask_embed_backward_torch(*arguments))
        gradients = run_or_torch(
            "mask_embed",
            lambda: mask_embed_backward(*arguments),
            lambda: mask_embed_backward_torch(*arguments),
            backend=backend,
        )
        return or_empty(dout, gradients)


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
    return or_empty(dout, gradients)


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
    check_backend(backend, BACKENDS)
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
    obstacle = launch_obstacle(x, x.dtype, dtype, operator="mask_embed")
    if x.shape[2] > WIDEST:
        obstacle = f"the kernels take rows of up to {WIDEST} channels, not {x.shape[2]}"
    if x.shape[0] * (x.shape[1] + 1) >= MOST_ROWS:
        obstacle = f"the kernels take fewer than {MOST_ROWS} rows"
    return triton_or_torch("mask_embed", backend, obstacle)


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
