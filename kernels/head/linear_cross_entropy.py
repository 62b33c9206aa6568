"""The head of masked image modelling: norm, linear and cross-entropy on the masked rows alone.

    logits[i] = LayerNorm(x[index[i]]) weight^T + bias
    loss      = mean or sum of the rows' cross-entropies over index[i] != -1, or each of them

Label smoothing, z-loss and the gradient of the logits: `softmax_cross_entropy`; gather and norm:
`gather_norm`. For any linear classifier over some rows of a tensor: BEiT's head is one, a language
model's another.

Shapes    x (B, N, D), its rows counted over B N; index, target (I,); weight (V, D); bias (V,)
Types     norm, softmax and loss in fp32; operands of the products, logits and their gradient in
          the weight's dtype, or autocast's; gradients of weight and bias are summed in fp32
Padding   index -1: no loss, no gradient. I is fixed (B x most masked patches), so shapes never
          depend on the masks and no step waits for the device
Memory    Logits exist for some rows at a time. The gradient of those rows is computed with them,
          in the forward, so nothing is computed twice: it takes the place of the logits, and the
          gradient of the normed rows that of the rows. Beside the gradients it returns, at
          I = 19,200, D = 768, V = 8192 under bf16 autocast: rows 29.5 MB, 1024 rows of logits
          16.8, weight in bf16 12.6, the rest 0.8: 59.7 MB, where all logits in fp32 are 629.
          With a 16-bit weight the fp32 sum of its gradient is 25.2 and the copy 0
Backward  multiplies with the loss's gradient; dx by `gather_norm`. reduction "none" alone computes
          the logits again, since dweight needs the gradient of each row's loss
Cost      2 I D V operations forward and 4 backward: bound by arithmetic
Source    BEiT arXiv:2106.08254, eq. 1; gradient in the forward as Liger arXiv:2410.10989
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from beit_fast.kernels._triton import launch_obstacle
from beit_fast.kernels.arguments import (
    INDEX_DTYPES,
    autocast_dtype,
    check_backend,
    check_floating,
    check_index,
    check_index_values,
    run_or_torch,
    triton_or_torch,
)
from beit_fast.kernels.first_order import first_order
from beit_fast.kernels.head.chunks import run_chunks
from beit_fast.kernels.head.gather_norm import WIDEST, gather_norm_reference
from beit_fast.kernels.head.scatter_norm import scatter_norm_backward, scatter_norm_backward_torch
from beit_fast.kernels.registration import implement, or_empty

BACKENDS = ("triton", "torch", "reference")
_LOST = "slower and not deterministic"
REDUCTIONS = ("mean", "sum", "none")


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
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The formula above on exactly the real rows: dynamic shapes, and a wait for the device."""
    real = index >= 0
    rows_MD = gather_norm_reference(x, index[real], norm_weight, norm_bias, eps=norm_eps)
    target_M = target[real].long()
    logits_MV = F.linear(rows_MD, weight, bias)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    loss_M = F.cross_entropy(logits_MV, target_M, **options)
    loss_M = loss_M + z_loss * logits_MV.logsumexp(dim=-1).square()
    num_correct = (logits_MV.argmax(dim=-1) == target_M).sum()
    if reduction == "none":
        return loss_M.new_zeros(len(index)).masked_scatter(real, loss_M), num_correct
    loss = loss_M.sum()
    return loss / max(len(rows_MD), 1) if reduction == "mean" else loss, num_correct


# `needs` says which gradients are wanted: of x, weight, bias, norm_weight, norm_bias. `backend` is
# "triton" or "torch", "" chooses; `chunk_rows` 0 chooses too. What the backward keeps, all without
# the loss's gradient and the mean's divisor: drows (I, D), the gradient of the normed rows; stats
# (2, I) of the norm; dweight, dbias; factor (1,), 1 or 1 / real rows. Empty where not wanted.
_OPTIONS = (
    "float norm_eps, float label_smoothing, float z_loss, str reduction, ScalarType dtype, "
    "SymInt chunk_rows, bool check, str backend"
)
_INPUTS = (
    "Tensor x, Tensor index, Tensor target, Tensor weight, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias"
)
_KEPT = "Tensor drows, Tensor stats, Tensor dweight, Tensor dbias, Tensor factor"
torch.library.define(
    "beit_fast::masked_linear_cross_entropy",
    f"({_INPUTS}, {_OPTIONS}, bool[] needs) -> (Tensor loss, Tensor num_correct, {_KEPT})",
)
torch.library.define(
    "beit_fast::masked_linear_cross_entropy_backward",
    f"(Tensor dloss, {_KEPT}, Tensor x, Tensor index, Tensor? target, Tensor? weight, "
    "Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    f"{_OPTIONS}, ScalarType weight_dtype, ScalarType bias_dtype, bool[] needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)",
)


