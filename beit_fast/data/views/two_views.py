"""One crop, two views: pixels for the encoder, pixels for the tokenizer.

On the image at its original resolution, in this order: colour jitter, horizontal flip, one crop
box, and from that box two resizes, `size` bicubic for the encoder and `token_size` Lanczos for the
tokenizer. All that is random is drawn first (`draw_view`); three transforms do the same with it:

reference  Pillow, in the official order: pixel for pixel what the official pipeline gives for the
           same draws
fast       about four times the images per core of the loader: decoded by torchcodec, cropped and
           resized by torch's uint8 kernels on channels-last pixels, bicubic for the tokenizer too,
           for torch has no Lanczos: the nearest there is. Its jitter comes last, on the device that
           trains (color_jitter.py); the sample carries three numbers per step for it
gpu        what reference gives of the pixels of a GPU's decoder, made there a batch at a time
           (data/device_views.py); the sample carries the file and the draw

`bench/data.py` prints the figures, for your own images too. On the photographs of this package fast
makes 4.4 times the views per core of reference. Its jitter takes a CPU half as long again, which is
the training thread's to pay where training is on a CPU. Its distance from reference, jitter
included, in levels of 255: encoder view 0.51 in the mean, PSNR 49 dB in the median and 38 at worst;
tokenizer view 1.07, 44 and 34 dB. Without jitter 0.04 and 73 dB, 0.90 and 44 dB: rounding, and the
missing Lanczos.

Views travel as uint8 (height, width, 3). On the device `normalize` turns a batch of them into
images for the encoder, `kernels.patches` into its patches at once; `map_pixels` of the tokenizer
does its part there.

Source: arXiv:2106.08254 section 2 and appendix; unilm `beit/datasets.py`, `beit/transforms.py`.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from beit_fast.data.seeds import below
from beit_fast.data.sources.decode import (
    check_size,
    decode_fast,
    decode_pillow,
    decode_shrunk,
    jpeg_size,
)
from beit_fast.data.sources.jpeg import Jpeg, plain_jpeg
from beit_fast.data.views.color_jitter import jitter_coefficients
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.scaled import shrink_of, shrunk_box
from beit_fast.data.views.statistics import IMAGENET_MEAN, IMAGENET_STD

VIEWS = ("images", "token_images")  # of the encoder, of the tokenizer
LATE = "late"  # what there is of kind gpu in their place: `LateViews`
TRIES = 10  # boxes drawn before the central crop is taken
_ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@dataclass(frozen=True)
class ViewDraw:
    """Everything random in the two views of one image."""

    jitter: tuple[tuple[str, float], ...]  # (step, factor), in the order they are applied
    flip: bool
    box: tuple[int, int, int, int]  # top, left, height, width in pixels of the flipped image


@dataclass(frozen=True)
class LateViews:
    """Views of kind gpu: to be made of a plain `jpeg` on the device, a batch at a time; or `made`
    already, by Pillow, of what a device's decoder is not to have: `why` says why not."""

    draw: ViewDraw
    jpeg: Jpeg | None
    made: dict[str, np.ndarray]
    why: str


def draw_view(height: int, width: int, config: ViewConfig, rng: random.Random) -> ViewDraw:
    """Draws for an image of height x width pixels; both transforms use what this returns."""
    steps = []
    if config.color_jitter:
        low, high = 1 - config.color_jitter, 1 + config.color_jitter
        steps = [(name, rng.uniform(low, high)) for name in _ENHANCE]
        rng.shuffle(steps)
    flip = rng.random() < config.hflip
    return ViewDraw(tuple(steps), flip, draw_box(height, width, config.scale, config.ratio, rng))


def draw_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: random.Random,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop in pixels.

    Area uniform in `scale` of the image's, width / height log-uniform in `ratio`; if no box of ten
    fits, the largest central one whose shape `ratio` allows. A side is at least one pixel, where
    the official code makes empty boxes of tiny images and fails.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(TRIES):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(low, high))
        box_width = max(1, round(math.sqrt(area * aspect)))
        box_height = max(1, round(math.sqrt(area / aspect)))
        if box_width <= width and box_height <= height:
            top = below(rng, height - box_height + 1)
            left = below(rng, width - box_width + 1)
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def reference_views(
    image: Image.Image, draw: ViewDraw, config: ViewConfig, names: Sequence[str] = VIEWS
) -> dict[str, np.ndarray]:
    """The named views by Pillow, in the official order, jittered: what `make_views` returns."""
    for name, factor in draw.jitter:
        image = _ENHANCE[name](image).enhance(factor)
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, height, width = draw.box
    crop = image.crop((left, top, left + width, top + height))
    how = {
        "images": (config.size, Image.Resampling.BICUBIC),
        "token_images": (config.token_size, Image.Resampling.LANCZOS),
    }
    return {
        name: np.array(crop.resize(size[::-1], filter))
        for name, (size, filter) in how.items()
        if name in names
    }


