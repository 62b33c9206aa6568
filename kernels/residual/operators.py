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

from beit_fast.kernels._triton import check_floating, interpreting
from beit_fast.kernels.first_order import first_order
from beit_fast.kernels.philox import draw_rng
from beit_fast.kernels.residual.backward import scale_residual_backward
from beit_fast.kernels.residual.cpu import (
    choose_backend,
    element_factor,
    layer_norm_torch,
    sample_factor,
    scale_residual_backward_torch,
    scale_residual_torch,
)
from beit_fast.kernels.residual.drop_path import KeptSamples
from beit_fast.kernels.residual.forward import scale_residual_forward


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
    mean, rstd = _statistics(precise, eps)
    ln = (precise - mean) * rstd
    if weight is not None:
        ln = ln * weight.to(ln.dtype)
    if bias is not None:
        ln = ln + bias.to(ln.dtype)
    return ln.to(x.dtype if dtype is None else dtype)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return mean, 1 / (variance + eps).sqrt()


# The operator. `eps` None: no norm, ln comes back empty; `branch` None: the norm of x alone, out
# comes back empty. On a CPU it runs the reference, or the kernel under Triton's interpreter.
_BRANCH = (
    "Tensor? bias, Tensor? gamma, Tensor? keep, Tensor? branch_slots, Tensor? rng, "
    "float dropout_p, float drop_path_p"
)
torch.library.define(
    "beit_fast::scale_residual",
    f"(Tensor x, Tensor? branch, {_BRANCH}, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? norm_slots, SymInt num_normed, float? eps, ScalarType dtype, ScalarType norm_dtype) "
    "-> (Tensor out, Tensor ln, Tensor mean, Tensor rstd)",
)
# `needs` says which of dx, dbranch, dbias, dgamma, dnorm_weight, dnorm_bias are wanted; others
# come back empty, and those of vectors in fp32. `shape` is x's, `num_kept` the branch's C.
torch.library.define(
    "beit_fast::scale_residual_backward",
    "(Tensor? dout, Tensor? dln, Tensor? normed, Tensor? mean, Tensor? rstd, Tensor? branch, "
    f"{_BRANCH}, Tensor? norm_weight, Tensor? norm_slots, SymInt[] shape, SymInt num_kept, "
    "ScalarType dtype, ScalarType branch_dtype, bool[] needs) "
    "-> (Tensor dx, Tensor dbranch, Tensor dbias, Tensor dgamma, Tensor dnorm_weight, "
    "Tensor dnorm_bias)",
)
_DEVICES = ("CPU", "CUDA")


def _forward(
    x, branch, bias, gamma, keep, branch_slots, rng, dropout_p, drop_path_p,
    norm_weight, norm_bias, norm_slots, num_normed, eps, dtype, norm_dtype,
):  # fmt: skip
    outputs = _empty_outputs(x, branch, num_normed, eps, dtype, norm_dtype)
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}
    if _takes_reference(x):
        with torch.autocast("cpu", enabled=False):
            normed = x
            if branch is not None:
                kept = _kept(branch_slots, len(branch))
                options |= {"bias": bias, "kept": kept, "dtype": dtype}
                normed = scale_residual_reference(x, branch, gamma, keep, **options)
                outputs[0].copy_(normed)
            if eps is not None:
                kept = _kept(norm_slots, num_normed)
                precise = normed.to(outputs[2].dtype)
                mean, rstd = _statistics(precise if kept is None else precise[kept.samples], eps)
                norm = {"eps": eps, "kept": kept, "dtype": norm_dtype}
                ln = layer_norm_reference(normed, norm_weight, norm_bias, **norm)
                for output, value in zip(outputs[1:], (ln, mean, rstd), strict=True):
                    output.copy_(value.view(output.shape))
        return _or_empty(x, outputs)
    out, ln, mean, rstd = outputs
    scale_residual_forward(
        _rows(x),
        _rows(branch),
        bias,
        gamma,
        keep,
        branch_slots,
        norm_weight,
        norm_bias,
        norm_slots,
        scale=1.0 if branch_slots is None else len(x) / max(len(branch), 1),
        eps=0.0 if eps is None else eps,
        out=out,
        ln=ln,
        mean=mean,
        rstd=rstd,
        **options,
    )
    return _or_empty(x, outputs)


