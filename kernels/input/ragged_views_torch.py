"""The views of `ragged_views` in torch, on any device: an image at a time, tap by tap.

A pass of the resize is a sum of few products: six pixels count for one where bicubic makes 224 of
330. As matrices they would be sixty times as many.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from beit_fast.kernels.input.ragged_views_reference import CONTRAST, NONE, SATURATION
from beit_fast.kernels.input.resampling import columns_first, resize_weights, rounded_levels

GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # their sums with levels are exact in fp32


def ragged_views_torch(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    planar: Tensor,
    steps: Tensor,
    factors: Tensor,
    views: Sequence[tuple[str, tuple[int, int]]],
) -> list[Tensor]:
    """The views, uint8 (B, height, width, 3)."""
    made = [pixels.new_empty(len(offsets), *size, 3) for _, size in views]
    columns = (tensor.tolist() for tensor in (offsets, sizes, boxes, flips, planar, steps))
    for b, (offset, (height, width), box, flip, apart, codes) in enumerate(
        zip(*columns, strict=True)
    ):
        image = pixels[offset : offset + 3 * height * width]
        image = image.view(3, height, width) if apart else image.view(height, width, 3)
        planes_3HW = image if apart else image.permute(2, 0, 1)
        top, left, box_height, box_width = box
        left = width - left - box_width if flip else left
        crop = planes_3HW[:, top : top + box_height, left : left + box_width]
        crop = _jittered(planes_3HW, crop, codes, factors[b].float().tolist())
        crop = (crop.flip(2) if flip else crop).permute(1, 2, 0)
        for out, (name, size) in zip(made, views, strict=True):
            out[b] = _resized(crop, name, size)
    return made


def _jittered(image: Tensor, crop: Tensor, steps: list[int], factors: list[float]) -> Tensor:
    """The crop after the steps; contrast takes the mean of the image after the steps before it.

    image, crop: uint8 (3, height, width) -> fp32 like crop.
    """
    taken = [(step, factor) for step, factor in zip(steps, factors, strict=True) if step != NONE]
    planes = crop.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    whole = None
    for number, (step, factor) in enumerate(taken):
        base = 0.0
        if step == CONTRAST:
            whole = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for before, by in taken[:number]:
                _blend(whole, _grey(whole) if before == SATURATION else 0.0, by)
            # Sums of levels in fp64 are exact, and so is the half that Pillow adds to their mean.
            base = (_grey(whole).mean(dtype=torch.float64) + 0.5).floor().float()
        elif step == SATURATION:
            base = _grey(planes)
        _blend(planes, base, factor)
    return planes


def _blend(planes: Tensor, base: Tensor | float, factor: float) -> None:
    planes.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _grey(planes: Tensor) -> Tensor:
    red, green, blue = planes
    return (red * GREY[0]).add_(green * GREY[1]).add_(blue * GREY[2]).add_(0.5).floor_()


def _resized(crop: Tensor, name: str, size: tuple[int, int]) -> Tensor:
    """Whole levels (height, width, 3), of any dtype -> int32 (*size, 3)."""
    levels = crop.to(torch.int32)
    first = int(not columns_first(*levels.shape[:2], size))
    for axis in (first, 1 - first):
        # Along memory whole rows are gathered, which takes half the time of gathering pixels.
        levels = levels.transpose(0, axis).contiguous()
        levels = _pass(levels, name, size[axis]).transpose(0, axis)
    return levels


def _pass(levels: Tensor, name: str, num_out: int) -> Tensor:
    """int32 (in, ...) -> int32 (out, ...)."""
    num_in, device = len(levels), levels.device
    first, weights = (t.to(device) for t in resize_weights(name, num_in, num_out))
    sums = None
    for tap, weight in enumerate(weights.int()[..., None, None]):
        term = levels.index_select(0, (first + tap).clamp_(max=num_in - 1)).mul_(weight)
        sums = term if sums is None else sums.add_(term)
    return rounded_levels(sums)
