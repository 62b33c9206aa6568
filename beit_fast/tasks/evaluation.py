"""Accuracy of a classifier on labelled images, each counted exactly once over all ranks."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.data.centre_view import centre_view
from beit_fast.data.datasets import ImageFolder
from beit_fast.data.decode import BadImageError
from beit_fast.data.views import normalize
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.train.parallel import World


@dataclass(frozen=True)
class Classification:
    num_images: int
    top1: float
    top5: float
    loss: float
    images_per_class: Tensor  # (C,) int64
    correct_per_class: Tensor
    images_per_second: float


def default_crop_pct(size: int | tuple[int, int]) -> float:
    """timm's: 224/256 below 384 px, the whole image from there on."""
    side = size if isinstance(size, int) else max(size)
    return 224 / 256 if side < 384 else 1.0


@torch.no_grad()
def evaluate_classifier(
    model: BeitForImageClassification,
    source: ImageFolder,
    labels: Tensor,
    *,
    num_classes: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    crop_pct: float,
    interpolation: str = "bicubic",
    precision: Literal["fp32", "bf16"],
    batch_size: int,
    num_threads: int,
    world: World,
) -> Classification:
    """Classify every image of `source`. Raises ValueError naming an image that cannot be read."""
    size, device = model.config.image_pixels, world.device
    mine = range(world.rank, len(source), world.size)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)

    def view(index: int) -> np.ndarray:
        try:
            return centre_view(source.read(index), size, crop_pct)
        except (BadImageError, OSError) as error:
            raise ValueError(f"cannot use {source.name(index)} ({error})") from error

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            for first in range(0, len(mine), batch_size):
                numbers = list(mine[first : first + batch_size])
                images = np.stack(list(pool.map(view, numbers)))
                yield torch.from_numpy(images).to(device), labels[numbers].to(device)

    was_training, begun = model.training, time.perf_counter()
    labels = labels.cpu()
    model.eval()
    try:
        for images, truth in batches():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(normalize(images, *statistics)).float()
            right = logits.topk(min(5, num_classes), dim=1).indices == truth[:, None]
            loss = F.cross_entropy(logits, truth, reduction="sum")
            sums += torch.stack([right[:, 0].sum(), right.any(dim=1).sum(), loss])
            counts[0] += torch.bincount(truth, minlength=num_classes)
            counts[1] += torch.bincount(truth[right[:, 0]], minlength=num_classes)
    finally:
        model.train(was_training)
    top1, top5, loss = (world.mean(sums) * world.size / len(source)).tolist()
    counts = (world.mean(counts.double()) * world.size).round().long().cpu()
    seconds = time.perf_counter() - begun
    return Classification(
        len(source), top1, top5, loss, counts[0], counts[1], len(source) / seconds
    )
