"""The loss of listed rows and all its gradients, some rows of logits at a time.

What bounds the memory of `linear_cross_entropy`, whose formulas and types these are: each chunk is
multiplied, turned into its loss and the gradient of its logits, and multiplied back, in one buffer.
"""

import contextlib

import torch
from torch import Tensor

from beit_fast.kernels._triton import Gpu, cdiv, gpu_of
from beit_fast.kernels.head.gather_norm import gather_norm, gather_norm_torch
from beit_fast.kernels.head.softmax_cross_entropy import (
    SLAB_ROWS,
    cross_entropy_,
    cross_entropy_torch_,
)
from beit_fast.kernels.linear import linear

# Logits at a time on a GPU: two fifths of its L2 cache, for the weight and its gradient pass
# through it too, and not more than 1024 rows of 8192 in 16 bits, which bounds the memory.
# Below 512 rows a product cannot fill the GPU.
MOST_BYTES, FEWEST_ROWS = 16 << 20, 512
CPU_BYTES = 32 << 20  # on a CPU: 1024 rows of 8192 in fp32; fewer re-read dweight more often


def run_chunks(
    x, index, target, weight, bias, norm_weight, norm_bias, norm_eps, label_smoothing, z_loss,
    dtype, chunk_rows, backend, dloss, needs,
):  # fmt: skip
    """(loss (I,), correct (I,), drows, stats, dweight, dbias), the last four for a row's loss."""
    needs_x, needs_weight, needs_bias, *needs_norm = needs
    needs_rows = needs_x or any(needs_norm)
    num_rows, (V, D) = len(index), weight.shape
    on_triton = backend == "triton"
    gather = gather_norm if on_triton else gather_norm_torch
    cross_entropy = cross_entropy_ if on_triton else cross_entropy_torch_
    chunk_rows = min(chunk_rows or default_chunk_rows(V, dtype, gpu_of(x), x.device), num_rows)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad(), _without_autocast(x.device.type):
        rows_ID, stats = gather(x, index, norm_weight, norm_bias, norm_eps, dtype)
        weight_VD = weight.to(dtype)
        bias_V = None if bias is None else bias.to(dtype)
        if on_triton:
            # Rows begin at multiples of 16 elements: for cuBLAS, and for loads of 128 bits.
            logits_CV = x.new_empty((chunk_rows, cdiv(V, 16) * 16), dtype=dtype)[:, :V]
        loss_I = x.new_empty(num_rows, dtype=wide)
        correct_I = x.new_empty(num_rows, dtype=torch.int32)
        dweight = x.new_empty((V, D) if needs_weight else (0,), dtype=wide)
        num_slabs = cdiv(chunk_rows, SLAB_ROWS) if on_triton else min(chunk_rows, 1)
        dbias_SV = x.new_empty((num_slabs, V), dtype=wide) if needs_bias else None
        if num_rows == 0:
            dweight.zero_()
        for start in range(0, num_rows, chunk_rows or 1):
            part = slice(start, start + chunk_rows)
            rows_CD = rows_ID[part]
            if not on_triton:
                dlogits_CV = linear(rows_CD, weight_VD, bias_V)
            elif bias_V is None:
                dlogits_CV = torch.mm(rows_CD, weight_VD.t(), out=logits_CV[: len(rows_CD)])
            else:
                dlogits_CV = logits_CV[: len(rows_CD)]
                torch.addmm(bias_V, rows_CD, weight_VD.t(), out=dlogits_CV)
            cross_entropy(
                dlogits_CV,
                index[part],
                target[part],
                label_smoothing,
                z_loss,
                loss=loss_I[part],
                correct=correct_I[part],
                with_gradient=needs_rows or needs_weight or needs_bias,
                dloss=None if dloss is None else dloss[part],
                dbias=dbias_SV,
                accumulates=start > 0,
            )
            if needs_weight:
                _add_product(dweight, dlogits_CV.t(), rows_CD, is_first=start == 0)
            if needs_rows and on_triton:
                torch.mm(dlogits_CV, weight_VD, out=rows_CD)
            elif needs_rows:
                rows_CD.copy_(linear(dlogits_CV, weight_VD.t()))
            del dlogits_CV  # before the next chunk's
        dbias = x.new_empty(0, dtype=wide) if dbias_SV is None else dbias_SV.sum(dim=0)
    if not needs_rows:
        rows_ID, stats = rows_ID.new_empty(0), stats.new_empty(0)
    return loss_I, correct_I, rows_ID, stats, dweight, dbias


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    has_autocast = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext()


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total = a b, or total += a b; in the total's fp32 where a and b are narrower."""
    beta = 0 if is_first else 1  # with 0 what is in total does not count, NaN included
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def default_chunk_rows(V: int, dtype: torch.dtype, gpu: Gpu, device: torch.device) -> int:
    """Rows of V logits at a time, see MOST_BYTES.

    >>> from beit_fast.kernels._triton import H100
    >>> default_chunk_rows(8192, torch.bfloat16, H100, torch.device("cuda"))
    1024
    """
    if device.type == "cpu":
        wide = torch.promote_types(dtype, torch.float32)
        return max(CPU_BYTES // (V * wide.itemsize) // 64 * 64, 64)
    num_bytes = min(2 * gpu.l2_bytes // 5, MOST_BYTES)
    return max(num_bytes // (cdiv(V, 16) * 16 * dtype.itemsize) // 64 * 64, FEWEST_ROWS)
