"""A classifier on labelled images: each counts exactly once, whatever the ranks and the batches."""

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.data.in_order import batches_in_order
from beit_fast.data.sources.folder import ImageSource
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.views.centre_view import centre_view
from beit_fast.data.views.config import CropMode, Interpolation
from beit_fast.kernels.input.patches import normalized_patches
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.train.prefetch import Batch, device_batches
from beit_fast.train.stop import Interrupted, heeded
from beit_fast.train.world import World


@dataclass(frozen=True)
class Classification:
    """What was counted over all ranks; shares are of images, not means of classes."""

    num_images: int
    top1: float
    top5: float  # with fewer than five classes, of all of them
    loss: float  # mean cross-entropy
    images_per_class: Tensor  # (C,) int64
    correct_per_class: Tensor  # (C,) int64, top-1
    images_per_second: float  # of all ranks together, reading included


def evaluate_classifier(
    model: BeitForImageClassification,
    source: ImageSource,
    labels: Tensor,
    *,
    num_classes: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    crop_pct: float,
    interpolation: Interpolation = "bicubic",
    crop_mode: CropMode = "center",
    precision: Literal["fp32", "bf16"],
    batch_size: int,
    num_threads: int,
    world: World,
    reads: ReadConfig = READS,
) -> Classification:
    """Accuracy and loss of `model`, which is on the world's device; every rank has the result.

    labels int64 (n,), the model's class of each image of `source`. Each rank takes one range of the
    images. The model is in eval mode meanwhile, and then as it was.
    Raises ValueError, on every rank, for an image that cannot be read, and for labels that fit
    neither the images nor the model; Interrupted, on every rank, after a stop signal to one.
    """
    _check(model, source, labels, num_classes)
    first, last = (len(source) * rank // world.size for rank in (world.rank, world.rank + 1))
    mine = labels[first:last]
    views = batches_in_order(
        source,
        range(first, last),
        functools.partial(
            centre_view,
            size=model.config.image_pixels,
            crop_pct=crop_pct,
            interpolation=interpolation,
            crop_mode=crop_mode,
        ),
        batch_size=batch_size,
        num_threads=num_threads,
        reads=reads,
    )
    began = time.perf_counter()
    failed = None
    try:
        counted = _rank_images(model, views, mine, statistics, precision, world.device)
    except Interrupted as stop:  # the other ranks wait for this one: all of them raise
        counted = stop.signum
    except Exception as error:
        counted, failed = str(error), error
    parts = world.gather((counted, time.perf_counter() - began))
    if signum := max((c for c, _ in parts if isinstance(c, int)), default=0):
        raise Interrupted(signum, "while evaluating")
    if failed is not None:
        raise failed
    if errors := [counted for counted, _ in parts if isinstance(counted, str)]:
        raise ValueError(errors[0])
    ranks, losses = (torch.cat([counted[i] for counted, _ in parts]) for i in (0, 1))
    correct = ranks == 0
    return Classification(
        num_images=len(source),
        top1=int(correct.sum()) / len(source),
        top5=int((ranks < 5).sum()) / len(source),
        loss=math.fsum(losses.tolist()) / len(source),
        images_per_class=torch.bincount(labels, minlength=num_classes),
        correct_per_class=torch.bincount(labels[correct], minlength=num_classes),
        images_per_second=len(source) / max(seconds for _, seconds in parts),
    )


def default_crop_pct(size: int | tuple[int, int]) -> float:
    """The original's share of the short side: 224/256 below 384 pixels, everything from there."""
    return 224 / 256 if (size if isinstance(size, int) else max(size)) < 384 else 1.0


def ranks_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label, int64 (B,), from logits (B, C); 0 is a hit.

    Of equal scores the lower class comes first, so a head of zeros knows nothing. A score that is
    not a number comes before all others, and a label with such a score after all.
    """
    of_label = logits.gather(1, labels[:, None])
    before = ~(logits <= of_label)
    classes = torch.arange(logits.shape[1], device=logits.device)
    before |= (logits == of_label) & (classes < labels[:, None])
    return before.sum(dim=1)


@torch.no_grad()
def _rank_images(
    model: BeitForImageClassification,
    views: Iterator[tuple[slice, Tensor]],
    labels: Tensor,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    precision: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Rank of the label int64 (n,) and loss fp32 (n,) of each image, on the CPU.

    They stay on the device until all are there: no batch waits for the one before.
    """
    ranks = torch.empty(len(labels), dtype=torch.int64, device=device)
    losses = torch.empty(len(labels), dtype=torch.float32, device=device)

    def prepare(batch: Batch) -> Batch:
        patches = normalized_patches(batch["images"], model.config.patch_pixels, *statistics)
        return {"images": patches, "labels": batch["labels"]}

    read = heeded(views, "while evaluating")
    batches = ({"images": images, "labels": labels[where]} for where, images in read)
    was_training = model.training
    model.eval()
    done = 0
    try:
        with (
            contextlib.closing(views),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            for batch in device_batches(batches, device, prepare):
                logits = model(batch["images"]).float()
                here = slice(done, done + len(logits))
                ranks[here] = ranks_of_labels(logits, batch["labels"])
                losses[here] = F.cross_entropy(logits, batch["labels"], reduction="none")
                done = here.stop
    finally:
        model.train(was_training)
    return ranks.cpu(), losses.cpu()


def _check(
    model: BeitForImageClassification, source: ImageSource, labels: Tensor, num_classes: int
) -> None:
    if model.config.num_classes != num_classes:
        raise ValueError(
            f"the model scores {model.config.num_classes} classes, the images have {num_classes}: "
            "evaluate it on the classes it was trained for, or fine-tune it on these"
        )
    if not len(source) or len(labels) != len(source):
        raise ValueError(f"{len(labels)} labels for {len(source)} images: pass one for each")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}: pass classes 0 to "
            f"{num_classes - 1}"
        )
