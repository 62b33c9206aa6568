"""Random erasing, mixup and CutMix: drawn on the host with the batch, done on the device.

    erase    x = noise                          within the box of an image
    mixup    x = lam x + (1 - lam) x'           x' the batch in reverse
    CutMix   x = x'                             within one box for the batch, lam the share outside
    loss   = lam CE(y) + (1 - lam) CE(y')       with label smoothing

What is random comes with the batch as a few numbers, so the device works on fixed shapes and waits
for nothing, and a resumed run mixes what the undisturbed one does. An image in the middle of an odd
batch is its own partner: nothing happens to it (timm refuses odd batches).

Source: arXiv:1708.04896, 1710.09412, 1905.04899; timm `data/random_erasing.py`, `data/mixup.py`
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ERASED_AREA = (0.02, 1 / 3)  # of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width, log-uniform
TRIES = 10  # boxes drawn before an image is left whole


def draw_erase(
    height: int, width: int, probability: float, rng: random.Random
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what is erased in an image; all 0: nothing."""
    if rng.random() >= probability:
        return 0, 0, 0, 0
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(rng.uniform(low, high))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
            return top, left, box_height, box_width
    return 0, 0, 0, 0


def draw_mix(
    height: int, width: int, mixup: float, cutmix: float, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """How a batch is mixed: weights float32 (2,) and box int32 (4,), for `mix` and `mixed_loss`.

    mixup, cutmix: the alphas of their Beta distributions, not both 0; where neither is, either
    happens with probability 1/2. Weights are those of an image's own label and of its own pixels
    outside the box; CutMix's label has the weight of the area left to it.
    """
    cuts = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cuts else mixup
    lam = rng.betavariate(alpha, alpha)
    if not cuts:
        return np.array((lam, lam), np.float32), np.zeros(4, np.int32)
    side = math.sqrt(1 - lam)
    cut_height, cut_width = int(height * side), int(width * side)
    y, x = rng.randrange(height), rng.randrange(width)
    top, bottom = max(0, y - cut_height // 2), min(height, y + (cut_height + 1) // 2)
    left, right = max(0, x - cut_width // 2), min(width, x + (cut_width + 1) // 2)
    box = top, left, bottom - top, right - left
    share = 1 - box[2] * box[3] / (height * width)
    return np.array((share, 1.0), np.float32), np.array(box, np.int32)


def erase_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """N(0, 1) for every value of normalised images (B, C, height, width) within their boxes (B, 4).

    From torch's generator of the device.
    """
    return torch.where(_inside(boxes, images)[:, None], torch.randn_like(images), images)


def mix(images: Tensor, weights: Tensor, box: Tensor) -> Tensor:
    """Images (B, C, height, width) mixed with the batch in reverse, as `draw_mix` drew."""
    own = torch.where(_inside(box, images), 0.0, weights[1])
    return images * own + images.flip(0) * (1 - own)


def mixed_loss(
    logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of logits (B, C) under smoothed and, with `weights`, mixed labels (B,).

    What timm computes from soft targets (B, C), which are not made here.
    """
    log_p_BC = F.log_softmax(logits.float(), dim=1)
    log_p = log_p_BC.gather(1, labels[:, None])
    if weights is not None:
        other = log_p_BC.gather(1, labels.flip(0)[:, None])
        log_p = weights[0] * log_p + (1 - weights[0]) * other
    return -((1 - smoothing) * log_p.mean() + smoothing * log_p_BC.mean())


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Boxes (..., 4) as bool (..., height, width)."""
    top, left, box_height, box_width = boxes[..., None].unbind(-2)
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    rows = (y >= top) & (y < top + box_height)
    columns = (x >= left) & (x < left + box_width)
    return rows[..., :, None] & columns[..., None, :]