def _forward(
    x, index, target, weight, bias, norm_weight, norm_bias,
    norm_eps, label_smoothing, z_loss, reduction, dtype, chunk_rows, check, backend, needs,
):  # fmt: skip
    wish, backend = backend, _resolve(backend, x, dtype)
    if check or (backend == "torch" and x.device.type == "cpu"):
        _check_values(x, index, target, weight)
    later = reduction == "none"  # then the backward needs dloss first
    loss_I, correct_I, *kept = _chunks(
        wish, backend, x, index, target, weight, bias, norm_weight, norm_bias, norm_eps,
        label_smoothing, z_loss, dtype, chunk_rows, None, [False] * 5 if later else needs,
    )  # fmt: skip
    factor = torch.ones(1, dtype=loss_I.dtype, device=x.device)
    if reduction == "mean":
        factor = factor / (index != -1).sum().clamp(min=1)
    loss = loss_I if later else (loss_I.sum() * factor)[0]
    return loss, correct_I.sum(), *kept, factor


def _backward(
    dloss, drows, stats, dweight, dbias, factor,
    x, index, target, weight, bias, norm_weight, norm_bias,
    norm_eps, label_smoothing, z_loss, reduction, dtype, chunk_rows, check, backend,
    weight_dtype, bias_dtype, needs,
):  # fmt: skip
    wish, backend = backend, _resolve(backend, x, dtype)
    needs_x, needs_weight, needs_bias, *needs_norm = needs
    if reduction == "none":
        _, _, drows, stats, dweight, dbias = _chunks(
            wish, backend, x, index, target, weight, bias, norm_weight, norm_bias, norm_eps,
            label_smoothing, z_loss, dtype, chunk_rows, dloss.to(factor.dtype).contiguous(), needs,
        )  # fmt: skip
    else:
        factor = dloss.to(factor.dtype) * factor
    gradients = [None] * 5
    if needs_x or any(needs_norm):
        arguments = (drows, index, factor, x, stats, norm_weight)
        names = ("needs_x", "needs_weight", "needs_bias")
        wanted = dict(zip(names, (needs_x, *needs_norm), strict=True))
        dx, *dnorm = _run(
            wish,
            backend,
            lambda: scatter_norm_backward(*arguments, **wanted),
            lambda: scatter_norm_backward_torch(*arguments, **wanted),
        )
        gradients[0] = dx
        for number, (dvector, vector) in enumerate(
            zip(dnorm, (norm_weight, norm_bias), strict=True)
        ):
            gradients[3 + number] = None if dvector is None else dvector.to(vector.dtype)
    if needs_weight:
        gradients[1] = (dweight * factor).to(weight_dtype)
    if needs_bias:
        gradients[2] = (dbias * factor).to(bias_dtype)
    return or_empty(x, gradients)


def _chunks(wish, backend, *arguments):
    """`run_chunks` of that back end, which is the last but two of its arguments."""
    *first, dloss, needs = arguments

    def on(chosen: str) -> tuple:
        return run_chunks(*first, chosen, dloss, needs)

    return _run(wish, backend, lambda: on("triton"), lambda: on("torch"))


def _run(wish, backend, on_kernels, on_torch):
    if backend == "torch":
        return on_torch()
    name = "masked_linear_cross_entropy"
    return run_or_torch(name, on_kernels, on_torch, backend=wish, lost=_LOST)


implement("masked_linear_cross_entropy", _forward)
implement("masked_linear_cross_entropy_backward", _backward)