def _backward(
    dout, dln, normed, mean, rstd, branch, bias, gamma, keep, branch_slots, rng,
    dropout_p, drop_path_p, norm_weight, norm_slots, shape, num_kept, dtype, branch_dtype, needs,
):  # fmt: skip
    like = dln if dout is None else dout
    outputs = _empty_gradients(like, shape, num_kept, dtype, branch_dtype, needs)
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}
    if _takes_reference(like):
        with torch.autocast("cpu", enabled=False):
            norm_kept = None if dln is None else _kept(norm_slots, len(dln))
            values = scale_residual_backward_torch(
                dout,
                dln,
                normed,
                mean,
                rstd,
                norm_weight,
                norm_kept,
                branch,
                bias,
                gamma,
                keep,
                _kept(branch_slots, num_kept),
                tuple(shape),
                dtype,
                **options,
            )
            for output, value in zip(outputs, values, strict=True):
                if output is not None:
                    output.copy_(value)
        return _or_empty(like, outputs)
    names = ("dx", "dbranch", "dbias", "dgamma", "dnorm_weight", "dnorm_bias")
    scale_residual_backward(
        _rows(dout),
        _rows(dln),
        _rows(normed),
        mean,
        rstd,
        norm_weight,
        norm_slots,
        _rows(branch),
        bias,
        gamma,
        keep,
        branch_slots,
        shape=tuple(shape),
        scale=1.0 if branch_slots is None else shape[0] / max(num_kept, 1),
        **dict(zip(names, outputs, strict=True)),
        **options,
    )
    return _or_empty(like, outputs)


def _empty_outputs(x, branch, num_normed, eps, dtype, norm_dtype) -> list[Tensor | None]:
    """out, ln, mean, rstd to be written; None: not asked for."""
    N, D = x.shape[1:]
    out = None if branch is None else x.new_empty(x.shape, dtype=dtype)
    if eps is None:
        return [out, None, None, None]
    statistics = torch.promote_types(x.dtype, torch.float32)
    ln = x.new_empty((num_normed, N, D), dtype=norm_dtype)
    return [out, ln, *(x.new_empty((num_normed, N), dtype=statistics) for _ in range(2))]


def _empty_gradients(like, shape, num_kept, dtype, branch_dtype, needs) -> list[Tensor | None]:
    """dx, dbranch and the gradients of the four vectors, to be written; None: not asked for."""
    B, N, D = shape
    precise = torch.promote_types(dtype, torch.float32)
    kinds = [((B, N, D), dtype), ((num_kept, N, D), branch_dtype), *[((D,), precise)] * 4]
    return [
        like.new_empty(size, dtype=kind) if needed else None
        for (size, kind), needed in zip(kinds, needs, strict=True)
    ]


