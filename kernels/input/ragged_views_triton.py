"""The views of `ragged_views` by Triton: how the work of a batch is cut up, and launched.

Crops are made once for all views, as words (jitter_kernels.py). Each view then takes its weights
and two passes (resize_kernels.py): along rows and then columns, or the other way round for the
images that `columns_first` names. The third launch of a pass is for those alone.

The sizes are known on the host, so that programs are as many as there are tiles, however uneven
the images; each finds its image by its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.kernels._triton import cdiv, launch, triton
from beit_fast.kernels.input.jitter_kernels import (
    grey_means_kernel,
    grey_sums_kernel,
    jittered_crop_kernel,
)
from beit_fast.kernels.input.ragged_views_reference import CONTRAST, NONE, SATURATION
from beit_fast.kernels.input.resampling import SUPPORT, columns_first, most_taps
from beit_fast.kernels.input.resize_kernels import resize_pass_kernel, resize_weights_kernel

GREY_PIXELS, CROP_PIXELS = 2048, 1024  # of a program
WEIGHTS = 128
FEWEST_B = 256  # images that kernels are compiled for
# Rows and columns that a program writes, and its warps, by whether its pass goes along rows: a
# thread has eight pixels of one column then, which take the same weights, and else of two rows.
TILES = {True: (16, 32, 2), False: (2, 128, 1)}


def ragged_views_triton(
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
    B, S = steps.shape
    made = [pixels.new_empty(B, *size, 3) for _, size in views]
    if B == 0:
        return made
    device, most_b = pixels.device, max(FEWEST_B, triton.next_power_of_2(B))
    heights, widths = boxes[:, 2], boxes[:, 3]
    is_contrast = steps == CONTRAST
    has_contrast = bool(is_contrast.any())
    grey_counts = _tiles(sizes.prod(1), GREY_PIXELS) * is_contrast.any(1)
    crop_counts = _tiles(heights * widths, CROP_PIXELS)
    crop_words = starts_of(heights * widths)
    table = _table(crop_words[:B], offsets, sizes, boxes, flips, planar, steps, factors)
    plans = [make_plan(crop_words, heights, widths, name, size, most_b) for name, size in views]
    num_words = max([int(crop_words[-1]), *(plan.num_words for plan in plans)])
    grey_starts, crop_starts = (_programs(counts, most_b) for counts in (grey_counts, crop_counts))
    table_d, grey_starts_d, crop_starts_d, *plans_d = _move(
        [table, grey_starts, crop_starts, *(t for plan in plans for t in plan.tensors)], device
    )

    shared = {"table_ptr": table_d, "COLUMNS": table.shape[1]}
    jitter = {"S": S, "CONTRAST": CONTRAST, "SATURATION": SATURATION, "fuses": False}
    batch = {"MOST_B": most_b}
    means = None
    if has_contrast:
        sums = torch.empty(int(grey_starts[B]), dtype=torch.int32, device=device)
        means = torch.empty(B, device=device)
        launch(
            grey_sums_kernel,
            (len(sums),),
            on=pixels,
            pixels_ptr=pixels,
            starts_ptr=grey_starts_d,
            sums_ptr=sums,
            BLOCK=GREY_PIXELS,
            **shared,
            **jitter,
            **batch,
        )
        launch(
            grey_means_kernel,
            (B,),
            on=pixels,
            sums_ptr=sums,
            starts_ptr=grey_starts_d,
            means_ptr=means,
            BLOCK=128,
            **shared,
        )
    words = torch.empty(num_words, dtype=torch.int32, device=device)
    launch(
        jittered_crop_kernel,
        (int(crop_starts[B]),),
        on=pixels,
        pixels_ptr=pixels,
        starts_ptr=crop_starts_d,
        means_ptr=means,
        words_ptr=words,
        BLOCK=CROP_PIXELS,
        **shared,
        **jitter,
        **batch,
    )
    for view, (name, _), plan in zip(made, views, plans, strict=True):
        on_device, plans_d = plans_d[: len(plan.tensors)], plans_d[len(plan.tensors) :]
        _resize(view, words, name, plan, on_device)
    return made


@dataclass(frozen=True)
class Plan:
    """How a batch becomes one view."""

    axes: Tensor  # (2, MOST_B, 3), as resize_weights_kernel has them
    # Of each pass: whether along rows, jobs (B, 5), starts (MOST_B + 1,).
    passes: list[tuple[bool, Tensor, Tensor]]
    num_images: int
    num_weights: int
    num_words: int  # those of the crops, and of what lies between the passes behind them

    @property
    def tensors(self) -> list[Tensor]:
        return [self.axes, *(tensor for _, *tensors in self.passes for tensor in tensors)]


def make_plan(
    crop_words: Tensor,
    heights: Tensor,
    widths: Tensor,
    name: str,
    size: tuple[int, int],
    most_b: int,
) -> Plan:
    """crop_words (B + 1,): where crops begin, and all end; heights, widths (B,) of the crops."""
    before = torch.stack((heights, widths))
    after = torch.tensor(size, device="cpu")[:, None].expand_as(before)
    taps = most_taps(name, before, after)
    weights = starts_of((taps * after).flatten())
    axes = torch.stack((before, weights[:-1].view_as(before), taps), dim=-1)

    columns = columns_first(heights, widths, size)
    crops, end = crop_words[:-1], crop_words[-1]
    height, width = (torch.full_like(heights, side) for side in size)
    # What lies between: the box's height by the view's width, or the other way round.
    between_words = end + starts_of(torch.where(columns, height * widths, heights * width))
    between, view = between_words[:-1], torch.full_like(crops, -1)

    def job(along_rows: bool, active: Tensor, *values: Tensor) -> tuple[bool, Tensor, Tensor]:
        _, _, rows, cols, _ = values
        of_rows, of_cols, _ = TILES[along_rows]
        tiles = _tiles(rows, of_rows) * _tiles(cols, of_cols) * active
        return along_rows, torch.stack(values, dim=-1), _programs(tiles, most_b)

    everyone = torch.ones_like(columns)
    passes = [
        job(True, ~columns, crops, widths, heights, width, between),
        job(
            False,
            everyone,
            torch.where(columns, crops, between),
            torch.where(columns, widths, width),
            height,
            torch.where(columns, widths, width),
            torch.where(columns, between, view),
        ),
        job(True, columns, between, widths, height, width, view),
    ]
    axes = torch.nn.functional.pad(axes, (0, 0, 0, most_b - len(heights)))
    return Plan(axes, passes, len(heights), int(weights[-1]), int(between_words[-1]))


def make_weights(
    name: str, size: tuple[int, int], plan: Plan, axes: Tensor
) -> tuple[Tensor, Tensor]:
    """First pixels and weights of a view, as resize_weights_kernel writes them.

    axes: the plan's, on the device.
    """
    most, most_b = max(size), axes.shape[1]
    firsts = torch.empty(2, most_b, most, dtype=torch.int32, device=axes.device)
    weights = torch.empty(plan.num_weights, dtype=torch.int32, device=axes.device)
    launch(
        resize_weights_kernel,
        (plan.num_images, cdiv(most, WEIGHTS), 2),
        on=axes,
        axes_ptr=axes,
        firsts_ptr=firsts,
        weights_ptr=weights,
        HEIGHT=size[0],
        WIDTH=size[1],
        MOST=most,
        SUPPORT=SUPPORT[name],
        LANCZOS=name == "lanczos",
        MOST_B=most_b,
        BLOCK=WEIGHTS,
    )
    return firsts, weights


def _resize(view: Tensor, words: Tensor, name: str, plan: Plan, tensors: list[Tensor]) -> None:
    """Write a view (B, height, width, 3) from the crops among the words."""
    axes, *on_device = tensors
    size = view.shape[1:3]
    firsts, weights = make_weights(name, size, plan, axes)
    for along_rows, _, starts in plan.passes:
        jobs_d, starts_d, *on_device = on_device
        rows, cols, num_warps = TILES[along_rows]
        launch(
            resize_pass_kernel,
            (int(starts[plan.num_images]),),
            on=view,
            words_ptr=words,
            view_ptr=view,
            axes_ptr=axes,
            firsts_ptr=firsts,
            weights_ptr=weights,
            jobs_ptr=jobs_d,
            starts_ptr=starts_d,
            HEIGHT=size[0],
            WIDTH=size[1],
            MOST=max(size),
            ALONG_ROWS=along_rows,
            ROWS=rows,
            COLS=cols,
            MOST_B=axes.shape[1],
            num_warps=num_warps,
        )


def _table(
    crop_words: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    planar: Tensor,
    steps: Tensor,
    factors: Tensor,
) -> Tensor:
    """What the kernels of the jitter know of an image, int64 (B, 11 + 2 S).

    Its first byte, its pixels, bytes to the next pixel and to the next channel; the first byte of
    its crop, bytes from a pixel of the crop to the next across and down, the crop's width and
    pixels; steps before the contrast; the first word of the crop; the steps; bits of the factors.
    """
    (height, width), (top, left, box_height, box_width) = sizes.unbind(1), boxes.unbind(1)
    pixel = torch.where(planar, 1, 3)
    across = torch.where(flips, -pixel, pixel)
    column = torch.where(flips, width - 1 - left, left)
    bits = torch.where(steps == NONE, 1.0, factors.float()).view(torch.int32)
    columns = [
        offsets,
        height * width,
        pixel,
        torch.where(planar, height * width, 1),
        offsets + (top * width + column) * pixel,
        across,
        width * pixel,
        box_width,
        box_height * box_width,
        (steps == CONTRAST).long().cumsum(1).eq(0).sum(1),
        crop_words,
    ]
    return torch.cat((torch.stack(columns, dim=1), steps, bits.long()), dim=1)


def _tiles(counts: Tensor, of: int) -> Tensor:
    return (counts + of - 1) // of


def starts_of(counts: Tensor) -> Tensor:
    """Sums of what comes before, and of all: int64 (len(counts) + 1,)."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _programs(counts: Tensor, most_b: int) -> Tensor:
    """First programs of images that have so many, int64 (most_b + 1,): `starts_of`, then more."""
    starts = starts_of(counts)
    return torch.nn.functional.pad(starts, (0, most_b + 1 - len(starts)), value=2**62)


def _move(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """int64 tensors on the device, in one copy that the host does not wait for."""
    # Each at a multiple of 16 bytes, or Triton would compile kernels anew for those that are not.
    flat = [torch.nn.functional.pad(t.flatten(), (0, t.numel() % 2)) for t in tensors]
    joined = torch.cat(flat)
    if device.type == "cuda":
        joined = joined.pin_memory()
    parts = joined.to(device, non_blocking=True).split([len(part) for part in flat])
    return [part[: t.numel()].view(t.shape) for part, t in zip(parts, tensors, strict=True)]
