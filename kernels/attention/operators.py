"""The operators of torch that attention is: on CUDA by the kernels, on a CPU by `cpu.py`.

Their schemas, what they run, what the compiler is told of them, their gradients and their
operations. What they compute: `reference.py`; what checks the arguments: `functional.py`.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from beit_fast.kernels._triton import contiguous_rows
from beit_fast.kernels.arguments import run_or_torch
from beit_fast.kernels.attention.backward import attention_backward
from beit_fast.kernels.attention.bias import pad_bias, sum_partials
from beit_fast.kernels.attention.cpu import attention_cpu, attention_cpu_backward, lse_of_bias
from beit_fast.kernels.attention.forward import attention_forward
from beit_fast.kernels.attention.rel_pos_bias import reduce_to_table, reduce_to_table_cpu
from beit_fast.kernels.first_order import first_order
from beit_fast.kernels.registration import implement, or_empty

# The operators. `bias` is dense, or a table (R, H) where `grid` is [Gh, Gw] and not []; `backend`
# is "triton" or "cpu"; `needs` says which gradients are wanted: of q, k, v or the packed qkv, and
# of the bias. The others come back empty. `padded` is the bias as the kernels read it, from where
# several layers share it; where it is None they pad the bias themselves. `lse` is what backward
# wants, of `_natural` what users do.
_LOST = "slower and not deterministic"
_OPTIONS = "Tensor? rng, SymInt[] grid, float scale, float dropout_p, str backend, Tensor? padded"
torch.library.define(
    "beit_fast::attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, {_OPTIONS}=None) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "beit_fast::attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, "
    f"Tensor lse, {_OPTIONS}, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
)
torch.library.define(
    "beit_fast::attention_qkvpacked",
    f"(Tensor qkv, Tensor? bias, {_OPTIONS}=None) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "beit_fast::attention_qkvpacked_backward",
    "(Tensor dout, Tensor? dlse, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool[] needs) -> (Tensor dqkv, Tensor dbias)",
)


def _attention(q, k, v, bias, rng, grid, scale, dropout_p, backend, padded=None):
    B, N, H, K = q.shape
    lse_BHN = _empty_lse(q)
    if 0 in q.shape or k.shape[1] == 0:
        return q.new_zeros(B, N, H, K), lse_BHN.fill_(torch.inf)

    def on_torch() -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            dense = dense_bias(bias, grid)
            return attention_cpu(q, k, v, dense, rng, scale, dropout_p, lse=lse_BHN)

    def on_torch_for_kernels() -> Tensor:
        """With the log-sum-exp as the kernels write it."""
        out_BNHK = on_torch()
        lse_BHN.copy_(lse_of_bias(lse_BHN, dense_bias(bias, grid)) * math.log2(math.e))
        lse_BHN.masked_fill_(lse_BHN == -torch.inf, torch.inf)
        return out_BNHK

    def on_kernels() -> Tensor:
        out_BNHK = q.new_empty(B, N, H, K)
        rows = (contiguous_rows(t) for t in (q, k, v))
        attention_forward(
            *rows,
            pad_bias(bias, grid, q, k.shape[1], scale) if padded is None else padded,
            scale=scale,
            dropout_p=dropout_p,
            rng=rng,
            tf32=_takes_tf32(),
            out=out_BNHK,
            lse=lse_BHN,
        )
        return out_BNHK

    if backend == "cpu":
        return on_torch(), lse_BHN
    return run_or_torch("attention", on_kernels, on_torch_for_kernels, lost=_LOST), lse_BHN


def _attention_qkvpacked(qkv, bias, rng, grid, scale, dropout_p, backend, padded=None):
    return _attention(*qkv.unbind(2), bias, rng, grid, scale, dropout_p, backend, padded)


def _attention_backward(
    dout, dlse, q, k, v, bias, out, lse, rng, grid, scale, dropout_p, backend, padded, needs
):
    dq, dk, dv = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
        for t, needed in zip((q, k, v), needs, strict=False)
    )
    options = (rng, grid, scale, dropout_p, backend, padded)
    dbias = _differentiate(dout, dlse, q, k, v, bias, out, lse, *options, dq, dk, dv, needs[3])
    return or_empty(q, (dq, dk, dv, dbias))


def _attention_qkvpacked_backward(
    dout, dlse, qkv, bias, out, lse, rng, grid, scale, dropout_p, backend, padded, needs
):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if needs[0] else None
    dq, dk, dv = (None,) * 3 if dqkv is None else dqkv.unbind(2)
    options = (rng, grid, scale, dropout_p, backend, padded)
    gradients = (dq, dk, dv, needs[1])
    dbias = _differentiate(dout, dlse, *qkv.unbind(2), bias, out, lse, *options, *gradients)
    return or_empty(qkv, (dqkv, dbias))


def _differentiate(
    dout, dlse, q, k, v, bias, out, lse, rng, grid, scale, dropout_p, backend, padded,
    dq, dk, dv, trained,
):  # fmt: skip
    """Write dq, dk, dv where they are tensors; return dbias in the bias's shape if it is wanted."""
    N, M = q.shape[1], k.shape[1]
    if 0 in q.shape or M == 0:
        for gradient in (dq, dk, dv):
            if gradient is not None:
                gradient.zero_()
        return torch.zeros_like(bias, memory_format=torch.contiguous_format) if trained else None

    def on_torch(lse: Tensor, dlse: Tensor | None) -> Tensor | None:
        with torch.autocast(q.device.type, enabled=False):
            dense = dense_bias(bias, grid)
            arguments = (dout, q, k, v, dense, lse, dlse, rng, scale, dropout_p)
            dbias = attention_cpu_backward(*arguments, dq, dk, dv, trained)
            if dbias is None:
                return None
            if grid:
                return reduce_to_table_cpu(dbias[0], grid, bias.dtype)
            return dbias.to(bias.dtype).view(bias.shape)

    # Of the natural logarithm, from that of the one to base 2 that the kernels give.
    natural = None if dlse is None or backend == "cpu" else (dlse * math.log2(math.e)).contiguous()

    def on_torch_for_kernels() -> Tensor | None:
        own = _empty_lse(q)  # not that of the kernels: of another base, and of the bias as it is
        with torch.autocast(q.device.type, enabled=False):
            attention_cpu(q, k, v, dense_bias(bias, grid), rng, scale, dropout_p, lse=own)
        return on_torch(own, natural)

    def on_kernels() -> Tensor | None:
        rows = (contiguous_rows(t) for t in (dout, q, k, v))
        partials = attention_backward(
            *rows,
            pad_bias(bias, grid, q, M, scale) if padded is None else padded,
            out,
            lse,
            natural,
            scale=scale,
            dropout_p=dropout_p,
            rng=rng,
            tf32=_takes_tf32(),
            dq=dq,
            dk=dk,
            dv=dv,
            trains_bias=trained,
        )
        if partials is None:
            return None
        if grid:
            return reduce_to_table(partials[:, 0], tuple(grid), bias.dtype)
        return sum_partials(partials, N, M, bias.dtype).view(bias.shape)

    if backend == "cpu":
        return on_torch(lse, dlse)
    return run_or_torch("attention", on_kernels, on_torch_for_kernels, lost=_LOST)


