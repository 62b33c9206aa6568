"""Attention as it is called: what is checked and cast, and the choice of where it runs.

Formulas, shapes and types: `reference.py`. What runs here are the operators of `operators.py`, or
another library (`backends.py`).
"""

import contextlib
import math

import torch
from torch import Tensor

from beit_fast.kernels.arguments import autocast_dtype, check_rng
from beit_fast.kernels.attention.backends import (
    Choice,
    attention_sdpa,
    attention_xformers,
    choose_backend,
    warn_of_fallback,
)
from beit_fast.kernels.attention.bias import pad_for
from beit_fast.kernels.attention.cpu import lse_of_bias
from beit_fast.kernels.attention.operators import dense_bias
from beit_fast.kernels.attention.reference import attention_lse_reference, attention_reference
from beit_fast.kernels.attention.rel_pos_bias import check_table, rel_pos_bias
from beit_fast.kernels.philox import draw_rng


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
    `backend` names one of `attention.backends.BACKENDS`; None chooses, see `attention_backend`.
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
            if self.backend in ("sdpa", "xformers"):
                raise ValueError(
                    f"backend={self.backend!r} draws its dropout itself: pass no rng with it"
                )
            check_rng(rng, q.device)
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
            lse = lse_of_bias(lse, dense_bias(self.bias, self.grid))
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
        # Not always: torch.export writes the context down.
        is_on = autocast_dtype(q.device) is not None
        with torch.autocast(q.device.type, enabled=False) if is_on else contextlib.nullcontext():
            return out, attention_lse_reference(q, k, bias, scale=self.scale)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
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
