"""Attention with a trainable bias on a CPU.

Forward is torch's own fused attention, as it runs without autograd: with a mask that wants a
gradient torch runs unfused, and keeps P. Backward computes P again from the log-sum-exp, exp((bias
- lse) + scale q k^T), a few heads at a time, so that nothing of size B H N M is ever stored.
Its rows are then made to sum to 1: where logits are large, the rounding of the log-sum-exp is an
error of all weights of a row.
That is one product and two passes more than torch's, and why backward alone is the slower one:
0.75 of SDPA-math's speed, both passes 1.04 at B4-H12-N197 and 0.88 at windows of 49 tokens (one
thread of an Intel Xeon without bf16, fp32: `bench/results/kernels-attention-cpu.csv`). In bf16,
with other work beside it and before rows were normalised again, both were 1.15 and 1.09. Keeping P
would save the product and the passes, and cost 7 MiB a layer at B4-H12-N197.

16-bit inputs: forward multiplies in their type and adds in fp32, as torch does there; backward is
in fp32, as SDPA-math is: torch's fused backward in bf16 took 2.4 to 4.1 times as long there. Not
measured on a processor with bf16 products of its own. Works on any device.

A trained bias whose row is hugely negative everywhere (-1e9) gives softmax(scale q k^T) here: rows
that lie far from zero are shifted, which changes no weight. torch's attention adds the two in fp32
where the bias absorbs the logits, and gives weights that do not depend on them.

Legend    G counts groups of images, image b in group b mod G; I images and X heads are computed
          together, S = X I slices
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.kernels.philox import keep_mask_reference

# So many scores are computed together for each thread: 2 MiB in fp32.
SCORES_AT_A_TIME = 2**19
# A bias beyond it is shifted, row by row, which changes no weight: the log-sum-exp of a row near
# -1e9 does not tell in fp32 whether it saw one key or two, and backward goes by it alone.
LARGEST_BIAS = 1e4


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
    *,
    lse: Tensor,
) -> Tensor:
    """out (B, N, H, K) from q (B, N, H, K); k, v (B, M, H, K); bias (G, H, N, M) or None.

    Writes lse (B, H, N), in fp32 or better: of biases near zero, which `attention_cpu_backward`
    goes by and `lse_of_bias` takes back; of rows that see no key any finite number.
    """
    bias = _near_zero(bias, lse.dtype)
    if not dropout_p and q.device.type == "cpu" and _has_flash():
        return _attention_flash(q, k, v, bias, scale, lse)
    out_BNHK = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plan = _Plan(q, k, bias, lse.dtype)
    beta, lowest = 0 if bias is None else 1, torch.finfo(lse.dtype).min
    for images in plan.images:
        q_all, kT_all, v_all = images.take(q), images.take(k, transposed=True), images.take(v)
        out_all, lse_all = torch.empty_like(q_all), q_all.new_empty((*q_all.shape[:2], 1))
        inputs = (q_all, kT_all, v_all, out_all, lse_all)
        parts = zip(plan.heads, *(images.parts(t) for t in inputs), strict=True)
        for heads, q_SNK, k_SKM, v_SMK, out_SNK, lse_SN1 in parts:
            weights_SNM = plan.scores[0, : len(q_SNK)]
            if bias is not None:
                images.grouped(weights_SNM).copy_(bias[images.group, heads, None])
            weights_SNM.baddbmm_(q_SNK, k_SKM, beta=beta, alpha=scale)
            # Where no key is seen all logits are -inf: the weights are 0 then, not NaN.
            top_SN1 = weights_SNM.amax(dim=-1, keepdim=True).clamp_(min=lowest)
            weights_SNM.sub_(top_SN1).exp_()
            sum_SN1 = weights_SNM.sum(dim=-1, keepdim=True).clamp_(min=1)
            torch.add(top_SN1, sum_SN1.log(), out=lse_SN1)
            if dropout_p:
                weights_SNM *= images.keep(rng, dropout_p, heads, q, k)
            torch.bmm(weights_SNM, v_SMK, out=out_SNK).div_(sum_SN1)
        images.put(out_BNHK, out_all)
        images.put(lse.transpose(1, 2)[..., None], lse_all)
    return out_BNHK


@functools.cache
def _has_flash() -> bool:
    # The operator is torch's, but private: a build without it still runs, on the products above.
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _attention_flash(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, lse: Tensor
) -> Tensor:
    B, N, H, K = q.shape
    G = 1 if bias is None else len(bias)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    # The groups become heads: image b has the bias of group b mod G.
    q_IXNK, k_IXMK, v_IXMK = (
        t.unflatten(0, (-1, G)).transpose(2, 3).flatten(1, 2) for t in (q, k, v)
    )
    mask = None if bias is None else bias.flatten(0, 1)[None]
    out_IXNK, lse_IXN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_IXNK, k_IXMK, v_IXMK, 0.0, False, attn_mask=mask, scale=scale
    )
    lse.copy_(lse_IXN.reshape(B, H, N))
    return out_IXNK.unflatten(1, (G, H)).transpose(2, 3).reshape(B, N, H, K).contiguous()


def attention_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    dlse: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    trains_bias: bool,
) -> Tensor | None:
    """Writes dq, dk, dv where they are tensors; returns dbias (G, H, N, M) if it is trained.

    dlse (B, H, N) is the gradient of lse, None where nothing depends on it.
    """
    dbias = torch.empty(bias.shape, dtype=lse.dtype, device=q.device) if trains_bias else None
    bias = _near_zero(bias, lse.dtype)
    plan = _Plan(q, k, bias, lse.dtype)
    scores_wanted = dq is not None or dk is not None or trains_bias
    for images in plan.images:
        q_all, k_all, dout_all, lse_all = (
            images.take(t) for t in (q, k, dout, lse.transpose(1, 2)[..., None])
        )
        # Small products are twice as fast in this layout.
        kT_all, vT_all = (images.take(t, transposed=True) for t in (k, v))
        # Gradients take the place of what is not needed any more.
        dq_all, dk_all, dv_all = dout_all, kT_all.view_as(k_all), vT_all.view_as(k_all)
        dlse_all = lse_all if dlse is None else images.take(dlse.transpose(1, 2)[..., None])
        inputs = (q_all, k_all, dout_all, lse_all, dlse_all, kT_all, vT_all)
        inputs += (dq_all, dk_all, dv_all)
        parts = zip(plan.heads, *(images.parts(t) for t in inputs), strict=True)
        for (
            heads, q_SNK, k_SMK, dout_SNK, lse_SN1, dlse_SN1, k_SKM, v_SKM, dq_SNK, dk_SMK, dv_SMK
        ) in parts:  # fmt: skip
            weights_SNM, dscores_SNM = plan.scores[:, : len(q_SNK)]
            if bias is None:
                torch.neg(lse_SN1.expand_as(weights_SNM), out=weights_SNM)
            else:
                bias_X1NM, lse_XIN1 = bias[images.group, heads, None], images.grouped(lse_SN1)
                torch.sub(bias_X1NM, lse_XIN1, out=images.grouped(weights_SNM))
            weights_SNM.baddbmm_(q_SNK, k_SKM, alpha=scale).exp_()
            # The rounding of a large lse is an error of the whole row, which this takes away.
            # Where no key is seen all weights are 0, and stay so.
            weights_SNM.div_(weights_SNM.sum(dim=-1, keepdim=True).clamp_(min=1e-30))
            keep_SNM = images.keep(rng, dropout_p, heads, q, k) if dropout_p else None
            if scores_wanted:
                torch.bmm(dout_SNK, v_SKM, out=dscores_SNM)
            if dv is not None:
                kept_SNM = weights_SNM if keep_SNM is None else weights_SNM * keep_SNM
                torch.bmm(kept_SNM.transpose(1, 2), dout_SNK, out=dv_SMK)
            if not scores_wanted:
                continue
            if keep_SNM is not None:
                dscores_SNM *= keep_SNM
            torch.ops.aten._softmax_backward_data(
                dscores_SNM, weights_SNM, -1, lse.dtype, grad_input=dscores_SNM
            )  # weights (dscores - rowsum(dscores weights)), in one pass
            if dlse is not None:
                dscores_SNM.addcmul_(weights_SNM, dlse_SN1)
            if dbias is not None:
                images.add(dbias[images.group, heads], dscores_SNM)
            if dk is not None:
                dk_SMK.baddbmm_(dscores_SNM.transpose(1, 2), q_SNK, beta=0, alpha=scale)
            if dq is not None:
                dq_SNK.baddbmm_(dscores_SNM, k_SMK, beta=0, alpha=scale)
        for gradient, values in ((dq, dq_all), (dk, dk_all), (dv, dv_all)):
            if gradient is not None:
                images.put(gradient, values)
    return dbias


class _Plan:
    """Which images and heads are computed together, and room for their scores, twice.

    Fresh memory for every part costs a tenth of the time.
    """

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        (B, N, H, _), M = q.shape, k.shape[1]
        G = 1 if bias is None else len(bias)
        most = SCORES_AT_A_TIME * torch.get_num_threads() // (N * M)
        num_images = min(max(most, 1), B // G)
        num_heads = min(max(most // num_images, 1), H)
        self.heads = _pieces(H, num_heads)
        self.images = [
            _Images(g, G, piece, num_heads, dtype)
            for g in range(G)
            for piece in _pieces(B // G, num_images)
        ]
        self.scores = q.new_empty((2, num_images * num_heads, N, M), dtype=dtype)


@dataclass(frozen=True)
class _Images:
    """Some images of one group, and how many of their heads make a part."""

    group: int
    num_groups: int
    images: slice  # counted within the group
    num_heads: int
    dtype: torch.dtype

    def take(self, tensor: Tensor, transposed: bool = False) -> Tensor:
        """(H I, N, K) or (H I, K, N), without gaps, from (B, N, H, K)."""
        view = self._view(tensor)
        view = view.transpose(2, 3) if transposed else view
        packed = torch.empty(view.shape, dtype=self.dtype, device=tensor.device)
        return packed.copy_(view).flatten(0, 1)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """The opposite of `take`."""
        self._view(tensor).copy_(self.grouped(values))

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """(S, ...) of each part."""
        return tensor.split(self.num_heads * self._num_images)

    def grouped(self, tensor: Tensor) -> Tensor:
        """(X, I, ...) from (S, ...)."""
        return tensor.unflatten(0, (-1, self._num_images))

    def add(self, dbias_XNM: Tensor, dscores_SNM: Tensor) -> None:
        """To the sum over images; the first ones begin it."""
        if self.images.start == 0:
            torch.sum(self.grouped(dscores_SNM), dim=1, out=dbias_XNM)
        else:
            dbias_XNM += self.grouped(dscores_SNM).sum(dim=1)

    def keep(self, rng: Tensor, dropout_p: float, heads: slice, q: Tensor, k: Tensor) -> Tensor:
        """The factor of each weight, (S, N, M)."""
        _, N, H, _ = q.shape
        image = torch.arange(self.images.start, self.images.stop, device=q.device)
        head = torch.arange(heads.start, heads.stop, device=q.device)
        streams = (image * self.num_groups + self.group) * H + head[:, None]
        kept = keep_mask_reference(rng, dropout_p, N, k.shape[1], streams.flatten())
        return kept / (1 - dropout_p)

    @property
    def _num_images(self) -> int:
        return self.images.stop - self.images.start

    def _view(self, tensor: Tensor) -> Tensor:
        """(H, I, N, K) of (B, N, H, K)."""
        return tensor[self.group :: self.num_groups][self.images].permute(2, 0, 1, 3)


def _pieces(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def lse_of_bias(lse: Tensor, bias: Tensor | None) -> Tensor:
    """The log-sum-exp (B, H, N) of a bias (G, H, N, M) as it is, from what `attention_cpu` wrote.

    -inf where a query sees no key.
    """
    if bias is None or bias.shape[-1] == 0:
        return lse
    bias = bias.detach().to(lse.dtype)
    highest_GHN = bias.amax(dim=-1)
    hidden_GHN = highest_GHN == -torch.inf
    # In tensors alone: torch.compile traces this.
    shift_GHN = torch.where(_is_near_zero(bias), 0, highest_GHN).masked_fill(hidden_GHN, 0)
    shift_BHN, hidden_BHN = (t.repeat(len(lse) // len(bias), 1, 1) for t in (shift_GHN, hidden_GHN))
    return (lse + shift_BHN).masked_fill(hidden_BHN, -torch.inf)


def _near_zero(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias, its rows shifted by their largest values where that is needed."""
    if bias is None:
        return None
    bias = bias.detach().to(dtype)
    if _is_near_zero(bias):  # no device waits: this is for CPUs
        return bias
    # The largest of a row is -inf where a query sees no key, and stays so.
    return bias - bias.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)


def _is_near_zero(bias: Tensor) -> Tensor:
    low, high = bias.aminmax()
    return torch.maximum(-low, high) <= LARGEST_BIAS
