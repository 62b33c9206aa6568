"""Cross-entropy of rows of logits, and its gradient written over them.

    lse  = ln sum_v exp logits[v];  p[v] = exp(logits[v] - lse)
    loss = (1 - s) (lse - logits[t]) + s (lse - mean_v logits[v]) + z lse^2
    dlogits[v] = g (p[v] (1 + 2 z lse) - s / V - (1 - s) [v = t])

with s = label_smoothing, z = z_loss, t = target, and g the gradient of the row's loss, 1 if None.

Shapes    logits (C, V), each row with the memory up to the next its own; index, target (C,)
          integers; loss, correct (C,)
Types     logits and dlogits in any floating dtype; all arithmetic in fp32
Padding   index -1: loss 0, not correct, dlogits 0. A target outside 0 .. V - 1 reads nothing and
          makes loss and dlogits NaN; logits that are not finite do so by themselves
Correct   the target is the argmax; among equal logits the lowest v is, as for torch.argmax
Cost      the loss reads C V elements; the gradient reads and writes them, and adds up the columns
          on the way, which is the gradient of a bias: with a second pass over dlogits for that,
          one kernel for loss and gradient would move as much. Logits of a chunk stay in the L2
          cache
Source    z-loss: PaLM arXiv:2204.02311, section 5
"""

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, launch, tl, triton

