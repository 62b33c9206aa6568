"""Images with masks as training takes them: those to learn from, and those to evaluate on."""

from pathlib import Path

import numpy as np
import torch

from beit_fast.data.sources.segmentation import (
    SegmentationSource,
    open_segmentation,
)
from beit_fast.data.sources.subset import Subset, split
from beit_fast.flags import flag
from beit_fast.tasks.segment.config import SegmentationDataConfig


class MaskedSubset(Subset):
    """Some of the images of a `SegmentationSource`, as one."""

    source: SegmentationSource

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...] | None:
        return self.source.palette

    def labels(self, mask: bytes) -> np.ndarray:
        return self.source.labels(mask)


def open_masked(
    data: SegmentationDataConfig,
) -> tuple[SegmentationSource, SegmentationSource | None]:
    """Images to train on, and those to evaluate on, if there are any.

    Which images are held out depends on them alone, so runs of other seeds compare. Raises
    ValueError as `open_segmentation` does, for parts of other classes, and for too few images.
    """
    source = _open(data, data.path, data.masks, "training")
    if data.held_out is not None:
        if len(source) < 2:
            raise ValueError(
                f"{flag('data.held_out')} is {data.held_out} and there is one image: add more, or "
                "pass null for it"
            )
        kept, held_out = split(torch.zeros(len(source), dtype=torch.int64), data.held_out)
        return MaskedSubset(source, kept), MaskedSubset(source, held_out)
    if data.test:
        # Classes without names are as many as the images have that are trained on.
        count = len(source.classes) if data.test_masks and not data.classes_file else None
        test = _open(data, data.test, data.test_masks, "validation", num_classes=count)
    elif not data.masks and (Path(data.path) / "images" / "validation").is_dir():
        test = _open(data, data.path, "", "validation")
    else:
        return source, None
    if test.classes != source.classes:
        raise ValueError(
            f"{data.path} has {len(source.classes)} classes and {data.test} {len(test.classes)}, "
            "or under other names: give images of the same classes, or name those of both with "
            f"{flag('data.classes_file')}"
        )
    return source, test


def _open(
    data: SegmentationDataConfig,
    path: str,
    masks: str,
    part: str,
    *,
    num_classes: int | None = None,
) -> SegmentationSource:
    return open_segmentation(
        path,
        masks=masks,
        part=part,
        classes_file=data.classes_file,
        ignore=data.ignore,
        num_classes=data.num_classes if num_classes is None else num_classes,
        follow_links=data.follow_links,
        reads=data,
    )
