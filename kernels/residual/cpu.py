"""`scale_residual` by torch's own operators: what CPUs run, and what is left where no kernel can.

gamma and the factor of a sample meet first, on (B, 1, D), because they are small; then one
`addcmul`. Autograd is torch's, and keeps the branch only where gamma is trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import exporting, launch_obstacle
from beit_fast.kernels.arguments import check_backend, triton_or_torch
from beit_fast.kernels.philox import keep_mask_reference
from beit_fast.kernels.residual.drop_path import KeptSamples, drop_path_keep_reference

BACKENDS = ("triton", "torch")
WIDEST = 8192
MOST_ROWS = 2**30  # rows are counted in int32


def choose_backend(
    x: Tensor, branch: Tensor | None, dtypes: tuple[torch.dtype, ...], backend: str | None
) -> str:
    """The caller's wish, or the kernels on CUDA if they can, with a warning if they cannot.

    `dtypes` are those of the results. Raises ValueError where the wish cannot be granted.
    """
    check_backend(backend, BACKENDS)
    if backend == "torch" or (backend is None and (x.device.type != "cuda" or exporting())):
        return "torch"
    inputs = (x.dtype,) if branch is None else (x.dtype, branch.dtype)
    return triton_or_torch("scale_residual", backend, _triton_obstacle(x, (*inputs, *dtypes)))


def _triton_obstacle(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot take this input, or None."""
    if x.shape[2] > WIDEST:
        return f"the kernels take rows of up to {WIDEST} channels, not {x.shape[2]}"
    if x.shape[0] * x.shape[1] >= MOST_ROWS:
        return f"the kernels take fewer than {MOST_ROWS} rows, not {x.shape[0] * x.shape[1]}"
    return launch_obstacle(x, *dtypes, operator="scale_residual")


def scale_residual_torch(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    kept: KeptSamples | None,
    dtype: torch.dtype,
    *,
    dropout_p: float,
    drop_path_p: float,
    rng: Tensor | None,
) -> Tensor:
    """x + s gamma Z (branch + bias) in `dtype`; arguments as of `scale_residual`."""
    term = branch if bias is None else branch + bias
    if dropout_p:
        factor = element_factor(rng, dropout_p, x.shape)
        term = term * (factor if kept is None else factor[kept.samples])
    if drop_path_p:
        keep = drop_path_keep_reference(rng, drop_path_p, len(x)) / (1 - drop_path_p)
    if kept is not None:
        term = term * (kept.scale if gamma is None else kept.scale * gamma)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return precise.index_add(0, kept.samples, term.to(precise.dtype)).to(dtype)
    if gamma is None and keep is None:
        return (x + term).to(dtype)
    if keep is None:
        scale = gamma
    else:
        scale = keep[:, None, None] if gamma is None else keep[:, None, None] * gamma
    return torch.addcmul(x, scale, term).to(dtype)


def layer_norm_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kept: KeptSamples | None,
    dtype: torch.dtype,
) -> Tensor:
    """The norm of x, or of the kept samples in it, in `dtype`."""
    if kept is not None:
        x = x.index_select(0, kept.samples)
    vectors = [v for v in (weight, bias) if v is not None]
    if any(v.dtype != x.dtype for v in vectors):
        precise = torch.promote_types(x.dtype, torch.float32)
        x, weight, bias = (None if t is None else t.to(precise) for t in (x, weight, bias))
    return F.layer_norm(x, x.shape[2:], weight, bias, eps).to(dtype)


def scale_residual_backward_torch(
    dout: Tensor | None,
    dln: Tensor | None,
    normed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    norm_kept: KeptSamples | None,
    branch: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    kept: KeptSamples | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    dropout_p: float,
    drop_path_p: float,
    rng: Tensor | None,
) -> tuple[Tensor, ...]:
    """dx, dbranch, dbias, dgamma, dnorm_weight, dnorm_bias in fp32 or better, by the formulas.

    `dtype` is x's. A branch that was not kept counts as 0, which dgamma alone would see.
    """
    precise = torch.promote_types(dtype, torch.float32)
    like = dln if dout is None else dout
    dx = like.new_zeros(shape, dtype=precise)
    dnorm_weight = dnorm_bias = dx.new_zeros(shape[2])
    if dln is not None:
        dln = dln.to(precise)
        normed = normed.to(precise)
        if norm_kept is not None:
            normed = normed[norm_kept.samples]
        rstd = rstd[:, :, None]
        normalised = (normed - mean[:, :, None]) * rstd
        dnorm_weight, dnorm_bias = (dln * normalised).sum((0, 1)), dln.sum((0, 1))
        dnormed = dln if norm_weight is None else dln * norm_weight.to(precise)
        projection = (dnormed * normalised).mean(dim=-1, keepdim=True)
        centred = dnormed - dnormed.mean(dim=-1, keepdim=True) - normalised * projection
        samples = torch.arange(shape[0]) if norm_kept is None else norm_kept.samples
        dx = dx.index_copy(0, samples.to(dx.device), centred * rstd)
    if dout is not None:
        dx = dx + dout.to(precise)
    dterm = sample_factor(dx, keep, rng, drop_path_p, kept) * dx
    if dropout_p:
        dterm = element_factor(rng, dropout_p, dx.shape) * dterm
    if kept is not None:
        dterm = dterm[kept.samples]
    term = torch.zeros_like(dterm) if branch is None else branch.to(precise)
    if bias is not None:
        term = term + bias.to(precise)
    dbranch = dterm if gamma is None else gamma.to(precise) * dterm
    dbias, dgamma = dbranch.sum((0, 1)), (dterm * term).sum((0, 1))
    return dx, dbranch, dbias, dgamma, dnorm_weight, dnorm_bias


def element_factor(rng: Tensor, dropout_p: float, shape: tuple[int, int, int]) -> Tensor:
    """Z: 0 or 1 / (1 - p) for each element, (B, N, D)."""
    B, N, D = shape
    streams = torch.arange(B * N, device=rng.device)
    return keep_mask_reference(rng, dropout_p, 1, D, streams).view(B, N, D) / (1 - dropout_p)


def sample_factor(
    x: Tensor,
    keep: Tensor | None,
    rng: Tensor | None,
    drop_path_p: float,
    kept: KeptSamples | None,
) -> Tensor:
    """s, (B, 1, 1), in fp32 or better."""
    factor = torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if keep is not None:
        factor = factor * keep.to(factor.dtype)
    if drop_path_p:
        factor = factor * drop_path_keep_reference(rng, drop_path_p, len(x)) / (1 - drop_path_p)
    if kept is not None:
        factor = factor * (kept.slots >= 0) * kept.scale
    return factor[:, None, None]
