"""What `ragged_views` computes, an image at a time, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from beit_fast.kernels.input.resampling import columns_first, resize_weights, rounded_levels

STEPS = ("none", "brightness", "contrast", "saturation")  # their numbers
NONE, BRIGHTNESS, CONTRAST, SATURATION = range(len(STEPS))

VIEWS = (("bicubic", (224, 224)), ("lanczos", (112, 112)))  # of the encoder, of the tokenizer


def ragged_views_reference(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    planar: Tensor,
    steps: Tensor,
    factors: Tensor,
    views: Sequence[tuple[str, tuple[int, int]]] = VIEWS,
) -> list[Tensor]:
    """The formulas of ragged_views.py, transcribed, an image at a time."""
    crops = []
    for b, (height, width) in enumerate(sizes.tolist()):
        image = pixels[offsets[b] :][: 3 * height * width]
        image = image.view(3, height, width) if planar[b] else image.view(height, width, 3)
        image = image.permute(1, 2, 0) if planar[b] else image
        for step, factor in zip(steps[b].tolist(), factors[b].float().tolist(), strict=True):
            image = _jittered(image, step, factor)
        image = image.flip(1) if flips[b] else image
        top, left, box_height, box_width = boxes[b].tolist()
        crops.append(image[top : top + box_height, left : left + box_width])
    return [
        torch.stack([_resized(crop, name, size) for crop in crops])
        if crops
        else pixels.new_empty(0, *size, 3)
        for name, size in views
    ]


def _jittered(image: Tensor, step: int, factor: float) -> Tensor:
    """A step of one image, uint8 (height, width, 3)."""
    if step == NONE:
        return image
    levels = image.long()
    grey = (levels @ levels.new_tensor([19595, 38470, 7471]) + 2**15) >> 16
    base = {
        BRIGHTNESS: torch.zeros_like(grey),
        CONTRAST: ((2 * grey.sum() + grey.numel()) // (2 * grey.numel())).expand_as(grey),
        SATURATION: grey,
    }[step][..., None].float()
    return (base + (levels - base) * factor).clamp(0, 255).to(torch.uint8)


def _resized(image: Tensor, name: str, size: tuple[int, int]) -> Tensor:
    """uint8 (height, width, 3) -> uint8 (*size, 3): products of matrices, exact in fp64."""
    height, width, _ = image.shape
    down = _weight_matrix(name, height, size[0]).to(image.device)
    across = _weight_matrix(name, width, size[1]).to(image.device)
    passes = [("yh,hwc->ywc", down), ("xw,hwc->hxc", across)]
    if not columns_first(height, width, size):
        passes.reverse()
    for product, weights in passes:
        sums = torch.einsum(product, weights, image.double()).long()
        image = rounded_levels(sums).to(torch.uint8)
    return image


def _weight_matrix(name: str, num_in: int, num_out: int) -> Tensor:
    """The weights as float64 (out, in)."""
    first, weights = resize_weights(name, num_in, num_out)
    at = (first + torch.arange(len(weights), device="cpu")[:, None]).clamp(max=num_in - 1)
    matrix = torch.zeros(num_in, num_out, dtype=torch.float64, device="cpu")
    return matrix.scatter_add_(0, at, weights.double()).T
