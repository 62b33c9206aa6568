"""Attention with an additive, trainable bias that all images of the batch share.

    out[b,n,h] = sum_m softmax_m(scale q[b,n,h] . k[b,m,h] + bias[h,n,m]) v[b,m,h]

Shapes    q, out (B, N, H, K); k, v (B, M, H, K); bias (H, N, M), (1, H, N, M) or None
Types     out has q's dtype; logits and softmax in fp32
Backward  P the weights, dP = dout v^T, dS = P (dP - rowsum(dP P)):
          dq = scale dS k;  dk = scale dS^T q;  dv = P^T dout;  dbias = sum_b dS
Cost      4 B H N M K multiply-adds forward, 2.5 times that backward
Source    BEiT arXiv:2106.08254, appendix A; logits and bias as unilm `modeling_finetune.py`
Legend    M counts keys here (N in self-attention)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The formula above, transcribed; `scale` defaults to K^-0.5."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BHNK, k_BHMK, v_BHMK = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits_BHNM = (q_BHNK * scale) @ k_BHMK.transpose(-2, -1)
    if bias is not None:
        logits_BHNM = logits_BHNM + bias
    weights_BHNM = F.dropout(logits_BHNM.softmax(dim=-1), dropout_p)
    return (weights_BHNM @ v_BHMK).transpose(1, 2).to(q.dtype)


class _PackedAttentionCpu(torch.autograd.Function):
    """Training with a trainable bias on the CPU, one image at a time.

    The scores of one image (H N^2: 1.8 MB for Base at 224) stay in the cache between the products
    and the softmax, nothing but the weights P is kept for backward, and dbias is summed without a
    (B, H, N, N) gradient of the scores. Where its mask wants a gradient, torch's CPU attention
    runs unfused. Forward and backward at B4-N197-H12-K64 in fp32, one core: 25 ms, against 34 for
    SDPA and 30 for the reference.
    """

    @staticmethod
    def forward(ctx, qkv_BN3HK: Tensor, bias_HNN: Tensor, scale: float) -> Tensor:
        B, N, _, H, K = qkv_BN3HK.shape
        weights_BHNN = qkv_BN3HK.new_empty(B, H, N, N)
        out_BNHK = qkv_BN3HK.new_empty(B, N, H, K)
        for qkv_N3HK, weights_HNN, out_NHK in zip(qkv_BN3HK, weights_BHNN, out_BNHK, strict=True):
            q_HNK, k_HNK, v_HNK = qkv_N3HK.permute(1, 2, 0, 3)
            torch.baddbmm(bias_HNN, q_HNK, k_HNK.transpose(1, 2), alpha=scale, out=weights_HNN)
            torch.softmax(weights_HNN, dim=-1, out=weights_HNN)
            out_NHK.copy_((weights_HNN @ v_HNK).transpose(0, 1))
        ctx.save_for_backward(qkv_BN3HK, weights_BHNN)
        ctx.scale = scale
        return out_BNHK

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BNHK: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv_BN3HK, weights_BHNN = ctx.saved_tensors
        dqkv_BN3HK = torch.empty_like(qkv_BN3HK)
        dbias_HNN = weights_BHNN.new_zeros(weights_BHNN.shape[1:])
        for qkv_N3HK, dqkv_N3HK, weights_HNN, dout_NHK in zip(
            qkv_BN3HK, dqkv_BN3HK, weights_BHNN, dout_BNHK, strict=True
        ):
            q_HNK, k_HNK, v_HNK = qkv_N3HK.permute(1, 2, 0, 3)
            dq_HNK, dk_HNK, dv_HNK = dqkv_N3HK.permute(1, 2, 0, 3)
            dout_HNK = dout_NHK.transpose(0, 1)
            dv_HNK.copy_(weights_HNN.transpose(1, 2) @ dout_HNK)
            dlogits_HNN = torch.ops.aten._softmax_backward_data(
                dout_HNK @ v_HNK.transpose(1, 2), weights_HNN, -1, weights_HNN.dtype
            )
            dbias_HNN += dlogits_HNN
            torch.mul(dlogits_HNN @ k_HNK, ctx.scale, out=dq_HNK)
            torch.mul(dlogits_HNN.transpose(1, 2) @ q_HNK, ctx.scale, out=dk_HNK)
        return dqkv_BN3HK, dbias_HNN, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + bias) v, (B, N, H, K), by torch's scaled_dot_product_attention.

    q (B, N, H, K); k, v (B, M, H, K); bias (H, N, M) or (1, H, N, M), cast to q's dtype, with its
    gradient. `scale` defaults to K^-0.5; `dropout_p` drops weights, in eval the caller passes 0.
    Raises ValueError where shapes do not fit.
    """
    _check(q, k, v, bias, dropout_p)
    if len(q) == 0:  # no images: torch 2.15 gives the mask no gradient at all, where zeros belong
        return attention_reference(q, k, v, bias, scale=scale, dropout_p=dropout_p)
    out_BHNK = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=None if bias is None else bias.to(q.dtype).view(1, *bias.shape[-3:]),
        dropout_p=dropout_p,
        scale=scale,
    )
    return out_BHNK.transpose(1, 2)


def attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` on queries, keys and values from one product: (B, N, 3, H, K) -> (B, N, H, K).

    The one attention the model calls. On the CPU in full precision, a bias that wants a gradient
    takes the path written for it here; all else, and everything under torch.compile, is SDPA.
    Raises ValueError where shapes do not fit.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv is {tuple(qkv.shape)}: pass (B, N, 3, H, K)")
    q, k, v = qkv.unbind(2)
    if dropout_p == 0 and _trains_bias_on_cpu(qkv, bias):
        _check(q, k, v, bias, dropout_p)
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        return _PackedAttentionCpu.apply(qkv, bias.view(bias.shape[-3:]), scale)
    return attention(q, k, v, bias, scale=scale, dropout_p=dropout_p)


def _trains_bias_on_cpu(qkv: Tensor, bias: Tensor | None) -> bool:
    return (
        bias is not None
        and bias.requires_grad
        and torch.is_grad_enabled()
        and qkv.device.type == "cpu"
        and qkv.dtype == bias.dtype
        and qkv.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: "
            "pass q (B, N, H, K) and k, v (B, M, H, K)"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has heads of {q.shape[3]} channels, k and v of {k.shape[3]}")
    wanted = (q.shape[2], q.shape[1], k.shape[1])
    if bias is not None and tuple(bias.shape) not in (wanted, (1, *wanted)):
        raise ValueError(
            f"the bias is {tuple(bias.shape)}, the attention {wanted} (heads, queries, keys): "
            "resize the position table to the grid of the images, or pass one bias for all images"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}: pass a probability in [0, 1)")
