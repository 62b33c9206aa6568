"""The operator of torch that residual and norm are: by the kernels, or on a CPU by the reference.

Its schema, what it runs, what the compiler is told of it, and its gradient. What it computes:
`reference.py`; what checks the arguments: `functional.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from beit_fast.kernels._triton import contiguous_rows, interpreting
from beit_fast.kernels.arguments import run_or_torch
from beit_fast.kernels.first_order import first_order
from beit_fast.kernels.registration import implement, or_empty
from beit_fast.kernels.residual.backward import scale_residual_backward
from beit_fast.kernels.residual.cpu import scale_residual_backward_torch
from beit_fast.kernels.residual.drop_path import KeptSamples
from beit_fast.kernels.residual.forward import scale_residual_forward
from beit_fast.kernels.residual.reference import (
    layer_norm_reference,
    scale_residual_reference,
    statistics,
)

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


def _forward(
    x, branch, bias, gamma, keep, branch_slots, rng, dropout_p, drop_path_p,
    norm_weight, norm_bias, norm_slots, num_normed, eps, dtype, norm_dtype,
):  # fmt: skip
    outputs = _empty_outputs(x, branch, num_normed, eps, dtype, norm_dtype)
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}

    def on_torch() -> None:
        with torch.autocast(x.device.type, enabled=False):
            normed = x
            if branch is not None:
                kept = _kept(branch_slots, len(branch))
                more = {"bias": bias, "kept": kept, "dtype": dtype}
                normed = scale_residual_reference(x, branch, gamma, keep, **options, **more)
                outputs[0].copy_(normed)
            if eps is not None:
                kept = _kept(norm_slots, num_normed)
                precise = normed.to(outputs[2].dtype)
                mean, rstd = statistics(precise if kept is None else precise[kept.samples], eps)
                norm = {"eps": eps, "kept": kept, "dtype": norm_dtype}
                ln = layer_norm_reference(normed, norm_weight, norm_bias, **norm)
                for output, value in zip(outputs[1:], (ln, mean, rstd), strict=True):
                    output.copy_(value.view(output.shape))

    def on_kernels() -> None:
        out, ln, mean, rstd = outputs
        scale_residual_forward(
            contiguous_rows(x),
            contiguous_rows(branch),
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

    _run(x, on_kernels, on_torch)
    return or_empty(x, outputs)


def _backward(
    dout, dln, normed, mean, rstd, branch, bias, gamma, keep, branch_slots, rng,
    dropout_p, drop_path_p, norm_weight, norm_slots, shape, num_kept, dtype, branch_dtype, needs,
):  # fmt: skip
    like = dln if dout is None else dout
    outputs = _empty_gradients(like, shape, num_kept, dtype, branch_dtype, needs)
    options = {"dropout_p": dropout_p, "drop_path_p": drop_path_p, "rng": rng}

    def on_torch() -> None:
        with torch.autocast(like.device.type, enabled=False):
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

    def on_kernels() -> None:
        names = ("dx", "dbranch", "dbias", "dgamma", "dnorm_weight", "dnorm_bias")
        scale_residual_backward(
            contiguous_rows(dout),
            contiguous_rows(dln),
            contiguous_rows(normed),
            mean,
            rstd,
            norm_weight,
            norm_slots,
            contiguous_rows(branch),
            bias,
            gamma,
            keep,
            branch_slots,
            shape=tuple(shape),
            scale=1.0 if branch_slots is None else shape[0] / max(num_kept, 1),
            **dict(zip(names, outputs, strict=True)),
            **options,
        )

    _run(like, on_kernels, on_torch)
    return or_empty(like, outputs)


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


def _kept(slots: Tensor | None, count: int) -> KeptSamples | None:
    return None if slots is None else KeptSamples(slots.argsort()[len(slots) - count :], slots)


def _run(tensor: Tensor, on_kernels: Callable[[], None], on_torch: Callable[[], None]) -> None:
    if _takes_reference(tensor):
        on_torch()
    else:
        run_or_torch("scale_residual", on_kernels, on_torch)


def _takes_reference(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not interpreting()


implement("scale_residual", _forward)
implement("scale_residual_backward", _backward)


@torch.library.register_fake("beit_fast::scale_residual")
def _(
    x, branch, bias, gamma, keep, branch_slots, rng, dropout_p, drop_path_p,
    norm_weight, norm_bias, norm_slots, num_normed, eps, dtype, norm_dtype,
):  # fmt: skip
    return or_empty(x, _empty_outputs(x, branch, num_normed, eps, dtype, norm_dtype))


@torch.library.register_fake("beit_fast::scale_residual_backward")
def _(
    dout, dln, normed, mean, rstd, branch, bias, gamma, keep, branch_slots, rng,
    dropout_p, drop_path_p, norm_weight, norm_slots, shape, num_kept, dtype, branch_dtype, needs,
):  # fmt: skip
    like = dln if dout is None else dout
    return or_empty(like, _empty_gradients(like, shape, num_kept, dtype, branch_dtype, needs))


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


def call_operator(
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
    """out, ln, mean and rstd, by the operator: `kept` and `norm_kept` become their slots."""
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
