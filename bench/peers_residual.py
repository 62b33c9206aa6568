"""Residual, LayerScale, drop path and the LayerNorm after them: ours, and what a user can pick.

No peer has the whole chain. apex, Liger and flash-attention bring the norm (flash-attention also
the addition and the factor of a sample); what they lack is done before by torch's operators.
"ours-folded" has gamma and the norm's affine in the neighbouring weights: less work, same model.
Bytes are those of the activations that each pass has to read and write; vectors are nothing.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.residual import scale_residual_norm, scale_residual_norm_reference
from kernels import Case, compiled, require_close, run_of, try_all

EPS = 1e-6
# The goals' shapes; both streams of the issue. On a CPU branches and stream are fp32.
CUDA_SHAPES = tuple(
    (256, 197, D, stream) for D in (768, 1024) for stream in (torch.bfloat16, torch.float32)
)
CPU_SHAPES = ((4, 197, 768, torch.float32),)
PASSES = ("forward", "backward", "both")


def cases(device: torch.device, dtype: torch.dtype, only: str) -> Iterator[Case]:
    """Forward, backward with the gradients of all vectors, and both; branches in `dtype`."""
    for B, N, D, stream in CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES:
        name = f"B{B}-N{N}-D{D}-{str(stream).removeprefix('torch.')}"
        passes = [part for part in PASSES if only in f"{name}-{part}"]
        if not passes:
            continue
        inputs = _inputs(B, N, D, stream, dtype, device)
        douts = [torch.randn_like(inputs[0]), torch.randn_like(inputs[1])]
        peers = _peers(device)
        check = functools.partial(_check, peers, inputs, douts)
        for part in passes:
            makers = {peer: _bind(part, run, inputs, douts) for peer, run in peers.items()}
            candidates, failed = try_all(makers)
            num_bytes = _num_bytes(part, inputs[0], inputs[1])
            yield Case(f"{name}-{part}", candidates, num_bytes, 0.0, failed=failed, check=check)


def _inputs(B, N, D, stream, dtype, device) -> list[Tensor]:
    """x, branch, gamma, norm weight, norm bias, all trained; keep, a tenth of it 0."""
    x = torch.randn(B, N, D, device=device).to(stream)
    branch = torch.randn(B, N, D, device=device).to(dtype)
    vectors = torch.randn(3, D, device=device).unbind()
    keep = (torch.rand(B, device=device) < 0.9) / 0.9
    return [*(t.detach().requires_grad_() for t in (x, branch, *vectors)), keep]


def _num_bytes(part: str, x: Tensor, branch: Tensor) -> float:
    # Forward: x, branch in; out, ln out. Backward: dout, out, dln, branch in; dx, dbranch out.
    forward = 2 * x.nbytes + 2 * branch.nbytes
    backward = 3 * x.nbytes + 3 * branch.nbytes
    return {"forward": forward, "backward": backward, "both": forward + backward}[part]


def _ours(x, branch, gamma, weight, bias, keep, *, function=scale_residual_norm, **options):
    norm_dtype = branch.dtype
    return function(x, branch, weight, bias, gamma, keep, eps=EPS, norm_dtype=norm_dtype, **options)


def _ours_folded(x, branch, gamma, weight, bias, keep):
    return scale_residual_norm(x, branch, keep=keep, eps=EPS, norm_dtype=branch.dtype)


def _eager(x, branch, gamma, weight, bias, keep):
    """The chain as timm writes it."""
    out = (x + keep[:, None, None].to(branch.dtype) * (gamma.to(branch.dtype) * branch)).to(x.dtype)
    ln = F.layer_norm(out.float(), out.shape[2:], weight, bias, EPS)
    return out, ln.to(branch.dtype)


def _apex(x, branch, gamma, weight, bias, keep):
    from apex.normalization.fused_layer_norm import FusedLayerNormAffineFunction

    out = torch.addcmul(x, keep[:, None, None] * gamma, branch).to(x.dtype)
    ln = FusedLayerNormAffineFunction.apply(out.float(), weight, bias, out.shape[2:], EPS)
    return out, ln.to(branch.dtype)


def _liger(x, branch, gamma, weight, bias, keep):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    out = torch.addcmul(x, keep[:, None, None] * gamma, branch).to(x.dtype)
    return out, LigerLayerNormFunction.apply(out, weight, bias, EPS).to(branch.dtype)


def _flash_attention(x, branch, gamma, weight, bias, keep):
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    ln, out = layer_norm_fn(
        gamma.to(branch.dtype) * branch,
        weight,
        bias,
        residual=x,
        eps=EPS,
        rowscale=keep[:, None].expand(x.shape[:2]),
        prenorm=True,
        residual_in_fp32=x.dtype == torch.float32,
    )
    return out, ln


def _peers(device: torch.device) -> dict[str, Callable]:
    peers = {
        "ours": _ours,
        "ours-folded": _ours_folded,
        "torch": functools.partial(_ours, backend="torch"),
        "reference": functools.partial(_ours, function=scale_residual_norm_reference),
        "eager": _eager,
    }
    if device.type == "cuda":
        peers |= {
            **compiled(peers["reference"]),
            "apex": _apex,
            "liger": _liger,
            "flash-attention": _flash_attention,
        }
    return peers


def _bind(part: str, function: Callable, inputs: list[Tensor], douts: list[Tensor]) -> Callable:
    """A maker for `try_all`: what it returns is timed."""

    leaves = inputs[:2] if function is _ours_folded else inputs[:5]

    def make():
        return run_of(part, lambda: function(*inputs), leaves, douts)

    return make


def _check(peers: dict[str, Callable], inputs: list[Tensor], douts: list[Tensor]) -> None:
    """Ours against the reference on two samples: no time is printed for wrong numbers."""
    x, branch, *vectors, keep = inputs
    small = [t.detach()[:2].requires_grad_() for t in (x, branch)]
    leaves = [*small, *vectors]
    results = {}
    for name in ("ours", "reference"):
        outputs = peers[name](*leaves, keep[:2])
        gradients = torch.autograd.grad(outputs, leaves, [d[:2] for d in douts])
        results[name] = (*outputs, *gradients)
    require_close(results["ours"], results["reference"], branch.dtype)
