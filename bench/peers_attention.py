"""Attention with a trained bias: ours, and what else a user can pick; and no bias, as the ceiling.

FlexAttention captures the dense bias, or the table and its index; cuDNN's own gradient of the bias
comes through nvidia-cudnn-frontend; torch's cuDNN back end takes no bias that is trained. What ends
in "-no-bias" computes less, and its speed is the goal.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from peer_cudnn import cudnn_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit_fast.kernels.attention import (
    attention_qkvpacked,
    attention_reference,
    rel_pos_attention_qkvpacked,
)
from beit_fast.kernels.attention.rel_pos_bias import (
    rel_pos_bias,
    relative_position_index,
    relative_position_rows,
)
from kernels import Case, require_as_exact, require_close, run_of, try_all

K = 64
# B, H, grid: the batch that the goals are stated for, then smaller and larger ones, other lengths.
CUDA_SHAPES = (
    (256, 12, (14, 14)),
    (256, 16, (14, 14)),
    (64, 12, (14, 14)),
    (512, 12, (14, 14)),
    (64, 12, (24, 24)),
    (64, 16, (24, 24)),
    (64, 12, (32, 32)),
    (64, 16, (32, 32)),
)
CPU_SHAPES = ((4, 12, (14, 14)),)
# Windows have no [CLS] and a dense bias: images, heads, tokens.
CUDA_WINDOWS = ((8192, 6, 49), (8192, 6, 64))
CPU_WINDOWS = ((64, 6, 49),)


def cases(device: torch.device, dtype: torch.dtype, only: str) -> Iterator[Case]:
    """Forward, backward and both of every shape, with the gradient of the bias and without."""
    is_cuda = device.type == "cuda"
    for B, H, grid in CUDA_SHAPES if is_cuda else CPU_SHAPES:
        yield from _cases_of_shape(B, H, grid[0] * grid[1] + 1, grid, device, dtype, only)
    for B, H, N in CUDA_WINDOWS if is_cuda else CPU_WINDOWS:
        yield from _cases_of_shape(B, H, N, None, device, dtype, only)


def attention_costs(B: int, N: int, H: int, K: int, size: int) -> dict[str, tuple[float, float]]:
    """(bytes, operations) of each pass: q, k, v, out and their gradients once, lse, the bias in 16
    bits, its gradient in fp32; the backward's first product is a repetition and counts."""
    traffic, product, dense = B * N * H * K * size, 2 * B * H * N * N * K, H * N * N
    forward = (4 * traffic + 4 * B * H * N + 2 * dense, 2 * product)
    frozen = (8 * traffic + 8 * B * H * N + 2 * dense, 5 * product)
    backward = (frozen[0] + 4 * dense, frozen[1])
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "backward-frozen": frozen, "both": both}