implement("attention", _attention)
implement("attention_qkvpacked", _attention_qkvpacked)
implement("attention_backward", _attention_backward)
implement("attention_qkvpacked_backward", _attention_qkvpacked_backward)


@torch.library.register_fake("beit_fast::attention")
def _(q, k, v, bias, rng, grid, scale, dropout_p, backend, padded=None):
    return q.new_empty(q.shape), _empty_lse(q)


@torch.library.register_fake("beit_fast::attention_qkvpacked")
def _(qkv, bias, rng, grid, scale, dropout_p, backend, padded=None):
    q = qkv.select(2, 0)
    return q.new_empty(q.shape), _empty_lse(q)


@torch.library.register_fake("beit_fast::attention_backward")
def _(dout, dlse, q, k, v, bias, out, lse, rng, grid, scale, dropout_p, backend, padded, needs):
    wanted = zip((q, k, v, bias), needs, strict=True)
    return tuple(_fake_gradient(q, t, needed) for t, needed in wanted)


@torch.library.register_fake("beit_fast::attention_qkvpacked_backward")
def _(dout, dlse, qkv, bias, out, lse, rng, grid, scale, dropout_p, backend, padded, needs):
    wanted = zip((qkv, bias), needs, strict=True)
    return tuple(_fake_gradient(qkv, t, needed) for t, needed in wanted)