def _or_empty(like: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with contiguous rows."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _kept(slots: Tensor | None, count: int) -> KeptSamples | None:
    return None if slots is None else KeptSamples(slots.argsort()[len(slots) - count :], slots)


def _takes_reference(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not interpreting()


# As a decorator `impl` would leave None behind in place of the function.
torch.library.impl("beit_fast::scale_residual", _DEVICES, _forward)
torch.library.impl("beit_fast::scale_residual_backward", _DEVICES, _backward)


@torch.library.register_fake("beit_fast::scale_residual")
def _(
    x, branch, bias, gamma, keep, branch_slots, rng, dropout_p, drop_path_p,
    norm_weight, norm_bias, norm_slots, num_normed, eps, dtype, norm_dtype,
):  # fmt: skip
    return _or_empty(x, _empty_outputs(x, branch, num_normed, eps, dtype, norm_dtype))


@torch.library.register_fake("beit_fast::scale_residual_backward")
def _(
    dout, dln, normed, mean, rstd, branch, bias, gamma, keep, branch_slots, rng,
    dropout_p, drop_path_p, norm_weight, norm_slots, shape, num_kept, dtype, branch_dtype, needs,
):  # fmt: skip
    like = dln if dout is None else dout
    return _or_empty(like, _empty_gradients(like, shape, num_kept, dtype, branch_dtype, needs))


def _setup_context(ctx, inputs, output) -> None:
    (
        x, branch, bias, gamma, keep, branch_slots, rng, ctx.dropout_p, ctx.drop_path_p,
        norm_weight, norm_bias, norm_slots, _, eps, _, _,
    ) = inputs  # fmt: skip
    out, _, mean, rstd = output
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.has_branch, ctx.has_norm = branch is not None, eps is not None
    ctx.num_kept, ctx.branch_dtype = 0, x.dtype
    if branch is not None:
        ctx.num_kept, ctx.branch_dtype = len(branch), branch.dtype
    trains_gamma = gamma is not None and ctx.needs_input_grad[3]
    normed = x if branch is None else out
    ctx.save_for_backward(
        normed if ctx.has_norm else None,
        mean if ctx.has_norm else None,
        rstd if ctx.has_norm else None,
        branch if trains_gamma else None,
        bias if trains_gamma else None,
        gamma,
        keep,
        branch_slots,
        rng,
        norm_weight,
        norm_slots,
    )
    ctx.vector_dtypes = [
        None if v is None else v.dtype for v in (bias, gamma, norm_weight, norm_bias)
    ]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


@first_order(
    "scale_residual, with its norm or without, on Triton",
    'pass backend="torch", which is differentiable as often as you like; a timm or transformers '
    "model gets its own modules back by beit_fast.restore(model)",
)
def _differentiate(ctx, dout, dln, _dmean, _drstd):
    # Positions of x, branch, bias, gamma, norm_weight, norm_bias among the inputs.
    places = (0, 1, 2, 3, 9, 10)
    needs = [ctx.needs_input_grad[place] for place in places]
    gradients: list[Tensor | None] = [None] * 16
    # torch.compile hands zeros in for an output that was empty.
    dout = dout if ctx.has_branch else None
    dln = dln if ctx.has_norm else None
    if dln is None:
        # Without a norm x's gradient is out's, and the norm's vectors have none.
        if dout is not None and needs[0]:
            gradients[0] = dout.to(ctx.dtype)
        needs[0] = needs[4] = needs[5] = False
    if (dout is None and dln is None) or not any(needs):
        return tuple(gradients)
    normed, mean, rstd, branch, bias, gamma, keep, branch_slots, rng, norm_weight, norm_slots = (
        ctx.saved_tensors
    )
    results = torch.ops.beit_fast.scale_residual_backward(
        dout,
        dln,
        None if dln is None else normed,
        None if dln is None else mean,
        None if dln is None else rstd,
        branch,
        bias,
        gamma,
        keep,
        branch_slots,
        rng,
        ctx.dropout_p,
        ctx.drop_path_p,
        norm_weight,
        norm_slots,
        ctx.shape,
        ctx.num_kept,
        ctx.dtype,
        ctx.branch_dtype,
        needs,
    )
    dtypes = (ctx.dtype, ctx.branch_dtype, *ctx.vector_dtypes)
    for place, needed, result, dtype in zip(places, needs, results, dtypes, strict=True):
        if needed:
            gradients[place] = result.to(dtype)
    return tuple(gradients)


torch.library.register_autograd(
    "beit_fast::scale_residual", _differentiate, setup_context=_setup_context
)


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
    rng = _rng(x, rng) if dropout_p or drop_path_p else None
    dtype = x.dtype if dtype is None else dtype
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}
    if choose_backend(x, branch, (dtype,), backend) == "torch":
        return scale_residual_torch(x, branch, gamma, keep, bias, kept, dtype, **options)
    return _operator(x, branch, gamma, keep, bias, kept, dtype, **options)[0]


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
    rng = _rng(x, rng) if dropout_p or drop_path_p else None
    dtype = x.dtype if dtype is None else dtype
    norm_dtype = _autocast_or(dtype, x) if norm_dtype is None else norm_dtype
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}
    if choose_backend(x, branch, (dtype, norm_dtype), backend) == "torch":
        out = scale_residual_torch(x, branch, gamma, keep, bias, kept, dtype, **options)
        return out, layer_norm_torch(out, norm_weight, norm_bias, eps, norm_kept, norm_dtype)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_kept": norm_kept, "eps": eps}
    norm["norm_dtype"] = norm_dtype
    return _operator(x, branch, gamma, keep, bias, kept, dtype, **options, **norm)[:2]


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
    dtype = _autocast_or(x.dtype, x) if dtype is None else dtype
    if choose_backend(x, None, (dtype,), backend) == "torch":
        return layer_norm_torch(x, weight, bias, eps, kept, dtype)
    norm = {"norm_weight": weight, "norm_bias": bias, "norm_kept": kept, "eps": eps}
    return _operator(x, None, None, None, None, None, x.dtype, **norm, norm_dtype=dtype)[1]


def _operator(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    kept: KeptSamples | None,
    dtype: torch.dtype,
    *,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    rng: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_kept: KeptSamples | None = None,
    eps: float | None = None,
    norm_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.beit_fast.scale_residual(
        x,
        branch,
        bias,
        gamma,
        keep,
        None if kept is None else kept.slots,
        rng,
        dropout_p,
        drop_path_p,
        norm_weight,
        norm_bias,
        None if norm_kept is None else norm_kept.slots,
        x.shape[0] if norm_kept is None else len(norm_kept.samples),
        eps,
        dtype,
        norm_dtype,
    )


def _rng(x: Tensor, rng: Tensor | None) -> Tensor:
    if rng is None:
        return draw_rng(x.device)
    if (rng.shape, rng.dtype, rng.device) != ((2,), torch.int64, x.device):
        raise ValueError(
            f"rng is {rng.dtype} {tuple(rng.shape)} on {rng.device}: pass int64 (2,), seed and "
            f"offset, on {x.device}, as philox.draw_rng gives"
        )
    return rng


def _autocast_or(dtype: torch.dtype, x: Tensor) -> torch.dtype:
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


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
