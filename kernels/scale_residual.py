"""Residual with LayerScale and stochastic depth.

    out[b,n,d] = x[b,n,d] + keep[b] gamma[d] branch[b,n,d]

Shapes    x, branch, out (B, N, D); gamma (D,) or None; keep (B,) or None, holding 0 or 1 / (1 - p)
Types     out has x's dtype; arithmetic in fp32
Backward  dx = dout;  dbranch = keep gamma dout;  dgamma = sum_bn keep branch dout
Cost      forward moves 3 B N D elements: bound by memory
Source    LayerScale arXiv:2103.17239; stochastic depth arXiv:1603.09382
"""

import torch
from torch import Tensor


def scale_residual_reference(
    x: Tensor, branch: Tensor, gamma: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """The formula above, transcribed; an absent gamma or keep is 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    scaled = branch.to(dtype)
    if gamma is not None:
        scaled = gamma.to(dtype) * scaled
    if keep is not None:
        scaled = keep.to(dtype)[:, None, None] * scaled
    return (x.to(dtype) + scaled).to(x.dtype)


def scale_residual(
    x: Tensor, branch: Tensor, gamma: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """x + keep gamma branch in one pass over memory, (B, N, D) in x's dtype.

    branch (B, N, D); gamma (D,) or None: no LayerScale; keep (B,) or None: no sample dropped, else
    0 or 1 / (1 - p) per sample. keep and gamma meet first, on (B, 1, D), because they are small.
    Raises ValueError where shapes do not fit.
    """
    if x.ndim != 3 or x.shape != branch.shape:
        raise ValueError(
            f"x is {tuple(x.shape)}, the branch {tuple(branch.shape)}: pass both as (B, N, D)"
        )
    if gamma is not None and gamma.shape != x.shape[2:]:
        raise ValueError(f"gamma is {tuple(gamma.shape)}: pass ({x.shape[2]},), one per channel")
    if keep is not None and keep.shape != x.shape[:1]:
        raise ValueError(f"keep is {tuple(keep.shape)}: pass ({x.shape[0]},), one per sample")

    if gamma is None and keep is None:
        return (x + branch).to(x.dtype)
    if keep is None:
        scale = gamma
    else:
        scale = keep[:, None, None] if gamma is None else keep[:, None, None] * gamma
    return torch.addcmul(x, scale, branch).to(x.dtype)