def fast_views(
    image: np.ndarray, draw: ViewDraw, config: ViewConfig, names: Sequence[str] = VIEWS
) -> dict[str, np.ndarray]:
    """The named views of a uint8 (height, width, 3) image by torch, and the jitter they have yet to
    get: what `make_views` returns."""
    top, left, height, width = draw.box
    if draw.flip:  # the box counts from the left of the flipped image, these pixels are not flipped
        left = image.shape[1] - left - width
    # Made contiguous by NumPy: torch would start a pool of threads per loader thread to do it.
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    # Axes are moved by NumPy: each call of torch takes the interpreter's lock anew.
    crop_1CHW = torch.from_numpy(crop.reshape(1, *crop.shape).transpose(0, 3, 1, 2))
    sizes = {"images": config.size, "token_images": config.token_size}
    views = {name: _resize(crop_1CHW, size) for name, size in sizes.items() if name in names}
    if draw.flip:
        views = {name: flip_view(view) for name, view in views.items()}
    if draw.jitter:
        views["jitter"] = jitter_coefficients(draw.jitter, image)
    return views


def make_views(
    data: bytes, config: ViewConfig, rng: random.Random, names: Sequence[str] = VIEWS
) -> tuple[dict[str, np.ndarray], ViewDraw]:
    """Decodes an image file and makes the views of those names, as `config.kind` says.

    Returns them and the draw that they share, its box as it was taken (see scaled.py).
    The views are `images` and `token_images`, uint8 (height, width, 3) of `config.size` and of
    `config.token_size`, neither of which depends on whether the other is made. The fast transform,
    if it is to jitter at all, leaves that to `color_jitter.jitter_views` and adds its numbers as
    `jitter`, float32 (steps, 3).
    Of kind gpu there are `LateViews` in their place, under LATE.
    Raises BadImageError if the file cannot be decoded. Smaller images are enlarged, as officially.
    """
    if config.kind == "reference":
        image = decode_pillow(data, config.max_pixels)
        draw = draw_view(image.height, image.width, config, rng)
        return reference_views(image, draw, config, names), draw
    if config.kind == "gpu":
        late = _late_views(data, config, rng, names)
        return {LATE: late}, late.draw
    size = jpeg_size(data) if config.decode == "scaled" else None
    if size is None:
        pixels = decode_fast(data, config.max_pixels)
        draw = draw_view(*pixels.shape[:2], config, rng)
        return fast_views(pixels, draw, config, names), draw
    draw = draw_view(*size, config, rng)
    shrink = shrink_of(draw.box, (config.size, config.token_size))
    if shrink == 1:
        return fast_views(decode_fast(data, config.max_pixels), draw, config, names), draw
    box, small = shrunk_box(draw.box, size, draw.flip, shrink)
    pixels = decode_shrunk(data, shrink, config.max_pixels)
    views = fast_views(pixels, replace(draw, box=small), config, names)
    return views, replace(draw, box=box)


def _late_views(
    data: bytes, config: ViewConfig, rng: random.Random, names: Sequence[str]
) -> LateViews:
    """Raises BadImageError for a file that cannot be used: a plain JPEG as far as its header
    shows."""
    jpeg = plain_jpeg(data)
    if isinstance(jpeg, str):
        image = decode_pillow(data, config.max_pixels)
        draw = draw_view(image.height, image.width, config, rng)
        return LateViews(draw, None, reference_views(image, draw, config, names), jpeg)
    check_size(jpeg.width, jpeg.height, config.max_pixels)
    return LateViews(draw_view(jpeg.height, jpeg.width, config, rng), jpeg, {}, "")


def two_views(data: bytes, config: ViewConfig, rng: random.Random) -> dict[str, np.ndarray]:
    """Both views of an image file: `make_views` without the draw."""
    return make_views(data, config, rng)[0]


def normalize(
    images: Tensor,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x / 255 - mean) / std per channel, computed in fp32 on the device the images are on.

    images uint8 (B, height, width, 3) -> dtype (B, 3, height, width) in channels-last memory. As
    (x - 255 mean) (1 / (255 std)): the same bits on every device, and those of `kernels.patches`,
    where addcmul's depend on whether a compiler fuses product and sum.
    """
    offset, factor = _offset_factor(mean, std, images.device)
    return images.permute(0, 3, 1, 2).float().sub_(offset).mul_(factor).to(dtype)


@functools.lru_cache(maxsize=16)
def _offset_factor(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Kept, because copying constants to a GPU in every step would wait for it."""
    mean_t = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
    std_t = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    return (255 * mean_t).float().to(device), (1 / (255 * std_t)).float().to(device)


def _resize(image_1CHW: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bicubic, uint8, channels-last throughout -> (height, width, 3); what
    torchvision's v2 `resize` calls for such a tensor, without its 50 us of dispatch."""
    resized = torch.nn.functional.interpolate(
        image_1CHW, size, mode="bicubic", antialias=True, align_corners=False
    )
    return np.ascontiguousarray(resized.numpy()[0].transpose(1, 2, 0))


def flip_view(view: np.ndarray) -> np.ndarray:
    """Mirrored left to right; by channels, because NumPy copies threes of bytes slowly."""
    out = np.empty_like(view)
    for channel in range(3):
        out[..., channel] = view[:, ::-1, channel]
    return out
