"""Colour jitter of a batch of crops, on the device that trains.

Brightness, contrast and saturation, in the order each image drew, are one blend with three numbers
(f, a, c) of the image, truncated to whole levels after each step as Pillow does:

    x <- trunc(clip(d + f (x - d), 0, 255))     d = a grey(x) + c

    brightness  a = 0, c = 0
    contrast    a = 0, c = grey mean of the whole image as it is by then
    saturation  a = 1, c = 0                    grey = round(0.299 r + 0.587 g + 0.114 b)

The loader's threads find the numbers (`jitter_coefficients`) and the device blends
(`apply_jitter`), because arithmetic on pixels was a third of what an image cost a loader thread.
Levels come out as Pillow's to the bit. What differs from the official order is that BEiT jitters
the whole image and crops it then: here the resize interpolates before clipping, and the grey mean
is estimated from a grid of about 2,000 pixels of the whole image.

Source: Pillow `ImageEnhance` and `Blend.c`, torchvision `ColorJitter`.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

# ITU-R 601 in the 65536ths of Pillow's "L": sums of such products with levels are exact in fp32.
_GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)
_GREY_PLANES = np.array(_GREY, np.float32)[:, None, None]
_MEAN_PIXELS = 2048
# Images blended at a time on a CPU, whose cache holds them: twice as fast as a batch of 64 at once.
_CPU_IMAGES = 4


def jitter_coefficients(steps: tuple[tuple[str, float], ...], image: np.ndarray) -> np.ndarray:
    """(f, a, c) of each step: float32 (steps, 3).

    steps: (name, factor) in the order they are applied. image: the whole one, before its crop,
    uint8 (height, width, 3).
    """
    rows: list[tuple[float, bool, int]] = []
    for name, factor in steps:
        mean = _grey_mean(image, rows) if name == "contrast" else 0
        rows.append((factor, name == "saturation", mean))
    return np.array(rows, np.float32).reshape(-1, 3)


def apply_jitter(images: Tensor, coefficients: Tensor) -> Tensor:
    """Jittered copy of a batch, made where it is; the host waits for nothing.

    images uint8 (B, height, width, 3), coefficients float32 (B, steps, 3) -> uint8 like images.
    """
    out = torch.empty_like(images)
    size = _CPU_IMAGES if images.device.type == "cpu" else max(1, len(images))
    for made, part, numbers in zip(
        out.split(size), images.split(size), coefficients.split(size), strict=True
    ):
        # Colours apart: operations run along contiguous memory, in place, and grey sums planes.
        planes = part.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        _blend(planes, numbers.permute(1, 2, 0)[..., None, None])
        made.copy_(planes.permute(1, 2, 3, 0))
    return out


def jitter_views(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with its `jitter` applied to its views and taken out; without one, as it is."""
    if "jitter" not in batch:
        return batch
    batch = dict(batch)
    coefficients = batch.pop("jitter")
    for name in ("images", "token_images"):
        if name in batch:
            batch[name] = apply_jitter(batch[name], coefficients)
    return batch


def _grey_mean(image: np.ndarray, before: Iterable[tuple[float, bool, int]]) -> int:
    """Rounded grey mean of the image after the steps `before`, from a grid of its pixels.

    By NumPy: torch would start a pool of threads in every loader thread for so few pixels.
    """
    # Odd, so that the grid does not always hit the same place of the 8 x 8 blocks of a JPEG.
    stride = int((image.shape[0] * image.shape[1] / _MEAN_PIXELS) ** 0.5) | 1
    grid = image[::stride, ::stride].transpose(2, 0, 1)
    planes = np.empty(grid.shape, np.float32)
    planes[:] = grid  # by planes, for NumPy copies threes of bytes slowly
    # Few calls, for each takes the interpreter's lock anew: saturation alone wants the grey.
    for factor, saturation, _ in before:
        if saturation:
            grey = _grey_of(planes)
            planes -= grey
            planes *= factor
            planes += grey
        else:
            planes *= factor
        np.minimum(planes, 255, out=planes)
        np.maximum(planes, 0, out=planes)
        np.floor(planes, out=planes)
    grey = _grey_of(planes)
    return int(np.add.reduce(grey, axis=None, dtype=np.float64) / grey.size + 0.5)


def _grey_of(planes: np.ndarray) -> np.ndarray:
    """`_grey` by NumPy: no sum is rounded, so their order does not matter."""
    grey = np.add.reduce(planes * _GREY_PLANES, axis=0, initial=np.float32(0.5))
    return np.floor(grey, out=grey)


def _blend(planes: Tensor, steps: Iterable[Tensor]) -> None:
    """The formula, in place. planes float32 (3, B, height, width) of whole levels; steps: f, a, c
    of each, as planes[0]."""
    for f, a, c in steps:
        d = _grey(planes)
        d *= a
        d += c
        # Not torch's `lerp`, which rounds otherwise: a level off where Pillow is exact.
        planes -= d
        planes *= f
        planes += d
        torch.clip(planes, 0, 255, out=planes)
        torch.floor(planes, out=planes)


def _grey(planes: Tensor) -> Tensor:
    red, green, blue = planes
    grey = red * _GREY[0]
    grey += green * _GREY[1]
    grey += blue * _GREY[2]
    grey += 0.5
    return torch.floor(grey, out=grey)