@torch.library.register_fake("beit_fast::masked_linear_cross_entropy")
def _(
    x, index, target, weight, bias, norm_weight, norm_bias,
    norm_eps, label_smoothing, z_loss, reduction, dtype, chunk_rows, check, backend, needs,
):  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    needs_x, needs_weight, needs_bias, *needs_norm = needs
    now = reduction != "none"
    needs_rows = now and (needs_x or any(needs_norm))
    num_rows = index.shape[0]
    stats_shape = (2, num_rows if norm_weight is not None else 0)
    stats_dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((num_rows,) if reduction == "none" else (), dtype=wide),
        x.new_empty((), dtype=torch.int64),
        x.new_empty((num_rows, weight.shape[1]) if needs_rows else (0,), dtype=dtype),
        x.new_empty(stats_shape if needs_rows else (0,), dtype=stats_dtype),
        x.new_empty(weight.shape if needs_weight and now else (0,), dtype=wide),
        x.new_empty(weight.shape[:1] if needs_bias and now else (0,), dtype=wide),
        x.new_empty((1,), dtype=wide),
    )


@torch.library.register_fake("beit_fast::masked_linear_cross_entropy_backward")
def _(
    dloss, drows, stats, dweight, dbias, factor,
    x, index, target, weight, bias, norm_weight, norm_bias,
    norm_eps, label_smoothing, z_loss, reduction, dtype, chunk_rows, check, backend,
    weight_dtype, bias_dtype, needs,
):  # fmt: skip
    (dweight_shape, dbias_shape) = (
        (dweight.shape, dbias.shape) if reduction != "none" else (weight.shape, weight.shape[:1])
    )
    wanted = (
        (x.shape, x.dtype),
        (dweight_shape, weight_dtype),
        (dbias_shape, bias_dtype),
        *((None, None) if v is None else (v.shape, v.dtype) for v in (norm_weight, norm_bias)),
    )
    return tuple(
        x.new_empty(shape, dtype=dtype) if needed else x.new_empty(0)
        for (shape, dtype), needed in zip(wanted, needs, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    x, index, target, weight, bias, norm_weight, norm_bias, *ctx.options, ctx.needs = inputs
    ctx.dtypes = weight.dtype, (weight if bias is None else bias).dtype
    reduction = ctx.options[3]
    # The weight and bias are read again where the reduction is "none"; elsewhere they are here for
    # `first_order`, and cost nothing: parameters live anyway.
    again = target if reduction == "none" else None
    ctx.save_for_backward(*output[2:], x, index, again, weight, bias, norm_weight, norm_bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@first_order(
    "masked_linear_cross_entropy",
    'pass backend="reference", which keeps the logits and is differentiable as often as you like',
)
def _differentiate(ctx, dloss: Tensor | None, *_: None):
    nothing = (None,) * (len(ctx.options) + 1)
    if dloss is None or not any(ctx.needs):
        return (None,) * 7 + nothing
    gradients = torch.ops.beit_fast.masked_linear_cross_entropy_backward(
        dloss, *ctx.saved_tensors, *ctx.options, *ctx.dtypes, ctx.needs
    )
    dx, *others = (g if needed else None for g, needed in zip(gradients, ctx.needs, strict=True))
    return (dx, None, None, *others, *nothing)


torch.library.register_autograd(
    "beit_fast::masked_linear_cross_entropy", _differentiate, setup_context=_save
)


@register_flop_formula(torch.ops.beit_fast.masked_linear_cross_entropy)
def _flops(_x_shape, index_shape, _target_shape, weight_shape, *args, out_shape=None, **_) -> int:
    needs_x, needs_weight, _, *needs_norm = args[-1]
    num_products = 1 + needs_weight + (needs_x or any(needs_norm))
    return 2 * num_products * index_shape[0] * weight_shape[0] * weight_shape[1]


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
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (a scalar, or (I,)) and how many rows are predicted right (an int64 scalar).

    x (B, N, D) encoder output; index int32 or int64 (I,) into its B N rows, -1 is padding; target
    integers (I,), ignored where padded; weight (V, D) and bias (V,) of the head; norm_weight,
    norm_bias (D,) of the norm before it, None leaves the norm out. `reduction` is "mean" over the
    real rows, "sum", or "none". Without a real row the loss is 0 and so is every gradient.
    `chunk_rows` bounds the rows of logits at a time: more are quicker on a GPU, fewer take less
    memory. `backend` is one of "triton", the default on CUDA; "torch", the default on CPUs, the
    same in torch's own operations; "reference".
    A target or index out of range raises ValueError on a CPU. On a GPU `check_values` does so and
    waits for the device; without it nothing is read out of bounds and the loss becomes NaN, as it
    does where logits are not finite. Also raises ValueError where shapes do not fit.
    """
    _check(x, index, target, weight, reduction)
    _check_vectors(weight, bias, norm_weight, norm_bias)
    check_backend(backend, BACKENDS)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: pass 1 or more, or None to choose")
    options = {
        "norm_eps": float(norm_eps),
        "label_smoothing": float(label_smoothing),
        "z_loss": float(z_loss),
        "reduction": reduction,
    }
    if backend == "reference":
        return masked_linear_cross_entropy_reference(
            x, index, target, weight, bias, norm_weight, norm_bias, **options
        )
    dtype = weight.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(x.device) or dtype
    inputs = (x, weight, bias, norm_weight, norm_bias)
    grad = torch.is_grad_enabled()
    loss, num_correct, *_ = torch.ops.beit_fast.masked_linear_cross_entropy(
        x,
        index.contiguous(),
        target.contiguous(),
        *inputs[1:],
        *options.values(),
        dtype,
        chunk_rows or 0,
        check_values,
        backend or "",
        [grad and t is not None and t.requires_grad for t in inputs],
    )
    return loss, num_correct


def triton_obstacle(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take this x with products in dtype, or None."""
    if x.shape[2] > WIDEST:
        return f"the kernels take up to {WIDEST} channels, not {x.shape[2]}"
    return launch_obstacle(x, x.dtype, dtype, operator="masked_linear_cross_entropy")


def _resolve(backend: str, x: Tensor, dtype: torch.dtype) -> str:
    """The one place that decides, and says once for each reason where something slower runs."""
    if backend == "torch" or (backend == "" and x.device.type == "cpu"):
        return "torch"
    obstacle = triton_obstacle(x, dtype)
    return triton_or_torch("masked_linear_cross_entropy", backend, obstacle, _LOST)


def _check_values(x: Tensor, index: Tensor, target: Tensor, weight: Tensor) -> None:
    check_index_values(index, x.shape[0] * x.shape[1])
    V = weight.shape[0]
    wrong = ((target < 0) | (target >= V)) & (index != -1)
    if wrong.any():
        i = wrong.nonzero()[0].item()
        raise ValueError(
            f"target[{i}] is {target[i].item()}, and the weight has {V} rows: pass 0 .. {V - 1}, "
            "or mark the row as padding with index -1"
        )


def _check(x: Tensor, index: Tensor, target: Tensor, weight: Tensor, reduction: str) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2] or 0 in weight.shape:
        raise ValueError(
            f"x is {tuple(x.shape)}, the head's weight {tuple(weight.shape)}: pass x (B, N, D) "
            "and weight (V, D)"
        )
    check_floating(x=x, weight=weight)
    check_index(index)
    if target.shape != index.shape or target.dtype not in INDEX_DTYPES:
        raise ValueError(
            f"{target.dtype} targets {tuple(target.shape)} for {tuple(index.shape)} rows: pass one "
            "integer for each row, int64 or int32, padded ones included"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: pass 'mean', 'sum' or 'none'")


def _check_vectors(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    V, D = weight.shape
    wanted = {"bias": (bias, V), "norm_weight": (norm_weight, D), "norm_bias": (norm_bias, D)}
    for name, (vector, length) in wanted.items():
        if vector is not None and tuple(vector.shape) != (length,):
            raise ValueError(f"{name} is {tuple(vector.shape)}: pass ({length},), or None")
        check_floating(**{name: vector})
    if norm_weight is None and norm_bias is not None:
        raise ValueError("a norm_bias came without a norm_weight: pass ones, or no norm at all")
