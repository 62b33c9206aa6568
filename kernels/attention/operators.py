"""Attention with an additive, trainable bias that all images of the batch share.

    out[b,n,h] = sum_m Z[b,h,n,m] softmax_m(scale q[b,n,h] . k[b,m,h] + bias[g,h,n,m]) v[b,m,h]

    lse[b,h,n] = log sum_m exp(scale q[b,n,h] . k[b,m,h] + bias[g,h,n,m])

with g = b mod G, and Z = 1 without dropout, else 0 or 1 / (1 - p).

Shapes    q, out (B, N, H, K); k, v (B, M, H, K); packed qkv (B, N, 3, H, K); bias (H, N, M) or
          (G, H, N, M), G a divisor of B: one bias for each of G windows, images outermost
Types     bf16, fp16, fp32, on a CPU fp64; out has q's dtype; scores, softmax and all sums in fp32,
          and so is lse (B, H, N)
Masks     a bias of -inf hides a pair, and so does False in a bias of bool, which is a mask as
          SDPA's is; a query that sees no key gets zeros, and lse -inf
Backward  P the weights, dP = Z (dout v^T), dS = P (dP - rowsum(dout out)):
          dq = scale dS k;  dk = scale dS^T q;  dv = (Z P)^T dout;  dbias = sum_b dS, in fp32
          and with lse an output too, dS = P (dP - rowsum(dout out) + dlse)
          Deterministic: no atomics, the sum over images in a fixed order. Once differentiable
Dropout   Z[b,h,n,m] from `philox`: stream b H + h, quad n ceil(M / 4) + m / 4, word m mod 4
Cost      4 B H N M K operations forward, 10 backward; at N = 197 bound by memory: q, k, v, out
          and their gradients are moved once or twice, nothing of B H N M is ever stored
Source    BEiT arXiv:2106.08254, appendix A; logits and bias as unilm `modeling_finetune.py`;
          tiles and log-sum-exp as FlashAttention arXiv:2205.14135
Legend    M counts keys here (N in self-attention); G counts groups of images
"""

import contextlib
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from beit_fast.kernels.attention.backends import (
    Choice,
    attention_sdpa,
    attention_xformers,
    choose_backend,
    warn_of_fallback,
)
from beit_fast.kernels.attention.backward import attention_backward
from beit_fast.kernels.attention.bias import pad_bias, pad_for, sum_partials
from beit_fast.kernels.attention.cpu import attention_cpu, attention_cpu_backward, lse_of_bias
from beit_fast.kernels.attention.forward import attention_forward
from beit_fast.kernels.attention.rel_pos_bias import (
    check_table,
    reduce_to_table,
    reduce_to_table_cpu,
    rel_pos_bias,
)
from beit_fast.kernels.first_order import first_order
from beit_fast.kernels.philox import draw_rng, keep_mask_reference


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """The formula above, transcribed; `scale` defaults to K^-0.5."""
    (B, N, H, _), dtype = q.shape, torch.promote_types(q.dtype, torch.float32)
    logits_BHNM = _logits(q, k, bias, scale)
    # A softmax of nothing but -inf is NaN, and so is its gradient: such rows are put aside first.
    sees_none = (logits_BHNM == -torch.inf).all(dim=-1, keepdim=True)
    weights_BHNM = logits_BHNM.masked_fill(sees_none, 0).softmax(dim=-1)
    weights_BHNM = weights_BHNM.masked_fill(sees_none, 0)
    if dropout_p:
        rng = draw_rng(q.device) if rng is None else rng
        streams = torch.arange(B * H, device=q.device)
        keep = keep_mask_reference(rng, dropout_p, N, k.shape[1], streams)
        weights_BHNM = weights_BHNM * (keep.view(B, H, N, -1) / (1 - dropout_p))
    return (weights_BHNM @ v.transpose(1, 2).to(dtype)).transpose(1, 2).to(q.dtype)


