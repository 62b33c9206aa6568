"""Residual with LayerScale, dropout and stochastic depth, with the LayerNorm that follows.

    out[b,n,d] = x[b,n,d] + s[b] gamma[d] Z[b,n,d] (branch[b,n,d] + bias[d])
    ln[b,n,d]  = (out[b,n,d] - mean[b,n]) rstd[b,n] norm_weight[d] + norm_bias[d]

with mean and rstd = 1 / sqrt(variance + eps) over d; Z = 1 without dropout, else 0 or 1 / (1 - p);
s = 1, or 0 where the sample is dropped and 1 / (1 - p) or B / C where it is not (`drop_path`).

Shapes    x, out (B, N, D); branch (B, N, D), or (C, N, D) of the samples that are kept; ln the
          same, C of its own; vectors (D,); keep (B,). Each vector and the norm may be absent
Types     x, branch, out and ln each bf16, fp16, fp32 (on a CPU fp64); arithmetic, statistics and
          sums in fp32. The norm is that of out as it is stored
Backward  one pass: dx = dout + dLayerNorm(dln); dbranch = s gamma Z dx; dgamma, dbias and the
          norm's dweight and dbias are added up in it, by shares, in a fixed order. What needs no
          gradient is not computed; the branch is kept for dgamma alone. Once differentiable
Dropout   Z[b,n,d] from `philox`: stream b N + n, quad d / 4, word d mod 4; B N below 2^30
Cost      bytes per element, bf16 (fp32 stream and bf16 branch): forward reads x, branch, writes
          out, ln: 8 (12); backward reads dout, dln, out, writes dx, dbranch: 10 (16), and branch
          for dgamma: 12 (18). Bound by memory
Source    LayerScale arXiv:2103.17239; stochastic depth arXiv:1603.09382; compact samples as
          DINOv2 arXiv:2304.07193; sums by shares as in apex and flash-attention's layer_norm
"""

import torch
from torch import Tensor

from beit_fast.kernels.residual.cpu import element_factor, sample_factor
from beit_fast.kernels.residual.drop_path import KeptSamples


def scale_residual_reference(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    rng: Tensor | None = None,
    kept: KeptSamples | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The first formula above, transcribed; what is absent changes nothing."""
    B, N, D = x.shape
    precise = torch.promote_types(x.dtype, torch.float32)
    term = branch.to(precise)
    if kept is not None:
        term = term.new_zeros(B, N, D).index_copy(0, kept.samples, term)
    if bias is not None:
        term = term + bias.to(precise)
    if dropout_p:
        term = element_factor(rng, dropout_p, x.shape) * term
    if gamma is not None:
        term = gamma.to(precise) * term
    out = x.to(precise) + sample_factor(x, keep, rng, drop_path_p, kept) * term
    return out.to(x.dtype if dtype is None else dtype)


def scale_residual_norm_reference(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm_kept: KeptSamples | None = None,
    norm_dtype: torch.dtype | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Both formulas: out, and the norm of out or of the kept samples in it."""
    out = scale_residual_reference(x, branch, gamma, keep, **options)
    norm = {"eps": eps, "kept": norm_kept, "dtype": norm_dtype}
    return out, layer_norm_reference(out, norm_weight, norm_bias, **norm)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kept: KeptSamples | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The second formula, of x or of the kept samples in x."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    if kept is not None:
        precise = precise[kept.samples]
    mean, rstd = statistics(precise, eps)
    ln = (precise - mean) * rstd
    if weight is not None:
        ln = ln * weight.to(ln.dtype)
    if bias is not None:
        ln = ln + bias.to(ln.dtype)
    return ln.to(x.dtype if dtype is None else dtype)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return mean, 1 / (variance + eps).sqrt()
