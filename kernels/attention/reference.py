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

import torch
from torch import Tensor

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