SLAB_ROWS = 128  # rows whose columns one program adds up
LOG2E = 1.4426950408889634


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (C, V)
    logits_stride,  # V or more: what is between is read and thrown away
    index_ptr,  # (C,) integers
    target_ptr,  # (C,) integers
    loss_ptr,  # (C,) fp32, written
    highest_ptr,  # (C,) fp32, written: the largest logit
    total_ptr,  # (C,) fp32, written: the sum of exp(logit - highest)
    correct_ptr,  # (C,) int32, written
    V,
    label_smoothing,
    z_loss,
    HAS_SMOOTHING: tl.constexpr,
    LOG2E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    loss = 0.0
    correct = 0
    highest = tl.full((), 0.0, tl.float32)
    total = tl.full((), 1.0, tl.float32)
    if tl.load(index_ptr + row) != -1:
        row_ptr = logits_ptr + row * logits_stride
        target = tl.load(target_ptr + row).to(tl.int64)
        known = (target >= 0) & (target < V)
        score = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        highest = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        plain = tl.full((), 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            cols = tl.cast(start, tl.int32) + tl.arange(0, BLOCK)
            tile = tl.load(row_ptr + cols, mask=cols < logits_stride, other=0.0).to(tl.float32)
            tile = tl.where(cols < V, tile, float("-inf"))
            higher = tl.maximum(highest, tl.max(tile, axis=0))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            parts = tl.sum(tl.exp2((tile - shift) * LOG2E), axis=0)
            total = total * tl.exp2((highest - shift) * LOG2E) + parts
            highest = higher
            if HAS_SMOOTHING:
                plain += tl.sum(tl.where(cols < V, tile, 0.0), axis=0)
        log_total = tl.log2(total) / LOG2E
        lse = highest + log_total
        loss = (highest - score) + log_total
        if HAS_SMOOTHING:
            loss += label_smoothing * (score - plain / V)
        loss += z_loss * lse * lse
        if score >= highest:  # a logit before the target may be as high
            before = tl.full((), float("-inf"), tl.float32)
            end = target.to(tl.int32)
            for start in range(0, end, BLOCK):
                cols = tl.cast(start, tl.int32) + tl.arange(0, BLOCK)
                tile = tl.load(row_ptr + cols, mask=cols < logits_stride, other=0.0).to(tl.float32)
                before = tl.maximum(before, tl.max(tl.where(cols < end, tile, before), axis=0))
            correct = ((before < highest) & (loss == loss)).to(tl.int32)
    tl.store(loss_ptr + row, loss)
    tl.store(highest_ptr + row, highest)
    tl.store(total_ptr + row, total)
    tl.store(correct_ptr + row, correct)


@triton.jit
def _cross_entropy_gradient_kernel(
    logits_ptr,  # (C, V), overwritten with dlogits
    logits_stride,  # V or more: what is between becomes 0
    index_ptr,  # (C,) integers
    target_ptr,  # (C,) integers
    highest_ptr,  # (C,) fp32
    total_ptr,  # (C,) fp32
    dloss_ptr,  # (C,) fp32, or None: 1
    dbias_ptr,  # (slabs, V) fp32: sums over the rows of a slab; or None
    num_rows,  # C
    V,
    label_smoothing,
    z_loss,
    ACCUMULATES: tl.constexpr,  # add to dbias
    LOG2E: tl.constexpr,
    SLAB: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, SLAB, ROWS):
        first = tl.program_id(1) * SLAB + tl.cast(start, tl.int32)
        row = first + tl.arange(0, ROWS)[:, None]
        in_range = row < num_rows
        real = tl.load(index_ptr + row, mask=in_range, other=-1) != -1
        target = tl.load(target_ptr + row, mask=in_range, other=-1)
        highest = tl.load(highest_ptr + row, mask=in_range, other=0.0)
        total = tl.load(total_ptr + row, mask=in_range, other=1.0)
        lse = highest + tl.log2(total) / LOG2E
        scale = tl.full((ROWS, 1), 1.0, tl.float32)
        if dloss_ptr is not None:
            scale = tl.load(dloss_ptr + row, mask=in_range, other=0.0)
        scale = tl.where((target >= 0) & (target < V), scale, float("nan"))
        at = logits_ptr + row.to(tl.int64) * logits_stride + cols
        there = in_range & (cols < logits_stride)
        tile = tl.load(at, mask=there, other=0.0).to(tl.float32)
        tile = tl.where(cols < V, tile, float("-inf"))
        dtile = tl.exp2((tile - highest) * LOG2E) * (scale * (1 + 2 * z_loss * lse) / total)
        dtile -= scale * label_smoothing / V
        dtile = tl.where(cols == target, dtile - scale * (1 - label_smoothing), dtile)
        dtile = tl.where(real & (cols < V), dtile, 0.0)
        tl.store(at, dtile.to(logits_ptr.dtype.element_ty), mask=there)
        acc += dtile
    if dbias_ptr is not None:
        sums = tl.sum(acc, axis=0)[None, :]
        at_bias = dbias_ptr + tl.program_id(1).to(tl.int64) * V + cols
        if ACCUMULATES:
            sums += tl.load(at_bias, mask=cols < V, other=0.0)
        tl.store(at_bias, sums, mask=cols < V)


def cross_entropy_(
    logits: Tensor,
    index: Tensor,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    *,
    loss: Tensor,
    correct: Tensor,
    with_gradient: bool = False,
    dloss: Tensor | None = None,
    dbias: Tensor | None = None,
    accumulates: bool = False,
) -> None:
    """Write loss (C,) fp32 and correct (C,) int32, by kernels; with the gradient, dlogits too.

    dlogits take the place of the logits. dloss (C,) fp32; dbias (slabs, V) fp32, one slab for each
    128 rows or more of them, gets or has added the sums over the rows of each slab.
    """
    num_rows, V = logits.shape
    highest, total = torch.empty_like(loss), torch.empty_like(loss)
    block = min(triton.next_power_of_2(V), 8192)
    rows = {
        "logits_ptr": logits,
        "logits_stride": logits.stride(0),
        "index_ptr": index,
        "target_ptr": target,
        "highest_ptr": highest,
        "total_ptr": total,
        "V": V,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "LOG2E": LOG2E,
    }
    launch(
        _cross_entropy_kernel,
        (num_rows,),
        on=logits,
        num_warps=min(max(block // 1024, 1), 8),
        loss_ptr=loss,
        correct_ptr=correct,
        HAS_SMOOTHING=label_smoothing != 0,
        BLOCK=block,
        **rows,
    )
    if not with_gradient:
        return
    launch(
        _cross_entropy_gradient_kernel,
        (cdiv(V, 128), cdiv(num_rows, SLAB_ROWS)),
        on=logits,
        dloss_ptr=dloss,
        dbias_ptr=dbias,
        num_rows=num_rows,
        ACCUMULATES=accumulates,
        SLAB=SLAB_ROWS,
        ROWS=32,
        COLS=128,
        **rows,
    )


def cross_entropy_torch_(
    logits: Tensor,
    index: Tensor,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    *,
    loss: Tensor,
    correct: Tensor,
    with_gradient: bool = False,
    dloss: Tensor | None = None,
    dbias: Tensor | None = None,
    accumulates: bool = False,
) -> None:
    """`cross_entropy_` in torch, on any device; dbias has one slab. The logits are used up.

    16-bit logits are widened, a chunk at a time; others are overwritten where they are.
    """
    V = logits.shape[1]
    padded = index == -1
    unknown = (target < 0) | (target >= V)
    wide = logits.to(loss.dtype)
    targets = target.masked_fill(unknown, 0).long()[:, None]
    score = wide.gather(1, targets)[:, 0]
    plain = wide.mean(dim=1) if label_smoothing else None
    highest, argmax = wide.max(dim=1, keepdim=True)
    torch.softmax(wide, dim=1, out=wide)
    # The largest weight is at least 1 / V: its logarithm is as good as that of the sum.
    log_total = wide.gather(1, argmax)[:, 0].log_().neg_()
    highest = highest[:, 0]
    torch.add(highest - score, log_total, out=loss)
    if label_smoothing:
        loss.add_(score - plain, alpha=label_smoothing)
    if z_loss:
        loss.add_((highest + log_total).square(), alpha=z_loss)
    loss.masked_fill_(unknown, torch.nan).masked_fill_(padded, 0)
    correct.copy_((argmax == targets)[:, 0] & ~padded & ~loss.isnan())
    if not with_gradient:
        return
    scale = torch.ones_like(loss) if dloss is None else dloss.clone()
    scale.masked_fill_(unknown, torch.nan).masked_fill_(padded, 0)
    factor = scale * (1 + 2 * z_loss * (highest + log_total)) if z_loss else scale
    # On a CPU no one waits for the answer, and a pass over the logits is saved.
    if wide.device.type != "cpu" or not bool((factor == 1).all()):
        wide.mul_(factor[:, None]).masked_fill_(padded[:, None], 0)
    if label_smoothing:
        wide.sub_(scale[:, None], alpha=label_smoothing / V)
    wide.scatter_add_(1, targets, (label_smoothing - 1) * scale[:, None])
    if dbias is not None:
        sums = wide.sum(dim=0)
        dbias[0].add_(sums) if accumulates else dbias[0].copy_(sums)
    if wide is not logits:
        logits.copy_(wide)
