"""Which implementation attention runs on, and the two that belong to other libraries.

triton      the kernels of this package, deterministic; the default on CUDA
cpu         `attention_cpu`, deterministic; the default on a CPU for a bias that is trained, and
            where the log-sum-exp is wanted
sdpa        torch's scaled_dot_product_attention; the default on a CPU for all else, and in what
            `torch.export` makes
xformers    xformers' memory_efficient_attention, if it is installed
reference   the formula, in fp32
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import _failed, exporting, launch_obstacle, warn_once
from beit_fast.kernels.arguments import cannot_run, check_backend

BACKENDS = ("triton", "cpu", "sdpa", "xformers", "reference")
WIDEST_HEAD = 128

_preferred: str | None = None


@dataclass(frozen=True)
class Choice:
    """The back end that runs, and why it is not the default, if it is not."""

    backend: str
    fallback: str | None = None


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run whole models on a back end: for comparison, and as a way out.

    >>> with use_backend("sdpa"):
    ...     model(images)  # doctest: +SKIP

    What a call names itself comes first. Not for threads that want different ones.
    """
    global _preferred
    check_backend(backend, BACKENDS)
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    backend: str | None,
    return_lse: bool = False,
) -> Choice:
    """The one place that decides. `backend` is the caller's wish, or None.

    Raises ValueError where the wish cannot be granted, ImportError where xformers is not there.
    """
    backend = _preferred if backend is None else backend
    check_backend(backend, BACKENDS)
    if backend == "triton":
        obstacle = triton_obstacle(q)
        if obstacle is not None:
            raise cannot_run(backend, obstacle)
    if backend == "xformers":
        _import_xformers()
    if backend is not None:
        return Choice(backend)
    if exporting():
        return Choice("sdpa")
    if q.device.type in ("cpu", "meta"):
        trained = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        # SDPA has no dropout that the reference can repeat, and of an empty batch torch 2.15 gives
        # the mask no gradient at all, where zeros belong. Nor does SDPA give its log-sum-exp.
        empty = 0 in q.shape or 0 in k.shape
        return Choice("cpu" if trained or dropout_p or empty or return_lse else "sdpa")
    obstacle = triton_obstacle(q)
    if obstacle is None:
        return Choice("triton")
    return Choice("sdpa", fallback=obstacle)


def triton_obstacle(q: Tensor) -> str | None:
    """Why the Triton kernels cannot take these queries, or None."""
    if q.shape[3] > WIDEST_HEAD:
        return f"the kernels take heads of up to {WIDEST_HEAD} channels, not {q.shape[3]}"
    return launch_obstacle(q, q.dtype, operator="attention")


def warn_of_fallback(choice: Choice) -> None:
    """Say once for each reason that something slower runs."""
    if choice.fallback is not None and choice.fallback != _failed.get("attention"):  # said then
        warn_once(
            f"attention runs on {choice.backend}, slower and not deterministic: {choice.fallback}"
        )


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """softmax(scale q k^T + bias) v by torch, (B, N, H, K); bias (G, H, N, M) or None."""
    B, N, H, K = q.shape
    if bias is not None and not torch.is_grad_enabled():
        bias = bias.detach()  # SDPA looks at requires_grad alone, and takes twice the time
    G = 1 if bias is None else bias.shape[0]  # `len` would make a number of an exporter's symbol
    if G in (1, B):
        mask = None if bias is None else bias.to(q.dtype)
        q_BHNK, k_BHMK, v_BHMK = (t.transpose(1, 2) for t in (q, k, v))
        out_BHNK = F.scaled_dot_product_attention(
            q_BHNK, k_BHMK, v_BHMK, attn_mask=mask, dropout_p=dropout_p, scale=scale
        )
        out_BNHK = out_BHNK.transpose(1, 2)
        # Strides are the implementation's, and a program may run on another one: ONNX does.
        return out_BNHK.clone(memory_format=torch.contiguous_format) if exporting() else out_BNHK
    # The groups become heads: image b has the bias of group b mod G.
    q_IXNK, k_IXMK, v_IXMK = (
        t.unflatten(0, (-1, G)).transpose(2, 3).flatten(1, 2) for t in (q, k, v)
    )
    out_IXNK = F.scaled_dot_product_attention(
        q_IXNK,
        k_IXMK,
        v_IXMK,
        attn_mask=bias.to(q.dtype).flatten(0, 1)[None],
        dropout_p=dropout_p,
        scale=scale,
    )
    return out_IXNK.unflatten(1, (G, H)).transpose(2, 3).reshape(B, N, H, K)


def attention_xformers(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """As `attention_sdpa`, by xformers. It wants the bias of every image, (B, H, N, M), aligned."""
    mask = None
    if bias is not None:
        M = k.shape[1]
        # Its rows must begin at multiples of 16 bytes: allocate to 8, use M.
        padded = F.pad(bias.to(q.dtype), (0, -M % 8))
        mask = padded.repeat(len(q) // len(bias), 1, 1, 1)[..., :M]
    return _import_xformers().memory_efficient_attention(q, k, v, mask, dropout_p, scale)


def _import_xformers():
    try:
        import xformers.ops
    except ImportError as error:
        raise ImportError(
            "backend='xformers' needs xformers: pip install xformers, or leave the choice to us "
            "with backend=None"
        ) from error
    return xformers.ops