def _cases_of_shape(B, H, N, grid, device, dtype, only) -> Iterator[Case]:
    name = f"B{B}-H{H}-N{N}"
    passes = [
        f"{name}-{part}"
        for part in ("forward", "backward", "backward-frozen", "both")
        if only in f"{name}-{part}"
    ]
    if not passes:
        return
    qkv = torch.randn(B, N, 3, H, K, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn(B, N, H, K, device=device, dtype=dtype)
    if grid is None:
        bias = torch.randn(H, N, N, device=device, requires_grad=True)
        makers = _dense_peers(device)
        trained = dict.fromkeys(makers, bias)
    else:
        table = torch.randn(relative_position_rows(grid), H, device=device, requires_grad=True)
        bias = rel_pos_bias(table, grid).detach().requires_grad_()
        makers = {
            **_dense_peers(device),
            "ours-table": lambda q, t: rel_pos_attention_qkvpacked(q, t, grid),
        }
        trained = dict.fromkeys(makers, bias) | {"ours-table": table}
        if device.type == "cuda":
            makers["flex-table"] = _flex_table(relative_position_index(grid).to(device))
            trained["flex-table"] = table
    frozen = {name: tensor.detach() for name, tensor in trained.items()}
    costs = attention_costs(B, N, H, K, qkv.element_size())
    inputs = (qkv, dout, bias)
    for case in passes:
        part = case.removeprefix(f"{name}-")
        biases = frozen if part == "backward-frozen" else trained
        run = {peer: _bind(part, make, qkv, biases[peer], dout) for peer, make in makers.items()}
        run |= _ceilings(part, qkv, dout, device)
        if device.type == "cuda" and grid is not None:
            run |= _cudnn_frontend(part, *inputs)
        candidates, failed = try_all(run)
        check = functools.partial(_check, makers, qkv, trained, dout)
        yield Case(case, candidates, *costs[part], failed=failed, check=check)


def _bind(part: str, function, qkv: Tensor, bias: Tensor, dout: Tensor) -> Callable:
    """A maker for `try_all`: what it returns is timed."""

    def make():
        leaves = [t for t in (qkv, bias) if t.requires_grad]
        return run_of(part, lambda: function(qkv, bias), leaves, dout)

    return make


def _sdpa(backend: SDPBackend, qkv: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    mask = None if bias is None else bias.to(qkv.dtype)[None]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _dense_peers(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    peers = {
        "ours": attention_qkvpacked,
        "reference": functools.partial(attention_qkvpacked, backend="reference"),
        "sdpa-math": functools.partial(_sdpa, SDPBackend.MATH),
        "xformers": functools.partial(attention_qkvpacked, backend="xformers"),
    }
    if device.type == "cuda":
        peers["sdpa-efficient"] = functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)
        peers["sdpa-cudnn"] = functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
        peers["flex-dense"] = _flex_dense
    return peers


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(qkv: Tensor, score_mod: Callable) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return _compiled_flex()(q, k, v, score_mod=score_mod).transpose(1, 2)


def _flex_dense(qkv: Tensor, bias: Tensor) -> Tensor:
    return _flex(qkv, lambda score, b, h, n, m: score + bias[h, n, m])


def _flex_table(index: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda qkv, table: _flex(qkv, lambda score, b, h, n, m: score + table[index[n, m], h])


def _ceilings(part: str, qkv: Tensor, dout: Tensor, device: torch.device) -> dict[str, Callable]:
    if device.type != "cuda":
        return {}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    nothing = torch.empty(0, device=device)
    return {
        f"sdpa-{name}-no-bias": _bind(
            part, lambda q, _, backend=backend: _sdpa(backend, q, None), qkv, nothing, dout
        )
        for name, backend in backends.items()
    }


def _cudnn_frontend(part: str, qkv: Tensor, dout: Tensor, bias: Tensor) -> dict[str, Callable]:
    if part == "backward-frozen":
        return {}

    def make():
        forward, backward = cudnn_attention(qkv, bias, dout, K**-0.5)
        forward()
        both = lambda: (forward(), backward())  # noqa: E731
        return {"forward": forward, "backward": backward, "both": both}[part]

    return {"cudnn-frontend": make}


def _check(makers: dict, qkv: Tensor, trained: dict[str, Tensor], dout: Tensor) -> None:
    """Ours against the reference on two images: no time is printed for wrong numbers."""
    small, dsmall = qkv.detach()[:2].requires_grad_(), dout[:2]
    results = {}
    if qkv.dtype == torch.float32:
        exact = small.detach().double().requires_grad_()
        bias = trained["reference"].detach().double().requires_grad_()
        out = attention_reference(*exact.unbind(2), bias)
        results["exact"] = (out, *torch.autograd.grad(out, (exact, bias), dsmall.double()))
    for name in ("ours", "reference"):
        out = makers[name](small, trained[name])
        results[name] = (out, *torch.autograd.grad(out, (small, trained[name]), dsmall))
    if "exact" in results:
        require_as_exact(results["ours"], results["reference"], results["exact"])
        return
    require_close(results["ours"], results["reference"], qkv.dtype)
