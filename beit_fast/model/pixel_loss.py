"""Cross-entropy of every pixel, from scores at a coarse size, few images at once.

    loss = -1/P sum_p [label_p counts] log softmax(enlarge(scores)_p)[label_p]

P counts all pixels, as mmsegmentation's CrossEntropyLoss does unless `avg_non_ignore`: what is
ignored adds 0 to the sum and 1 to the count.

Memory    scores at full size are 157 MB an image of 512 px and 150 classes; autograd keeps these of
          all images and as much for their gradient. Here the gradient is made with the loss, from
          CHUNK scores at once, and kept with the scores at the coarse size, a sixteenth
Types     arithmetic in fp32, of fp64 scores in fp64; the gradient has the scores' dtype
Source    mmsegmentation `models/losses/cross_entropy_loss.py`; the gradient with the loss as in
          Liger-Kernel `fused_linear_cross_entropy.py`
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.first_order import first_order
from beit_fast.labels import IGNORE
from beit_fast.model.bilinear import resize, resize_backward

CHUNK = 2**25  # scores at full size, 134 MB


def pixel_cross_entropy_reference(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`pixel_cross_entropy` by torch's operators, with every derivative and all in memory."""
    large = resize(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels.shape[1:])
    labels = labels.long()
    loss = F.cross_entropy(large, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()
    counted = labels != IGNORE
    chosen = large.gather(1, labels.masked_fill(~counted, 0)[:, None])[:, 0]
    right = (chosen >= large.amax(dim=1)) & counted
    return loss, (right.sum() / counted.sum().clamp(min=1)).detach()


def pixel_cross_entropy(
    scores: Tensor, labels: Tensor, *, backend: Literal["reference"] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean loss over all pixels, and the share of labelled pixels that are right (scalars).

    scores (B, C, h, w) are enlarged bilinearly to the labels, integer (B, height, width), IGNORE
    where a pixel does not count. A pixel whose label ties with another class counts as right.
    Raises ValueError for labels that are no class; on a GPU, which is not waited for, torch's own
    assertion fails. There are first derivatives alone, but with backend "reference".
    """
    if backend == "reference":
        return pixel_cross_entropy_reference(scores, labels)
    wants = torch.is_grad_enabled() and scores.requires_grad
    loss, share, _ = torch.ops.beit_fast.pixel_cross_entropy(scores, labels, wants)
    return loss, share.detach()


def _of_chunk(scores: Tensor, labels: Tensor, wants: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of the losses, how many are right, and the sum's gradient. Q: pixels of the chunk."""
    size = labels.shape[1:]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.contiguous(memory_format=torch.channels_last)
    large = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    # A pixel's scores lie together: half the time of a softmax that steps over an image a class.
    log_QC = large.permute(0, 2, 3, 1).flatten(0, 2).log_softmax(dim=1)
    label_Q1 = labels.flatten()[:, None].long()
    counted_Q1 = label_Q1 != IGNORE
    label_Q1 = label_Q1.masked_fill(~counted_Q1, 0)
    chosen_Q1 = log_QC.gather(1, label_Q1)
    right = ((chosen_Q1 >= log_QC.amax(dim=1, keepdim=True)) & counted_Q1).sum()
    loss = -torch.where(counted_Q1, chosen_Q1, 0).sum()
    if not wants:
        return loss, right, None
    one_Q1 = torch.ones_like(chosen_Q1)
    slope_QC = log_QC.exp_().scatter_add_(1, label_Q1, -one_Q1).mul_(counted_Q1)
    slope = slope_QC.unflatten(0, labels.shape).permute(0, 3, 1, 2)
    return loss, right, resize_backward(slope, scores.shape[2:])


# An operator: to the compiler one node, whose order of work, and so its memory, stays as it is.
torch.library.define(
    "beit_fast::pixel_cross_entropy",
    "(Tensor scores, Tensor labels, bool wants) -> (Tensor loss, Tensor share, Tensor gradient)",
)


def _pixel_cross_entropy(
    scores: Tensor, labels: Tensor, wants: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if labels.device.type == "cpu":
        _check_values(labels, scores.shape[1])
    at_once = max(1, CHUNK // (scores.shape[1] * labels[0].numel()))
    chunks = zip(scores.split(at_once), labels.split(at_once), strict=True)
    losses, rights, gradients = zip(*(_of_chunk(*c, wants) for c in chunks), strict=True)
    share = torch.stack(rights).sum() / (labels != IGNORE).sum().clamp(min=1)
    loss = torch.stack(losses).sum() / labels.numel()
    gradient = torch.cat(gradients) / labels.numel() if wants else loss.new_empty(0)
    return loss, share, gradient.contiguous()


def _check_values(labels: Tensor, num_classes: int) -> None:
    low, high = (int(end) for end in labels.aminmax())
    if low < IGNORE or high >= num_classes:
        wrong = low if low < IGNORE else high
        raise ValueError(
            f"labels have the value {wrong} and the classes are 0 to {num_classes - 1}: write "
            f"{IGNORE} where a pixel does not count, as labels.long().masked_fill(labels == "
            f"{wrong}, {IGNORE}) does"
        )


torch.library.impl("beit_fast::pixel_cross_entropy", ("CPU", "CUDA"), _pixel_cross_entropy)


@torch.library.register_fake("beit_fast::pixel_cross_entropy")
def _(scores: Tensor, labels: Tensor, wants: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(scores.dtype, torch.float32)
    loss = scores.new_empty((), dtype=dtype)
    gradient = scores.new_empty(scores.shape if wants else (0,), dtype=dtype)
    return loss, scores.new_empty((), dtype=torch.float32), gradient


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[2], inputs[0])  # the scores: what the gradient depends on


@first_order("pixel_cross_entropy", 'pass backend="reference"')
def _differentiate(ctx, dloss: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    gradient, scores = ctx.saved_tensors
    return (gradient * dloss).to(scores.dtype), None, None


torch.library.register_autograd(
    "beit_fast::pixel_cross_entropy", _differentiate, setup_context=_save
)
