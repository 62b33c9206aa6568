"""Classes of every pixel of an image of any size, by a model of one size: a window slides over it.

    logits(pixel) = mean, over the windows that cover the pixel, of the model's logits there

Windows lie a stride apart, the last one moved back to the edge; the model's logits are resized
bilinearly to the window. The sum is resized to the image as it came, and its largest class counts.
Several scales and mirrors: softmax of each there, and their mean. An image that a window is larger
than is padded below and to the right with what normalised pixels of the mean are, 0.

Source    mmsegmentation's `EncoderDecoder.slide_inference` and `aug_test`, mmcv's `imrescale`,
          unilm's recipes (spec of the test: scale (2048, 512) or (2560, 640), `SETR_Resize`)
Memory    4 C h w bytes of the resized image, and 4 C times a window; the original size is gone
          through in strips of STRIP values. Several passes keep their mean at the original size:
          with 150 classes 0.2 GB for ADE20K's usual 683x512, 7 GB for 12 megapixels
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.data.views.segmentation import rescaled, resize
from beit_fast.data.views.two_views import normalize
from beit_fast.tasks.segment.config_evaluation import SlideConfig

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
STRIP = 2**26  # values, 256 MiB


@torch.no_grad()
def segment_image(
    model: nn.Module,
    image: Tensor,
    slide: SlideConfig,
    statistics: Statistics,
    precision: Literal["fp32", "bf16"],
) -> Tensor:
    """The class of each pixel, int64 (height, width), where the model is.

    image uint8 (height, width, 3), on any device; `model`, in eval mode, gives logits
    (B, C, h, w) of any h and w for images (B, 3, *model.config.image_pixels). `statistics`: mean
    and std of RGB in 0..1. Raises ValueError for scores that are not finite.
    """
    device = next(model.parameters()).device
    image = image.cpu().numpy()
    size = image.shape[:2]
    scales = scaled_sizes(size, model.config.image_pixels, slide)
    # Ratios for which the window is too large are one and the same pass, which counts so often.
    times = Counter((scale, mirror) for scale in scales for mirror in _mirrors(slide))
    mean = None
    for (scale, mirror), count in times.items():
        resized = torch.from_numpy(resize(image, scale)).to(device)
        pixels = normalize(resized[None], *statistics)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = slide_window(model, pixels.flip(3) if mirror else pixels, slide)
        logits = logits.flip(2) if mirror else logits
        if not logits.isfinite().all():
            raise ValueError("the model's scores are not finite: are its weights?")
        if len(times) == 1:  # softmax changes no order
            return torch.cat([strip.argmax(dim=0) for _, strip in resized_strips(logits, size)])
        if mean is None:
            mean = torch.zeros(len(logits), *size, device=device)
        for rows, strip in resized_strips(logits, size):
            mean[:, rows] += count / times.total() * strip.softmax(dim=0)
    return mean.argmax(dim=0)


def slide_window(model: nn.Module, pixels: Tensor, slide: SlideConfig) -> Tensor:
    """Mean logits fp32 (C, height, width) of windows over pixels (1, 3, height, width)."""
    window = model.config.image_pixels
    height, width = pixels.shape[2:]
    below, right = (max(0, need - have) for need, have in zip(window, (height, width), strict=True))
    pixels = F.pad(pixels, (0, right, 0, below))
    stride = slide.strides(window)
    tops, lefts = map(window_starts, pixels.shape[2:], window, stride)
    corners = [(top, left) for top in tops for left in lefts]
    total = None
    for first in range(0, len(corners), slide.windows_at_once):
        part = corners[first : first + slide.windows_at_once]
        views = [pixels[0, :, y : y + window[0], x : x + window[1]] for y, x in part]
        views = torch.stack(views).contiguous(memory_format=torch.channels_last)
        logits = model(views).float()
        if total is None:
            total = logits.new_zeros(logits.shape[1], *pixels.shape[2:])
        for one, (y, x) in zip(logits.split(1), part, strict=True):  # at full size singly
            total[:, y : y + window[0], x : x + window[1]] += _resize(one, window)[0]
    down, across = (
        _coverage(starts, side, length, pixels.device)
        for starts, side, length in zip((tops, lefts), window, pixels.shape[2:], strict=True)
    )
    total /= down[:, None] * across
    return total[:, :height, :width]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side at least as long: a stride apart, the last at the end.

    >>> window_starts(683, 512, 341)
    [0, 171]
    """
    steps = max(0, length - window + stride - 1) // stride
    return [min(step * stride, length - window) for step in range(steps + 1)]


def scaled_sizes(
    size: tuple[int, int], window: tuple[int, int], slide: SlideConfig
) -> list[tuple[int, int]]:
    """(height, width) of an image at each scale; without several the long side is limited too.

    >>> scaled_sizes((375, 500), (512, 512), SlideConfig())
    [(512, 683)]
    """
    long, short = slide.sides(window)
    if tuple(slide.multi_scale) == (1.0,):
        return [rescaled(*size, long, short)]
    shorts = [max(min(window), int(short * ratio)) for ratio in slide.multi_scale]
    return [rescaled(*size, math.inf, new) for new in shorts]


def resized_strips(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """`logits` (C, h, w) bilinearly at `size`, as (rows, fp32 (C, number of rows, width)).

    First down, a strip at a time, then across; no strip has more than STRIP values, or one row.
    """
    (num_classes, length, _), (height, width) = logits.shape, size
    rows_at_once = max(1, STRIP // (num_classes * width))
    place = (torch.arange(height, device=logits.device) + 0.5) * (length / height) - 0.5
    place = place.clamp(0, length - 1)
    above = place.floor().long()
    below = (above + 1).clamp(max=length - 1)
    share = (place - above)[:, None]
    for first in range(0, height, rows_at_once):
        rows = slice(first, min(first + rows_at_once, height))
        strip = logits[:, above[rows]].lerp(logits[:, below[rows]], share[rows])
        yield rows, _resize(strip[None], (rows.stop - first, width))[0]


def _mirrors(slide: SlideConfig) -> tuple[bool, ...]:
    return (False, True) if slide.flip else (False,)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _coverage(starts: list[int], window: int, length: int, device: torch.device) -> Tensor:
    """How many windows cover each place of a side, fp32 (length,)."""
    count = torch.zeros(length, device=device)
    for start in starts:
        count[start : start + window] += 1
    return count
