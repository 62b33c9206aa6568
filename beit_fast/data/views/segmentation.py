"""What a segmenter learns from: a crop of a rescaled image with the labels of its pixels.

    scale -> crop -> flip -> distort            here, uint8, in the loader's threads
    normalise -> pad with 0                     on the device (`normalize_padded`)

The steps of mmsegmentation in their order, with its arithmetic: sizes and crops as its code has
them, nearest labels and colours to the level. The image is enlarged and shrunk by two taps without
antialiasing as OpenCV's INTER_LINEAR does it, but by torch's uint8 kernel, which rounds otherwise:
never by more than one level.

torchvision's `tv_tensors` go through operations that are not these but for that kernel, which its
`resize` of an image with antialias=False calls. Its `resize` of a mask finds the nearest pixel by
fp32, which misses OpenCV's by one where a position is nearly whole (a few pixels of 7 % of sizes),
and resizes all of it where the crop is enough; crop and flip are slices of both. So tensors of
their classes would carry nothing.

Source: mmsegmentation `Resize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion`, `Pad` in the
order of its `configs/_base_/datasets/ade20k.py`; mmcv `rescale_size`
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.masks import decode_pair
from beit_fast.data.sources.segmentation import MaskedImage
from beit_fast.data.views.config import SegmentationViewConfig
from beit_fast.data.views.distortion import distort, draw_distortion
from beit_fast.data.views.statistics import IMAGENET_MEAN, IMAGENET_STD
from beit_fast.data.views.two_views import flip_view, normalize
from beit_fast.labels import IGNORE

TRIES = 10  # crops that are looked at; one more is drawn and taken as it is

Box = tuple[int, int, int, int]  # top, left, height, width


class SegmentationSample:
    """A crop and its labels, for training a segmenter. A batch holds

        images  uint8 (B, height, width, 3), 0 outside the extent
        labels  int16 (B, height, width), IGNORE where nothing counts and outside the extent
        extent  int32 (B, 2): (height, width) of what is image, from the top left corner

    size: (height, width) in pixels. labels: from a mask file to labels int16 (height, width), as a
    `SegmentationSource` has it.
    """

    def __init__(
        self,
        size: tuple[int, int],
        view: SegmentationViewConfig,
        labels: Callable[[bytes], np.ndarray],
    ):
        self.size, self.view, self.labels = size, view, labels

    def __call__(self, data: MaskedImage, seed: SampleSeed) -> dict[str, np.ndarray]:
        view, rng = self.view, seed.rng("view")
        image, labels = decode_pair(data.image, data.mask, self.labels)
        resized = draw_size(*labels.shape, view, rng)
        rows, columns = (
            nearest(before, after) for before, after in zip(labels.shape, resized, strict=True)
        )

        def labels_of(box: Box) -> np.ndarray:
            top, left, height, width = box
            tall = labels.take(rows[top : top + height], axis=0)
            return tall.take(columns[left : left + width], axis=1)

        box, labels = choose_box(resized, self.size, labels_of, view.max_class_share, rng)
        top, left, height, width = box
        image = resize(image, resized)[top : top + height, left : left + width]
        image = np.ascontiguousarray(image)  # else all that follows takes thrice the time
        if rng.random() < view.hflip:
            image, labels = flip_view(image), labels[:, ::-1]
        if view.distort:
            image = distort(image, draw_distortion(seed.rng("distort")))
        return {
            "images": _padded(image, self.size, 0),
            "labels": _padded(labels, self.size, IGNORE),
            "extent": np.array([height, width], np.int32),
        }

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def draw_size(
    height: int, width: int, view: SegmentationViewConfig, rng: random.Random
) -> tuple[int, int]:
    """(height, width) that an image gets by a random scale."""
    ratio = rng.uniform(*view.ratio)
    long, short = (int(side * ratio) for side in view.scale)
    return rescaled(height, width, long, short)


def rescaled(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """(height, width) of an image made as large as fits: its long side into `long`, its short one
    into `short`. At least a pixel, where mmcv makes nothing of a thin image and fails."""
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest(before: int, after: int) -> np.ndarray:
    """For each of `after` pixels the one of `before` that INTER_NEAREST takes, in its doubles."""
    step = 1 / (after / before)
    return np.minimum((np.arange(after) * step).astype(np.intp), before - 1)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (*size, 3) from uint8 (height, width, 3), bilinear without antialiasing."""
    if image.shape[:2] == size:
        return image
    image_1CHW = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        image_1CHW, size, mode="bilinear", antialias=False, align_corners=False
    )
    return resized.permute(0, 2, 3, 1)[0].numpy()


def choose_box(
    size: tuple[int, int],
    crop: tuple[int, int],
    labels_of: Callable[[Box], np.ndarray],
    max_class_share: float,
    rng: random.Random,
) -> tuple[Box, np.ndarray]:
    """A random box of `crop` (height, width), cut off where an image of `size` ends; its labels.

    The first of ten that has two classes and none with `max_class_share` of its labelled pixels or
    more; where none has, an eleventh. At a share of 1 the first is taken.
    """
    height, width = (min(side, most) for side, most in zip(size, crop, strict=True))

    def draw() -> Box:
        top = rng.randint(0, size[0] - height)
        return top, rng.randint(0, size[1] - width), height, width

    box = draw()
    for _ in range(TRIES if max_class_share < 1 else 0):
        labels = labels_of(box)
        if is_mixed(labels, max_class_share):
            return box, labels
        box = draw()
    return box, labels_of(box)


def is_mixed(labels: np.ndarray, max_class_share: float) -> bool:
    """Whether labels are of two classes at least, none with that share of them or more."""
    counts = np.bincount(labels.reshape(-1) - IGNORE)[1:]  # what is ignored comes first
    counts = counts[counts > 0]
    return len(counts) > 1 and bool(counts.max() / counts.sum() < max_class_share)


def normalize_padded(
    images: Tensor,
    extent: Tensor,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`normalize` of the images, and exactly 0 outside their extent, on the device they are on.

    images uint8 (B, height, width, 3), extent int (B, 2) -> dtype (B, 3, height, width) in
    channels-last memory.
    """
    normal = normalize(images, mean, std, dtype)
    rows = torch.arange(images.shape[1], device=images.device) < extent[:, :1]
    columns = torch.arange(images.shape[2], device=images.device) < extent[:, 1:]
    outside = ~(rows[:, :, None] & columns[:, None, :])
    return normal.masked_fill_(outside[:, None], 0)


def _padded(array: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    """In the top left corner of an array of `size`."""
    if array.shape[:2] == size:
        return np.ascontiguousarray(array)
    out = np.full((*size, *array.shape[2:]), value, array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out
