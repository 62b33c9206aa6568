"""Attention with a trainable bias on a CPU: a few images at a time, so that scores stay in cache.

The scores of one image (H N M: 1.8 MB for Base at 224) stay in the cache between the products and
the softmax; nothing of that size is kept for backward, which computes P again from q and k; and
dbias is summed image by image, without a (B, H, N, M) gradient of the scores.
Where its mask wants a gradient torch's CPU attention runs unfused and keeps all of these.

16-bit inputs are computed in fp32. Works on any device, made for CPUs.
"""

import torch
from torch import Tensor

from beit_fast.kernels.philox import keep_mask_reference

# Images are taken together until their scores have this many values, 1 MiB in fp32.
SCORES_AT_A_TIME = 2**18


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """out (B, N, H, K) from q (B, N, H, K); k, v (B, M, H, K); bias (G, H, N, M) or None."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_BNHK = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bias = _Bias(bias, dtype)
    scratch = _scratch(q, k, dtype)
    for images in _chunks(q, k):
        q_SNK, k_SMK, v_SMK = (_slices(t, images, dtype) for t in (q, k, v))
        weights = _weights(q_SNK, k_SMK, bias, scale, images, scratch)
        if dropout_p:
            weights *= _keep(rng, dropout_p, q, k, images)
        _put(out_BNHK, images, weights @ v_SMK)
    return out_BNHK


def attention_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    trains_bias: bool,
) -> Tensor | None:
    """Writes dq, dk, dv where they are tensors; returns dbias (G, H, N, M) if it is trained."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dbias = torch.zeros(bias.shape, dtype=dtype, device=q.device) if trains_bias else None
    bias = _Bias(bias, dtype)
    scratch, dscratch = _scratch(q, k, dtype), _scratch(q, k, dtype)
    for images in _chunks(q, k):
        q_SNK, k_SMK, v_SMK, dout_SNK = (_slices(t, images, dtype) for t in (q, k, v, dout))
        weights = _weights(q_SNK, k_SMK, bias, scale, images, scratch)
        keep = _keep(rng, dropout_p, q, k, images) if dropout_p else None
        if dv is not None:
            kept = weights if keep is None else weights * keep
            _put(dv, images, kept.transpose(1, 2) @ dout_SNK)
        if dq is None and dk is None and not trains_bias:
            continue
        dscores = dscratch[: len(q_SNK)]
        torch.bmm(dout_SNK, v_SMK.transpose(1, 2), out=dscores)
        if keep is not None:
            dscores *= keep
        torch.ops.aten._softmax_backward_data(
            dscores, weights, -1, dtype, grad_input=dscores
        )  # weights (dscores - rowsum(dscores weights)), in one pass
        if dbias is not None:
            _add_images(dbias, dscores.view(-1, *dbias.shape[1:]), images)
        if dq is not None:
            _put(dq, images, (dscores @ k_SMK).mul_(scale))
        if dk is not None:
            _put(dk, images, (dscores.transpose(1, 2) @ q_SNK).mul_(scale))
    return dbias


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    B, N, H, _ = q.shape
    size = max(SCORES_AT_A_TIME // max(H * N * k.shape[1], 1), 1)
    return [slice(start, min(start + size, B)) for start in range(0, B, size)]


def _slices(tensor: Tensor, images: slice, dtype: torch.dtype) -> Tensor:
    """(B, N, H, K) to (S, N, K), one slice for each head of each image; a view of one image."""
    return tensor[images].transpose(1, 2).flatten(0, 1).to(dtype)


def _put(tensor: Tensor, images: slice, values_SNK: Tensor) -> None:
    """The opposite of `_slices`: write (S, N, K) into (B, N, H, K)."""
    H = tensor.shape[2]
    tensor[images].copy_(values_SNK.unflatten(0, (-1, H)).transpose(1, 2))


def _scratch(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the scores of a chunk: fresh memory for every chunk costs a tenth of the time."""
    _, N, H, _ = q.shape
    chunks = _chunks(q, k)
    num_images = chunks[0].stop if chunks else 0
    return q.new_empty((num_images * H, N, k.shape[1]), dtype=dtype)


class _Bias:
    """The bias, and the queries that see no key: their logits are put aside, their weights 0."""

    def __init__(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.values = self.masked = None
        if bias is None:
            return
        self.values = bias.to(dtype)
        # Not `(bias == -inf).all()`: 0.43 ms for H6-N197 on one core of an AMD EPYC, `amax` 0.03.
        masked = bias.amax(dim=-1, keepdim=True) == -torch.inf
        if masked.any():  # no device waits: this is for CPUs
            self.masked = masked
            self.values = self.values.masked_fill(masked, 0)

    def of(self, values: Tensor, images: slice) -> Tensor:
        """(S, N, ...) from (G, H, N, ...)."""
        return values[_groups(values, images)].flatten(0, 1)


def _weights(
    q_SNK: Tensor, k_SMK: Tensor, bias: _Bias, scale: float, images: slice, scratch: Tensor
) -> Tensor:
    """softmax(scale q k^T + bias), (S, N, M), in the scratch memory."""
    weights = scratch[: len(q_SNK)]
    k_SKM = k_SMK.transpose(1, 2)
    if bias.values is None:
        torch.bmm(q_SNK, k_SKM, out=weights).mul_(scale)
    else:
        bias_SNM = bias.of(bias.values, images)
        torch.baddbmm(bias_SNM, q_SNK, k_SKM, alpha=scale, out=weights)
    torch.softmax(weights, dim=-1, out=weights)
    if bias.masked is not None:
        weights.masked_fill_(bias.of(bias.masked, images), 0)
    return weights


def _add_images(dbias_GHNM: Tensor, dscores_IHNM: Tensor, images: slice) -> None:
    groups = _groups(dbias_GHNM, images)
    if isinstance(groups, slice):
        dbias_GHNM[groups] += dscores_IHNM
    else:
        dbias_GHNM.index_add_(0, groups, dscores_IHNM)


def _groups(bias: Tensor, images: slice) -> Tensor | slice:
    """Which biases these images have, image b the one of group b mod G."""
    if images.stop - images.start == 1:
        group = images.start % len(bias)
        return slice(group, group + 1)
    return torch.arange(images.start, images.stop, device=bias.device) % len(bias)


def _keep(rng: Tensor, dropout_p: float, q: Tensor, k: Tensor, images: slice) -> Tensor:
    _, N, H, _ = q.shape
    streams = torch.arange(images.start * H, images.stop * H, device=q.device)
    return keep_mask_reference(rng, dropout_p, N, k.shape[1], streams) / (1 - dropout_p)
