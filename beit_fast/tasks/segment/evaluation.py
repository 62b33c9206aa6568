"""A segmenter on images with masks: one confusion matrix over the set, each image once over ranks.

IoU of a class = pixels that are it and are called it / pixels that are it or are called it. Pixels
add up over all images before anything is divided: the mean of the images' values is another number.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from beit_fast.data.sources.decode import BadImageError, exif_orientation
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.masks import decode_pair
from beit_fast.data.sources.reading import Read, Reads
from beit_fast.data.sources.segmentation import MaskedImage, SegmentationSource
from beit_fast.labels import IGNORE
from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.tasks.segment.sliding import Statistics, segment_image
from beit_fast.train.stop import Interrupted, heeded
from beit_fast.train.world import World

PLACE = "while evaluating"


@dataclass(frozen=True)
class Segmentation:
    """What was counted over all ranks; as mmsegmentation has the measures.

    A class that is nowhere, neither in the masks nor in what the model says, has no IoU: NaN, left
    out of the mean. One that the masks lack and the model sees has IoU 0, and no accuracy.
    """

    confusion: Tensor  # (C, C) int64, on the CPU: pixels of class [row] that are called [column]
    num_images: int
    images_per_second: float  # of all ranks together, reading included
    turned: tuple[str, ...] = ()  # images that EXIF turns, and viewers, but not this code

    @cached_property
    def iou(self) -> Tensor:
        """(C,) fp64."""
        right, true, called = self._counts
        return right / (true + called - right)

    @cached_property
    def acc(self) -> Tensor:
        """(C,) fp64: share of a class's pixels that are called so."""
        right, true, _ = self._counts
        return right / true

    @property
    def miou(self) -> float:
        return float(self.iou.nanmean())

    @property
    def macc(self) -> float:
        return float(self.acc.nanmean())

    @property
    def aacc(self) -> float:
        """Share of all labelled pixels that are right; NaN without any."""
        right, true, _ = self._counts
        return float(right.sum() / true.sum())

    @property
    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.confusion.diag().double(), self.confusion.sum(1), self.confusion.sum(0)


def evaluate_segmenter(
    model: nn.Module,
    source: SegmentationSource,
    *,
    slide: SlideConfig,
    statistics: Statistics,
    precision: Literal["fp32", "bf16"],
    num_threads: int,
    world: World,
    reads: ReadConfig = READS,
) -> Segmentation:
    """Measures of `model`, which is on the world's device, over `source`; every rank has them.

    Each rank takes one range of the images; what they count is whole numbers, so any number of
    ranks finds the same. The model is in eval mode meanwhile, and then as it was. Raises
    ValueError, on every rank, for an image or mask that cannot be read, for a model of another
    number of classes, and as `segment_image` does; Interrupted, on every rank, after a stop signal
    to one.
    """
    num_classes = len(source.classes)
    if model.config.num_classes != num_classes:
        raise ValueError(
            f"the model tells {model.config.num_classes} classes apart, the masks have "
            f"{num_classes}: evaluate it on the classes it was trained for, or train one on these, "
            "`beit-fast segment RECIPE --init ...`"
        )
    if not len(source):
        raise ValueError("there are no images to evaluate on: give some")
    first, last = (len(source) * rank // world.size for rank in (world.rank, world.rank + 1))
    turned: list[int] = []
    began = time.perf_counter()
    failed = None
    try:
        with Reads(source, reads) as limited:
            counted = _rank_images(
                model,
                read_ahead(
                    lambda index: read_pair(source, index, turned, limited.run),
                    range(first, last),
                    num_threads,
                    stop=limited.stop,
                ),
                lambda image: segment_image(model, image, slide, statistics, precision),
                num_classes,
                world.device,
            )
    except Interrupted as stop:  # the other ranks wait for this one: all of them raise
        counted = stop.signum
    except Exception as error:
        counted, failed = str(error), error
    parts = world.gather((counted, time.perf_counter() - began, sorted(turned)))
    if signum := max((c for c, *_ in parts if isinstance(c, int)), default=0):
        raise Interrupted(signum, PLACE)
    if failed is not None:
        raise failed
    if errors := [counted for counted, *_ in parts if isinstance(counted, str)]:
        raise ValueError(errors[0])
    return Segmentation(
        confusion=torch.stack([counted for counted, *_ in parts]).sum(dim=0),
        num_images=len(source),
        images_per_second=len(source) / max(seconds for _, seconds, _ in parts),
        turned=tuple(source.name(index) for *_, part in parts for index in part),
    )


def confusion_of(labels: Tensor, called: Tensor, num_classes: int) -> Tensor:
    """Pixels of class [row] that are called [column], int64 (C, C); those with IGNORE are not.

    labels and called: integers of one shape. Whole numbers add up to the same in any order, also
    on a GPU, whose bincount is only for weights a matter of chance.
    """
    counts = labels != IGNORE
    pairs = num_classes * labels[counts].long() + called[counts]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def read_pair(
    source: SegmentationSource,
    index: int,
    turned: list[int] | None = None,
    run: Callable[[Callable[[Read[MaskedImage]], Any]], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Image uint8 (height, width, 3), labels (height, width). Raises ValueError that names it.

    The index of an image that EXIF turns is added to `turned`. run: of a `Reads`; None: there is no
    limit of time.
    """

    def look(read: Read[MaskedImage]) -> tuple[MaskedImage, tuple[np.ndarray, np.ndarray]]:
        pair = read(index)
        return pair, decode_pair(pair.image, pair.mask, source.labels)

    try:
        pair, (image, labels) = look(source.read) if run is None else run(look)
    except (BadImageError, OSError) as error:
        raise ValueError(
            f"cannot use {source.name(index)} ({error}): repair or remove it; every image counts, "
            "so none is left out"
        ) from error
    if turned is not None and exif_orientation(pair.image) > 1:
        turned.append(index)
    return torch.from_numpy(image), torch.from_numpy(labels)


def read_ahead(
    read: Callable[[int], Any],
    indices: Sequence[int],
    num_threads: int,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
    """`read` of each index, in order, by threads that are up to twice their number ahead. `stop`
    is called at the end, before those that still read are waited for."""
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[Any]] = deque()
        try:
            for index in indices:
                ahead.append(pool.submit(read, index))
                if len(ahead) > 2 * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)


def _rank_images(
    model: nn.Module,
    pairs: Iterator[tuple[Tensor, Tensor]],
    segment: Callable[[Tensor], Tensor],
    num_classes: int,
    device: torch.device,
) -> Tensor:
    """The confusion matrix of this rank's images, on the CPU."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        with contextlib.closing(pairs):
            for image, labels in heeded(pairs, PLACE):
                confusion += confusion_of(labels.to(device), segment(image), num_classes)
    finally:
        model.train(was_training)
    return confusion.cpu()
