"""The residual and its norm as they are called: what is checked, drawn and chosen.

Formulas, shapes and types: `reference.py`. What runs is the operator of `operators.py`, or torch's
own (`cpu.py`).
"""

import torch
from torch import Tensor

from beit_fast.kernels.arguments import autocast_dtype, check_floating, check_rng
from beit_fast.kernels.philox import draw_rng
from beit_fast.kernels.residual.cpu import choose_backend, layer_norm_torch, scale_residual_torch
from beit_fast.kernels.residual.drop_path import KeptSamples
from beit_fast.kernels.residual.operators import call_operator


def scale_residual(
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
    backend: str | None = None,
) -> Tensor:
    """x + s gamma Z (branch + bias) in one pass over memory, (B, N, D) in `dtype` or x's.

    branch (B, N, D), or (C, N, D) with `kept`; gamma, bias (D,) or None; keep (B,) or None, 0 or
    1 / (1 - p) per sample. dropout_p drops elements and drop_path_p samples as `rng` says, int64
    (2,) on the device (`philox.draw_rng`), or a fresh draw. `backend` is "triton", the default on
    CUDA, or "torch", elsewhere.
    Raises ValueError where shapes or options do not fit.
    """
    _check_branch(x, branch, gamma, keep, bias, dropout_p, drop_path_p, kept)
    rng = _drawn(rng, x) if dropout_p or drop_path_p else None
    dtype = x.dtype if dtype is None else dtype
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}
    if choose_backend(x, branch, (dtype,), backend) == "torch":
        return scale_residual_torch(x, branch, gamma, keep, bias, kept, dtype, **options)
    return call_operator(x, branch, gamma, keep, bias, kept, dtype, **options)[0]


def scale_residual_norm(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    rng: Tensor | None = None,
    kept: KeptSamples | None = None,
    norm_kept: KeptSamples | None = None,
    dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale_residual` and the LayerNorm of its result: out (B, N, D) and ln in one pass.

    norm_weight, norm_bias (D,) or None. ln is (B, N, D), or with `norm_kept` (C, N, D), those
    samples alone; in `norm_dtype`, else in autocast's dtype where autocast is on, else in out's.
    All else is `scale_residual`'s.
    Raises ValueError where shapes or options do not fit.
    """
    _check_branch(x, branch, gamma, keep, bias, dropout_p, drop_path_p, kept)
    _check_norm(x, norm_weight, norm_bias, norm_kept)
    rng = _drawn(rng, x) if dropout_p or drop_path_p else None
    dtype = x.dtype if dtype is None else dtype
    norm_dtype = (autocast_dtype(x.device) or dtype) if norm_dtype is None else norm_dtype
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}
    if choose_backend(x, branch, (dtype, norm_dtype), backend) == "torch":
        out = scale_residual_torch(x, branch, gamma, keep, bias, kept, dtype, **options)
        return out, layer_norm_torch(out, norm_weight, norm_bias, eps, norm_kept, norm_dtype)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_kept": norm_kept, "eps": eps}
    norm["norm_dtype"] = norm_dtype
    return call_operator(x, branch, gamma, keep, bias, kept, dtype, **options, **norm)[:2]


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kept: KeptSamples | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The LayerNorm alone, of x (B, N, D) or of the kept samples in it, for a first block.

    weight, bias (D,) or None; the result's dtype and `backend` as in `scale_residual_norm`.
    Raises ValueError where shapes do not fit.
    """
    _check_norm(x, weight, bias, kept)
    dtype = (autocast_dtype(x.device) or x.dtype) if dtype is None else dtype
    if choose_backend(x, None, (dtype,), backend) == "torch":
        return layer_norm_torch(x, weight, bias, eps, kept, dtype)
    norm = {"norm_weight": weight, "norm_bias": bias, "norm_kept": kept, "eps": eps}
    return call_operator(x, None, None, None, None, None, x.dtype, **norm, norm_dtype=dtype)[1]


def _drawn(rng: Tensor | None, x: Tensor) -> Tensor:
    if rng is None:
        return draw_rng(x.device)
    check_rng(rng, x.device)
    return rng


def _check_branch(x, branch, gamma, keep, bias, dropout_p, drop_path_p, kept) -> None:
    samples = x.shape[0] if kept is None else len(kept.samples)
    if x.ndim != 3 or branch.shape != (samples, *x.shape[1:]):
        wanted = "both as (B, N, D)" if kept is None else f"({samples}, N, D), the kept samples"
        raise ValueError(f"x is {tuple(x.shape)}, the branch {tuple(branch.shape)}: pass {wanted}")
    if not branch.is_floating_point() or not x.is_floating_point():
        check_floating(x=x, branch=branch)
    _check_vectors(x, {"gamma": gamma, "the branch's bias": bias})
    if keep is not None and (keep.shape != x.shape[:1] or not keep.is_floating_point()):
        raise ValueError(
            f"keep is {keep.dtype} {tuple(keep.shape)}: pass floats ({x.shape[0]},), one per "
            "sample, 0 or 1 / (1 - p)"
        )
    if not (0 <= dropout_p < 1 and 0 <= drop_path_p < 1):
        raise ValueError(
            f"dropout_p is {dropout_p}, drop_path_p {drop_path_p}: pass rates in [0, 1)"
        )
    if (keep is not None) + (drop_path_p > 0) + (kept is not None) > 1:
        raise ValueError(
            "samples are dropped in more than one way: pass one of keep, drop_path_p and kept"
        )
    _check_kept(x, kept)


def _check_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: KeptSamples | None
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x is {tuple(x.shape)}: pass (B, N, D)")
    if not x.is_floating_point():
        check_floating(x=x)
    _check_vectors(x, {"the norm's weight": weight, "the norm's bias": bias})
    _check_kept(x, kept)


def _check_vectors(x: Tensor, vectors: dict[str, Tensor | None]) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[2:] or not vector.is_floating_point():
            raise ValueError(
                f"{name} is {vector.dtype} {tuple(vector.shape)}: pass floats ({x.shape[2]},), one "
                "per channel"
            )


def _check_kept(x: Tensor, kept: KeptSamples | None) -> None:
    if kept is not None and len(kept.slots) != len(x):
        raise ValueError(
            f"the samples kept are drawn from {len(kept.slots)}, x has {len(x)}: draw them with "
            "draw_kept_samples(len(x), ...)"
        )