def _fake_gradient(like: Tensor, tensor: Tensor | None, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape) if needed else like.new_empty(0)


def _save(ctx, inputs, output) -> None:
    # q, k, v or the packed qkv; bias, rng, and the options.
    # `padded` is not among what checkpointing counts: what recomputes a layer may not share it.
    *tensors, rng, ctx.grid, ctx.scale, ctx.dropout_p, ctx.backend, ctx.padded = inputs
    ctx.save_for_backward(*tensors, *output, rng)
    ctx.num_inputs = len(tensors)
    ctx.set_materialize_grads(False)


def _backward_of(name: str):
    @first_order(
        "attention",
        'pass backend="reference", or run the model inside use_backend("reference"), which keeps '
        "the scores and is differentiable as often as you like",
    )
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        num_inputs = ctx.num_inputs
        needs = list(ctx.needs_input_grad[:num_inputs])
        no_options = (None,) * 6
        if (dout is None and dlse is None) or not any(needs):
            return (None,) * num_inputs + no_options
        *saved, rng = ctx.saved_tensors
        dout = torch.zeros_like(saved[-2]) if dout is None else dout
        options = (rng, ctx.grid, ctx.scale, ctx.dropout_p, ctx.backend, ctx.padded)
        gradients = getattr(torch.ops.beit_fast, name)(dout, dlse, *saved, *options, needs)
        wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        return (*wanted, *no_options)

    return backward


for _name in ("attention", "attention_qkvpacked"):
    torch.library.register_autograd(
        f"beit_fast::{_name}", _backward_of(f"{_name}_backward"), setup_context=_save
    )


@register_flop_formula(torch.ops.beit_fast.attention)
def _flops(q_shape, k_shape, *_args, out_shape=None, **_kwargs) -> int:
    B, N, H, K = q_shape
    return 4 * B * H * N * k_shape[1] * K


@register_flop_formula(torch.ops.beit_fast.attention_qkvpacked)
def _flops_qkvpacked(qkv_shape, *_args, out_shape=None, **_kwargs) -> int:
    B, N, _, H, K = qkv_shape
    return 4 * B * H * N * N * K


@register_flop_formula(torch.ops.beit_fast.attention_backward)
def _flops_backward(_dout_shape, _dlse_shape, q_shape, k_shape, *_args, **_kwargs) -> int:
    return 5 * _flops(q_shape, k_shape) // 2


@register_flop_formula(torch.ops.beit_fast.attention_qkvpacked_backward)
def _flops_qkvpacked_backward(_dout_shape, _dlse_shape, qkv_shape, *_args, **_kwargs) -> int:
    return 5 * _flops_qkvpacked(qkv_shape) // 2


def dense_bias(bias: Tensor | None, grid: list[int]) -> Tensor | None:
    """A dense bias (G, H, N, M) from what an operator takes."""
    if bias is None:
        return None
    if grid:
        return torch.ops.beit_fast.rel_pos_bias(bias, grid)[None]
    return bias if bias.ndim == 4 else bias[None]


def _takes_tf32() -> bool:
    """Whether fp32 products may round to TF32: torch's own switch, off unless the user sets it.

    torch has two APIs for it; only this getter answers whichever the user has called, the others
    raise RuntimeError for a mix of both.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _empty_lse(q: Tensor) -> Tensor:
    """Room for the log-sum-exp (B, H, N) that backward wants: of base 2 in Triton, e on a CPU."""
    B, N, H, _ = q.shape
    return q.new_empty((B, H, N), dtype=torch.promote_types(q.dtype, torch.float32))
