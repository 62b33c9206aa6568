"""Inputs and yardstick of the special backward kernels of attention, for their two test files."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.kernels.attention.bias import bias_unit, pad_bias_reference, padded_length


@dataclass
class Case:
    q: Tensor  # (B, N, H, K)
    k: Tensor  # (B, M, H, K)
    v: Tensor
    dout: Tensor
    bias: Tensor  # padded
    scale: float
    out: Tensor = None
    lse: Tensor = None


NAMES = ("dq", "dk", "dv", "dbias")


def gradients(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """(dq, dk, dv, dbias), out, lse in base 2: PyTorch with matrix products in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    B, N, M, G = len(case.q), case.q.shape[1], case.k.shape[1], len(case.bias)
    raw = case.bias[:, :, :N, :M].to(wide) * (bias_unit(case.bias.dtype, case.scale) or 1)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (case.q, case.k, case.v)]
    leaves.append((raw * case.scale).requires_grad_())
    q, k, v, bias = leaves
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.mT).to(wide) * case.scale + bias[torch.arange(B, device=q.device) % G]
    masked = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(masked, 0.0).softmax(-1) * ~masked
    out = (weights.to(dtype) @ v).transpose(1, 2)
    out.backward(case.dout.to(dtype))
    lse = logits.logsumexp(-1).masked_fill(masked[..., 0], torch.inf) / torch.log(
        torch.tensor(2.0, dtype=wide)
    )
    return [leaf.grad.to(torch.float64) for leaf in leaves], out.detach(), lse.detach()


def make(
    B, N, M=None, *, H=1, K=64, G=1, dtype=torch.bfloat16, std=1.0, mask=False, bias=True,
    packed=True, device="cpu",
) -> Case:  # fmt: skip
    """Random inputs with out and lse from fp64; `mask` puts -inf into the bias and masks a row."""
    M = M or N
    generator = torch.Generator("cpu").manual_seed(N * M + B)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    scale = K**-0.5
    if packed and M == N:
        q, k, v = normal(B, N, 3, H, K).to(dtype).unbind(2)
    else:
        q, k, v = (normal(B, length, H, K).to(dtype) for length in (N, M, M))
    dense = std * normal(G, H, N, M)
    if mask:
        dense[normal(G, H, N, M) > 1] = -torch.inf
        dense[:, :, N // 2] = -torch.inf
    padded = pad_bias_reference(dense, scale, torch.float16)
    if not bias:
        row = torch.zeros(padded_length(M), dtype=torch.float16, device=device)
        row[M:] = -torch.inf
        padded = row.expand(G, H, padded_length(N), padded_length(M))
    case = Case(q, k, v, normal(B, N, H, K).to(dtype), padded, scale)
    _, out, lse = gradients(case, torch.float64)
    case.out, case.lse = out.to(dtype), lse.float().contiguous()
    return case


def run_backward(
    backward: Callable, case: Case, trains_bias=True, wanted="qkv", packed=True
) -> list[Tensor | None]:
    """(dq, dk, dv, partials) from a launcher; whatever it leaves unwritten is NaN."""
    B, N, H, K = case.q.shape
    M = case.k.shape[1]
    if packed and M == N:
        grads = list(case.q.new_full((B, N, 3, H, K), torch.nan).unbind(2))
    else:
        grads = [case.q.new_full((B, length, H, K), torch.nan) for length in (N, M, M)]
    dq, dk, dv = (grad if name in wanted else None for name, grad in zip("qkv", grads, strict=True))
    partials = backward(
        case.dout, case.q, case.k, case.v, case.bias, case.out, case.lse,
        scale=case.scale, dq=dq, dk=dk, dv=dv, trains_bias=trains_bias,
    )  # fmt: skip
    return [dq, dk, dv, partials]


def dbias_of(partials: Tensor, case: Case) -> Tensor:
    return partials[..., : case.q.shape[1], : case.k.shape[1]].double().sum(0)


def assert_exact(case: Case, results: list[Tensor | None]) -> None:
    """Error against fp64 <= 2 x eager PyTorch's in the same dtype, plus one rounding."""
    dtype = case.q.dtype
    wants, _, _ = gradients(case, torch.float64)
    theirs, _, _ = gradients(case, dtype)
    ours = [*results[:3], None if results[3] is None else dbias_of(results[3], case)]
    for name, want, their, our in zip(NAMES, wants, theirs, ours, strict=True):
        if our is None:
            continue
        eps = torch.finfo(dtype if name != "dbias" else torch.float32).eps
        allowed = 2 * (their - want).abs().amax() + eps * want.abs().amax()
        error = (our.double() - want).abs().amax()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
