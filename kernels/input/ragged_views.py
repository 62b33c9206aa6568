"""Views of images of any sizes: jitter, flip, one crop, and of that a resize for each view.

    view[b] = resize(crop(flip(jitter(image[b]))))      to the bit what Pillow makes

Jitter is steps of brightness (1), contrast (2), saturation (3), 0 being none, in the order given,
each a blend of all pixels x of the image with d, by a factor f, in fp32 without fused products:

    x <- trunc(clip(d + f (x - d), 0, 255))     d = 0, mean of grey in the image, grey of the pixel
    grey = (19595 r + 38470 g + 7471 b + 2^15) >> 16

The resize is antialiased, in integers, along rows and along columns (resampling.py).

Shapes    pixels (P,): the images one after the other; offsets (B,): where each begins; sizes
          (B, 2): height, width; planar (B,): whether it lies as (3, height, width), else as
          (height, width, 3); boxes (B, 4): top, left, height, width in the flipped image;
          flips (B,); steps, factors (B, S); a view: (B, height, width, 3)
Types     pixels and views uint8; factors floats, used in fp32; the others integers or bools
Devices   pixels where the work is done; all else on the CPU, where it is drawn: the sizes decide
          what is launched. It moves in one copy, and the host waits for nothing
Exact     one value for any device: sums are of integers, and so is the mean of grey
Gradient  none
Source    Pillow `Resample.c`, `Blend.c`, `ImageEnhance`; the order is that of unilm
          `beit/datasets.py`
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from beit_fast.kernels._triton import launch_obstacle
from beit_fast.kernels.arguments import check_backend, run_or_torch, triton_or_torch
from beit_fast.kernels.input.ragged_views_reference import (
    CONTRAST,
    STEPS,
    VIEWS,
)
from beit_fast.kernels.input.ragged_views_torch import ragged_views_torch
from beit_fast.kernels.input.ragged_views_triton import ragged_views_triton
from beit_fast.kernels.input.resampling import SUPPORT
from beit_fast.kernels.registration import implement

BACKENDS = ("triton", "torch")
# Of one image, and of the sides of images and views: pixels of an image are counted in int32, and
# so are those between the passes, as many as a side of the image by one of the view.
MOST_BYTES, MOST_SIDE, MOST_VIEW_SIDE = 2**31 - 1, 2**19, 2**11
torch.library.define(
    "beit_fast::ragged_views",
    "(Tensor pixels, Tensor offsets, Tensor sizes, Tensor boxes, Tensor flips, Tensor planar, "
    "Tensor steps, Tensor factors, str[] filters, SymInt[] view_sizes, str backend) -> Tensor[]",
)


def _ragged_views(
    pixels, offsets, sizes, boxes, flips, planar, steps, factors, filters, view_sizes, backend
):
    views = _views(filters, view_sizes)
    _check_values(pixels, offsets, sizes, boxes, steps, factors)
    pixels = pixels.contiguous()
    arguments = (pixels, offsets, sizes, boxes, flips, planar, steps, factors, views)
    if _resolve(backend, pixels) == "torch":
        return ragged_views_torch(*arguments)
    return run_or_torch(
        "ragged_views",
        lambda: ragged_views_triton(*arguments),
        lambda: ragged_views_torch(*arguments),
        backend=backend,
    )


implement("ragged_views", _ragged_views)


@torch.library.register_fake("beit_fast::ragged_views")
def _(pixels, offsets, sizes, boxes, flips, planar, steps, factors, filters, view_sizes, backend):
    views = _views(filters, view_sizes)
    return [pixels.new_empty(offsets.shape[0], *size, 3) for _, size in views]


def _resolve(backend: str, pixels: Tensor) -> str:
    """The wish, or the kernels on a GPU if they can, with a warning if they cannot."""
    if backend == "torch" or (backend == "" and pixels.device.type == "cpu"):
        return "torch"
    obstacle = launch_obstacle(pixels, operator="ragged_views")
    return triton_or_torch("ragged_views", backend, obstacle)


def _views(filters: list[str], sizes: list[int]) -> list[tuple[str, tuple[int, int]]]:
    return list(zip(filters, zip(sizes[::2], sizes[1::2], strict=True), strict=True))


def ragged_views(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    *,
    planar: Tensor | None = None,
    steps: Tensor | None = None,
    factors: Tensor | None = None,
    views: Sequence[tuple[str, tuple[int, int]]] = VIEWS,
    backend: str | None = None,
) -> list[Tensor]:
    """The views of each image, uint8 (B, height, width, 3), one tensor for each of `views`.

    pixels uint8 (P,), on the device. The rest is on the CPU: offsets int64 (B,); sizes int64
    (B, 2), height and width; boxes int64 (B, 4), top, left, height and width, counted in the image
    after its flip; flips bool (B,), left to right; planar bool (B,), True for an image that lies
    as (3, height, width), else none does; steps int64 (B, S) of `STEPS`, contrast once at most,
    with factors of floats (B, S), else there is no jitter. views: filter, "bicubic" or "lanczos",
    and (height, width). `backend` "triton" is the default on CUDA, "torch" elsewhere. Raises
    ValueError where shapes, types or numbers do not fit.

    >>> gradient = torch.arange(48, dtype=torch.uint8)  # of one image, 4 x 4
    >>> zero, size, box = torch.tensor([0]), torch.tensor([[4, 4]]), torch.tensor([[0, 0, 4, 4]])
    >>> (view,) = ragged_views(
    ...     gradient, zero, size, box, torch.tensor([False]), views=[("bicubic", (1, 2))]
    ... )
    >>> view
    tensor([[[[20, 21, 22],
              [25, 26, 27]]]], dtype=torch.uint8)
    """
    if planar is None:
        planar = torch.zeros_like(flips)
    if steps is None and factors is None:
        steps = offsets.new_empty(offsets.shape[0], 0)
        factors = steps.float()
    _check(pixels, offsets, sizes, boxes, flips, planar, steps, factors, views)
    check_backend(backend, BACKENDS)
    return torch.ops.beit_fast.ragged_views(
        pixels,
        offsets,
        sizes,
        boxes,
        flips,
        planar,
        steps,
        factors,
        [name for name, _ in views],
        [side for _, size in views for side in size],
        backend or "",
    )


def _check(pixels, offsets, sizes, boxes, flips, planar, steps, factors, views) -> None:
    """Raise ValueError for types, shapes, devices and views that are none."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 1:
        raise ValueError(
            f"the pixels are {pixels.dtype} {tuple(pixels.shape)}: pass uint8 (P,), the images one "
            "after the other"
        )
    if steps is None or factors is None:
        raise ValueError("pass steps and factors, or neither of them")
    B, S = len(offsets) if offsets.ndim else 0, steps.shape[-1] if steps.ndim else 0
    wanted = {
        "offsets": (offsets, torch.int64, (B,)),
        "sizes": (sizes, torch.int64, (B, 2)),
        "boxes": (boxes, torch.int64, (B, 4)),
        "flips": (flips, torch.bool, (B,)),
        "planar": (planar, torch.bool, (B,)),
        "steps": (steps, torch.int64, (B, S)),
        "factors": (factors, factors.dtype, (B, S)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        floats = name != "factors" or tensor.is_floating_point()
        if tensor.dtype != dtype or tensor.shape != shape or not floats:
            dtype = str(dtype).removeprefix("torch.") if floats else "floats"
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}: pass {dtype} {shape}, for as "
                "many images and steps as the others"
            )
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is on {tensor.device}: pass it on the CPU, for it decides what is "
                "launched; the pixels alone lie where the work is done"
            )
    most = MOST_VIEW_SIDE
    for name, size in views:
        if name not in SUPPORT or len(size) != 2 or not 1 <= min(size) <= max(size) <= most:
            raise ValueError(
                f"the views hold {(name, size)!r}: pass {' or '.join(SUPPORT)}, and (height, "
                f"width) of 1 to {most} pixels"
            )