def attention_lse_reference(
    q: Tensor, k: Tensor, bias: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """The second formula, (B, H, N) in fp32 or better; -inf where a query sees no key."""
    logits_BHNM = _logits(q, k, bias, scale)
    sees_none = (logits_BHNM == -torch.inf).all(dim=-1)
    lse_BHN = logits_BHNM.masked_fill(sees_none[..., None], 0).logsumexp(dim=-1)
    return lse_BHN.masked_fill(sees_none, -torch.inf)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """(B, H, N, M) in fp32 or better."""
    (B, _, _, K), dtype = q.shape, torch.promote_types(q.dtype, torch.float32)
    q_BHNK, k_BHMK = (t.transpose(1, 2).to(dtype) for t in (q, k))
    scale = K**-0.5 if scale is None else scale
    logits_BHNM = (q_BHNK * scale) @ k_BHMK.transpose(-2, -1)
    if bias is None:
        return logits_BHNM
    bias_GHNM = bias if bias.ndim == 4 else bias[None]
    return logits_BHNM + bias_GHNM.repeat(B // bias_GHNM.shape[0], 1, 1, 1)


# The operators. `bias` is dense, or a table (R, H) where `grid` is [Gh, Gw] and not []; `backend`
# is "triton" or "cpu"; `needs` says which gradients are wanted: of q, k, v or the packed qkv, and
# of the bias. The others come back empty. `padded` is the bias as the kernels read it, from where
# several layers share it; where it is None they pad the bias themselves. `lse` is what backward
# wants, of `_natural` what users do.
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
_DEVICES = ("CPU", "CUDA")


def _attention(q, k, v, bias, rng, grid, scale, dropout_p, backend, padded=None):
    B, N, H, K = q.shape
    lse_BHN = _empty_lse(q)
    if 0 in q.shape or k.shape[1] == 0:
        return q.new_zeros(B, N, H, K), lse_BHN.fill_(torch.inf)
    if backend == "cpu":
        with torch.autocast(q.device.type, enabled=False):
            bias = _dense(bias, grid)
            out_BNHK = attention_cpu(q, k, v, bias, rng, scale, dropout_p, lse=lse_BHN)
        return out_BNHK, lse_BHN
    out_BNHK = q.new_empty(B, N, H, K)
    q, k, v = (_last_contiguous(t) for t in (q, k, v))
    attention_forward(
        q,
        k,
        v,
        pad_bias(bias, grid, q, k.shape[1], scale) if padded is None else padded,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        tf32=_takes_tf32(),
        out=out_BNHK,
        lse=lse_BHN,
    )
    return out_BNHK, lse_BHN


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
    return tuple(q.new_empty(0) if t is None else t for t in (dq, dk, dv, dbias))


def _attention_qkvpacked_backward(
    dout, dlse, qkv, bias, out, lse, rng, grid, scale, dropout_p, backend, padded, needs
):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if needs[0] else None
    dq, dk, dv = (None,) * 3 if dqkv is None else dqkv.unbind(2)
    options = (rng, grid, scale, dropout_p, backend, padded)
    gradients = (dq, dk, dv, needs[1])
    dbias = _differentiate(dout, dlse, *qkv.unbind(2), bias, out, lse, *options, *gradients)
    return tuple(qkv.new_empty(0) if t is None else t for t in (dqkv, dbias))


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
    if backend == "cpu":
        with torch.autocast(q.device.type, enabled=False):
            dense = _dense(bias, grid)
            arguments = (dout, q, k, v, dense, lse, dlse, rng, scale, dropout_p)
            dbias = attention_cpu_backward(*arguments, dq, dk, dv, trained)
            if dbias is None:
                return None
            if grid:
                return reduce_to_table_cpu(dbias[0], grid, bias.dtype)
            return dbias.to(bias.dtype).view(bias.shape)
    q, k, v, dout = (_last_contiguous(t) for t in (q, k, v, dout))
    partials = attention_backward(
        dout,
        q,
        k,
        v,
        pad_bias(bias, grid, q, M, scale) if padded is None else padded,
        out,
        lse,
        # That of the natural logarithm, from that of the one to base 2.
        None if dlse is None else (dlse * math.log2(math.e)).contiguous(),
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


# As a decorator `impl` would leave None behind in place of the function.
torch.library.impl("beit_fast::attention", _DEVICES, _attention)
torch.library.impl("beit_fast::attention_qkvpacked", _DEVICES, _attention_qkvpacked)
torch.library.impl("beit_fast::attention_backward", _DEVICES, _attention_backward)
torch.library.impl(
    "beit_fast::attention_qkvpacked_backward", _DEVICES, _attention_qkvpacked_backward
)


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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v, (B, N, H, K), with a gradient for the bias.

    q (B, N, H, K); k, v (B, M, H, K), of q's dtype, any strides; under autocast they are cast to
    its dtype. bias (H, N, M) or (G, H, N, M), of any floating dtype, which its gradient has too;
    image b takes bias b mod G; -inf hides a pair. Or a mask of bool, True where a query sees a key,
    of any shape that broadcasts to one of these. `scale` is positive and defaults to K^-0.5.
    `dropout_p` drops weights (in eval the caller passes 0), by `rng`, the int64 (2,) seed and
    offset on q's device, or where it is None by fresh ones from torch's default generator.
    `backend` names one of `attention_backends.BACKENDS`; None chooses, see `attention_backend`.
    `return_lse` gives (out, lse) with the natural log-sum-exp of each query's logits, (B, H, N),
    fp32 or fp64, -inf where it sees no key, before dropout; gradients go through it too. So
    attention over parts of the keys becomes attention over all:

        lse = torch.logaddexp(lse_1, lse_2)
        out = (lse_1 - lse).exp().mT[..., None] * out_1 + (lse_2 - lse).exp().mT[..., None] * out_2

    On "sdpa" and "xformers", which have none to give, lse is computed apart, with the scores in
    memory. On "triton" with 16-bit queries a finite bias beyond 8000 counts as about 8000.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v)
    bias = _additive(bias, q, k)
    _check_bias(q, k, bias)
    options = _Options(q, k, v, bias, (), scale, dropout_p, rng, backend, return_lse)
    if options.runs_operator:
        return options.results(*torch.ops.beit_fast.attention(q, k, v, bias, *options.of_operator))
    return options.run_elsewhere(q, k, v, bias)


def attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on queries, keys and values from one product: (B, N, 3, H, K) -> (B, N, H, K).

    Without copies on the way in, and with one packed gradient on the way back.
    """
    (qkv,) = _autocast(qkv)
    q, k, v = _unpack(qkv)
    bias = _additive(bias, q, k)
    _check_bias(q, k, bias)
    options = _Options(q, k, v, bias, (), scale, dropout_p, rng, backend, return_lse)
    if options.runs_operator:
        operator = torch.ops.beit_fast.attention_qkvpacked
        return options.results(*operator(qkv, bias, *options.of_operator))
    return options.run_elsewhere(q, k, v, bias)


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` with the relative-position table of a (Gh, Gw) grid, and a gradient for it.

    table ((2 Gh - 1)(2 Gw - 1) + 3, H), as `rel_pos_bias` reads it; N = M = Gh Gw + 1. For a table
    that one layer has: one that layers share goes through `rel_pos_bias` once.
    """
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v)
    _check_table(q, k, table, grid)
    options = _Options(q, k, v, table, grid, scale, dropout_p, rng, backend, return_lse)
    if options.runs_operator:
        return options.results(*torch.ops.beit_fast.attention(q, k, v, table, *options.of_operator))
    return options.run_elsewhere(q, k, v, rel_pos_bias(table, grid))


def rel_pos_attention_qkvpacked(
    qkv: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rel_pos_attention` on a packed qkv: (B, N, 3, H, K) -> (B, N, H, K)."""
    (qkv,) = _autocast(qkv)
    q, k, v = _unpack(qkv)
    _check_table(q, k, table, grid)
    options = _Options(q, k, v, table, grid, scale, dropout_p, rng, backend, return_lse)
    if options.runs_operator:
        operator = torch.ops.beit_fast.attention_qkvpacked
        return options.results(*operator(qkv, table, *options.of_operator))
    return options.run_elsewhere(q, k, v, rel_pos_bias(table, grid))


def attention_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Choice:
    """What `attention` would run on with these arguments, and why if it is not the default.

    >>> attention_backend(*torch.zeros(3, 1, 5, 2, 8).unbind()).backend
    'sdpa'
    """
    q, k, v = _autocast(q, k, v)
    return choose_backend(q, k, v, _additive(bias, q, k), dropout_p, backend, return_lse)


class _Options:
    """The checked options of one call, and where it runs."""

    def __init__(self, q, k, v, bias, grid, scale, dropout_p, rng, backend, return_lse) -> None:
        self.scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale is {scale}: pass a positive number, or None for K^-0.5")
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p is {dropout_p}: pass a probability in [0, 1)")
        choice = choose_backend(q, k, v, bias, dropout_p, backend, return_lse)
        warn_of_fallback(choice)
        self.backend = choice.backend
        self.dropout_p = float(dropout_p)
        self.grid = list(grid)
        self.bias, self.return_lse = bias, return_lse
        self.runs_operator = self.backend in ("triton", "cpu")
        if rng is not None:
            _check_rng(rng, q, self.backend)
        elif dropout_p and self.backend not in ("sdpa", "xformers"):
            rng = draw_rng(q.device)
        self.rng = rng if dropout_p else None
        self.padded = None
        # A table is padded in the operator, there and back: no other layer reads it.
        if self.backend == "triton" and bias is not None and not grid and bias.numel():
            self.padded = pad_for(q, bias, self.scale)

    @property
    def of_operator(self) -> tuple:
        return self.rng, self.grid, self.scale, self.dropout_p, self.backend, self.padded

    def results(self, out: Tensor, lse: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What the caller wants of an operator's outputs."""
        return (out, self._natural(lse)) if self.return_lse else out

    def _natural(self, lse: Tensor) -> Tensor:
        """The log-sum-exp of base e, -inf where a query sees no key, from an operator's."""
        if self.backend == "cpu" and lse.numel():
            lse = lse_of_bias(lse, _dense(self.bias, self.grid))
        elif self.backend == "triton":
            lse = lse * math.log(2)
        return lse.masked_fill(lse.detach() == torch.inf, -torch.inf)

    def run_elsewhere(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.backend == "reference":
            options = {"scale": self.scale, "dropout_p": self.dropout_p, "rng": self.rng}
            out = attention_reference(q, k, v, bias, **options)
        else:
            run = attention_sdpa if self.backend == "sdpa" else attention_xformers
            bias_GHNM = bias if bias is None or bias.ndim == 4 else bias[None]
            out = run(q, k, v, bias_GHNM, self.scale, self.dropout_p)
        if not self.return_lse:
            return out
        kind = q.device.type
        # Not always: torch.export writes the context down.
        is_on = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if is_on else contextlib.nullcontext():
            return out, attention_lse_reference(q, k, bias, scale=self.scale)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


def _additive(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores: a mask of bool as 0 where it is True and -inf elsewhere."""
    if bias is None or bias.is_floating_point():
        return bias
    if bias.dtype != torch.bool:
        raise ValueError(
            f"the bias is {bias.dtype}: pass floats, which are added to the scores, or a mask of "
            "bool, True where a query sees a key (mask.bool(), where 1 says that)"
        )
    pairs = (q.shape[2], q.shape[1], k.shape[1])
    wanted = (*bias.shape[:-3], *pairs)
    if bias.ndim > 4 or any(
        ours not in (1, theirs)
        for ours, theirs in zip(bias.shape[::-1], wanted[::-1], strict=False)
    ):
        raise ValueError(
            f"the mask is {tuple(bias.shape)}, the attention {pairs} (heads, queries, keys): pass "
            "(N, M), (H, N, M), (B, 1, N, M) or what else broadcasts to it"
        )
    hidden = torch.zeros(bias.shape, dtype=q.dtype, device=bias.device)
    return hidden.masked_fill(~bias, -torch.inf).expand(wanted)


def _dense(bias: Tensor | None, grid: list[int]) -> Tensor | None:
    """A dense bias (G, H, N, M) from what an operator takes."""
    if bias is None:
        return None
    if grid:
        return torch.ops.beit_fast.rel_pos_bias(bias, grid)[None]
    return bias if bias.ndim == 4 else bias[None]


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv is {qkv.dtype} {tuple(qkv.shape)}: pass (B, N, 3, H, K), floats")
    return qkv.unbind(2)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: "
            "pass q (B, N, H, K) and k, v (B, M, H, K)"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has heads of {q.shape[3]} channels, k and v of {k.shape[3]}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype} and v {v.dtype}: cast them to one dtype, a floating one"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device} and v on {v.device}: move them")


def _check_bias(q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    wanted = (q.shape[2], q.shape[1], k.shape[1])
    if bias.ndim not in (3, 4) or tuple(bias.shape[-3:]) != wanted:
        raise ValueError(
            f"the bias is {tuple(bias.shape)}, the attention {wanted} (heads, queries, keys): "
            "resize the position table to the grid of the images, or pass one bias for all images"
        )
    G, B = bias.shape[0], q.shape[0]  # `len` would make numbers of an exporter's symbols
    if bias.ndim == 4 and (G == 0 or B % G):
        raise ValueError(
            f"{G} biases for {B} images: their number must divide that of the images "
            "(image b takes bias b mod G); pass (H, N, M), or (G, H, N, M) with B = G x images"
        )
    if bias.device != q.device:
        raise ValueError(f"the bias is on {bias.device}, q on {q.device}: move one of them")


def _check_table(q: Tensor, k: Tensor, table: Tensor, grid: tuple[int, int]) -> None:
    check_table(table, grid)
    N = grid[0] * grid[1] + 1
    if q.shape[1] != N or k.shape[1] != N:
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys, a grid of {grid[0]} x {grid[1]} patches "
            f"and [CLS] has {N}: pass the grid of the images"
        )
    if table.shape[1] != q.shape[2] or table.device != q.device:
        raise ValueError(
            f"a table of {table.shape[1]} heads on {table.device} for {q.shape[2]} heads on "
            f"{q.device}: pass (R, H) on q's device"
        )


def _check_rng(rng: Tensor, q: Tensor, backend: str) -> None:
    if backend in ("sdpa", "xformers"):
        raise ValueError(f"backend={backend!r} draws its dropout itself: pass no rng with it")
    if rng.shape != (2,) or rng.dtype != torch.int64 or rng.device != q.device:
        raise ValueError(
            f"rng is {rng.dtype} {tuple(rng.shape)} on {rng.device}: pass int64 (2,) on "
            f"{q.device}, such as philox.draw_rng gives"
        )
