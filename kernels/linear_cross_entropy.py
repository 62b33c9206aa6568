"""The head of masked image modelling: norm, linear and cross-entropy on the masked rows alone.

    z[i] = LayerNorm(x[index[i]]) weight^T + bias
    loss = mean_i -log softmax(z[i])[target[i]]        over the real rows, index[i] >= 0

Shapes    x (B, N, D), its rows counted over B N; index, target (I,); weight (V, D); bias (V,)
Types     softmax and loss in fp32; the product in the weight's dtype, or autocast's
Padding   index -1: no loss, no gradient. I is fixed (B x most masked patches), so shapes never
          depend on the masks and no step waits for the device
Backward  through the real rows only, duplicates add up
Cost      I D V multiply-adds forward, twice that backward; stores the (I, V) logits
Source    BEiT arXiv:2106.08254, eq. 1
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.linear import linear


def masked_linear_cross_entropy_reference(
    x: Tensor,
    index: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The formula above on exactly the real rows: dynamic shapes, and a wait for the device."""
    real = index >= 0
    rows_MD = x.flatten(0, 1)[index[real]]
    target_M = target[real].long()
    if norm_weight is not None:
        rows_MD = F.layer_norm(rows_MD, rows_MD.shape[1:], norm_weight, norm_bias, norm_eps)
    logits_MV = F.linear(rows_MD, weight, bias)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    loss = F.cross_entropy(logits_MV, target_M, reduction="sum", label_smoothing=label_smoothing)
    if reduction == "mean":
        loss = loss / max(len(rows_MD), 1)
    return loss, (logits_MV.argmax(dim=-1) == target_M).sum()


def masked_linear_cross_entropy(
    x: Tensor,
    index: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Loss (a scalar) and how many rows are predicted right (an int64 scalar, on the device).

    x (B, N, D) encoder output; index int32 or int64 (I,) into its B N rows, -1 is padding; target
    (I,), ignored where padded; weight (V, D) and bias (V,) of the head; norm_weight, norm_bias
    (D,) of the norm before it, None leaves the norm out. `reduction` is "mean" over the real rows
    or "sum". Without a real row the loss is 0 and so is every gradient.
    Raises ValueError where shapes do not fit; entries of index and target are not looked at.
    """
    _check(x, index, target, weight, reduction)
    real = index >= 0
    rows_ID = x.flatten(0, 1).index_select(0, index.clamp(min=0))
    target_I = torch.where(real, target, -1).long()
    if norm_weight is not None:
        rows_ID = F.layer_norm(rows_ID, rows_ID.shape[1:], norm_weight, norm_bias, norm_eps)
    logits_IV = linear(rows_ID, weight, bias)
    logits_IV = logits_IV.to(torch.promote_types(logits_IV.dtype, torch.float32))
    loss = F.cross_entropy(
        logits_IV, target_I, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
    )
    if reduction == "mean":
        loss = loss / real.sum().clamp(min=1)
    # A padded row's target is -1, which no argmax equals.
    return loss, (logits_IV.argmax(dim=-1) == target_I).sum()


def _check(x: Tensor, index: Tensor, target: Tensor, weight: Tensor, reduction: str) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"x is {tuple(x.shape)}, the head's weight {tuple(weight.shape)}: pass x (B, N, D) "
            "and weight (V, D)"
        )
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"the index is {index.dtype} {tuple(index.shape)}: pass int32 or int64 (I,), rows of "
            "x with B and N flattened, -1 for padding"
        )
    if target.shape != index.shape:
        raise ValueError(
            f"{tuple(target.shape)} targets for {tuple(index.shape)} rows: pass one for each row, "
            "padded ones included"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: pass 'mean' or 'sum'")