def _check_values(pixels, offsets, sizes, boxes, steps, factors) -> None:
    """Raise ValueError for the first image that is not in the pixels, box not in its image, step
    that is none."""
    area = sizes.prod(1)
    top_left, extent = boxes[:, :2], boxes[:, 2:]
    beyond = ((sizes < 1) | (sizes > MOST_SIDE)).any(1) | (3 * area > MOST_BYTES)
    beyond |= (offsets < 0) | (offsets > len(pixels) - 3 * area)
    outside = ((extent < 1) | (extent > sizes) | (top_left < 0) | (top_left > sizes - extent)).any(
        1
    )
    unknown = ((steps < 0) | (steps >= len(STEPS)) | ~factors.isfinite()).any(1)
    unknown |= (steps == CONTRAST).sum(1) > 1
    wrong = beyond | outside | unknown
    if not wrong.any():
        return
    b = int(wrong.nonzero()[0])
    size = "x".join(map(str, sizes[b].tolist()))
    if beyond[b]:
        raise ValueError(
            f"image {b} is {size} pixels at {int(offsets[b])} of {len(pixels)} bytes: pass images "
            f"of 1 to {MOST_SIDE} pixels a side and at most {MOST_BYTES} bytes, within the pixels"
        )
    if outside[b]:
        raise ValueError(
            f"box {b} is {tuple(boxes[b].tolist())} in {size} pixels: pass top, left, height and "
            "width of at least one pixel, all of them within the image"
        )
    raise ValueError(
        f"the steps of image {b} are {steps[b].tolist()} by {factors[b].tolist()}: pass numbers 0 "
        f"to {len(STEPS) - 1} ({', '.join(STEPS)}), contrast once at most, and finite factors"
    )
