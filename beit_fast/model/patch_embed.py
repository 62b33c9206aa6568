"""Patches of an image and their linear projection (paper 2.1): what enters the first block."""

import torch
from torch import Tensor, nn

from beit_fast.kernels._triton import TRITON_DTYPES
from beit_fast.kernels.linear import linear
from beit_fast.model.config import BeitConfig


def patchify(images: Tensor, patch_pixels: tuple[int, int]) -> Tensor:
    """Images (B, C, height, width) cut into row-major patches: (B, L, C * patch area).

    Within a patch the order is that of a convolution's weight: channel, row, column.
    """
    height, width = patch_pixels
    blocks = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # B C Gh height Gw width
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Linear projection of patches: (B, C, height, width) -> (B, L, D).

    A convolution whose kernel is its stride, kept as one for its parameters, computed as the
    matrix product it is: 10.8 ms against 12.3 (channels-last images: 14.3) forward and backward at
    B2-224 for Base, one core. Images that are patches already, (B, L, P), stay as they are.
    Raises ValueError for images of another size than the model's, or with `dynamic_img_size` of one
    that patches do not divide, and for another dtype (under autocast any of 16 or 32 bits will do).
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.set_input_size(config)
        self.patch_pixels = config.patch_pixels
        self.dynamic_img_size = config.dynamic_img_size
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, config.patch_pixels, stride=config.patch_pixels
        )

    def set_input_size(self, config: BeitConfig) -> None:
        """Take images of the size of this configuration."""
        self.image_shape = (config.in_chans, *config.image_pixels)
        self.patches_shape = (config.num_patches, config.patch_dim)

    def forward(self, images: Tensor) -> Tensor:
        self._check_dtype(images)
        return linear(self.patches(images), self.proj.weight.flatten(1), self.proj.bias)

    def patches(self, images: Tensor) -> Tensor:
        """(B, L, P), cut from images or as they came."""
        if tuple(images.shape[1:]) == self.patches_shape:
            return images
        self._check(images)
        return patchify(images, self.patch_pixels)

    def grid_of(self, images: Tensor) -> tuple[int, int] | None:
        """(Gh, Gw) of images that `patches` takes; None: the model's own."""
        if images.ndim != 4 or tuple(images.shape[2:]) == self.image_shape[1:]:
            return None
        (height, width), (patch_height, patch_width) = images.shape[2:], self.patch_pixels
        return height // patch_height, width // patch_width

    def _check_dtype(self, images: Tensor) -> None:
        weight = self.proj.weight.dtype
        if images.dtype == weight:
            return
        device = images.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if autocast and images.dtype in TRITON_DTYPES and weight in TRITON_DTYPES:
            return
        if images.is_floating_point():
            remedy = (
                f"pass images.to({weight}), or run under torch.autocast, which takes float32, "
                "bfloat16 and float16"
            )
        else:
            remedy = (
                "pass normalised floats, (images.float() / 255 - mean) / std, or patches made by "
                "beit_fast.kernels.input.patches.normalized_patches"
            )
        raise ValueError(f"the images are {images.dtype}, the model is {weight}: {remedy}")

    def _check(self, images: Tensor) -> None:
        channels, height, width = self.image_shape
        num_patches, patch_dim = self.patches_shape
        if not self.dynamic_img_size:
            if images.ndim == 4 and tuple(images.shape[1:]) == self.image_shape:
                return
            remedy = _layout_remedy(images, channels) or (
                "resize the images, or load the model with another img_size, which resizes its "
                "positions, or with dynamic_img_size=True"
            )
            raise ValueError(
                f"the images are {tuple(images.shape)}, the model takes (B, {channels}, {height}, "
                f"{width}): {remedy}; patches are (B, {num_patches}, {patch_dim})"
            )
        if images.ndim != 4 or images.shape[1] != channels:
            remedy = _layout_remedy(images, channels) or "pass such images"
            raise ValueError(
                f"the images are {tuple(images.shape)}, the model takes (B, {channels}, height, "
                f"width): {remedy}; patches are (B, {num_patches}, {patch_dim}), those of another "
                "grid do not tell it: pass images"
            )
        (height, width), (patch_height, patch_width) = images.shape[2:], self.patch_pixels
        if height % patch_height or width % patch_width or not height or not width:
            raise ValueError(
                f"{height}x{width} pixels do not divide into patches of "
                f"{patch_height}x{patch_width}: pad or crop the images to multiples (nothing is "
                "padded here: pixels that are not there would be attended to)"
            )


def _layout_remedy(images: Tensor, channels: int) -> str:
    """What makes (B, channels, height, width) of the images; "" where it is not the layout."""
    if images.ndim == 3 and images.shape[0] == channels:
        return "pass images[None], one image being a batch too"
    if images.ndim == 4 and images.shape[1] == 1 != channels:
        return f"pass images.expand(-1, {channels}, -1, -1), all channels being the grey one"
    if images.ndim == 4 and images.shape[1] != channels and images.shape[3] == channels:
        return "pass images.permute(0, 3, 1, 2), channels first"
    if images.ndim == 4 and images.shape[1] != channels:
        return "pass other images, or build the model with in_chans"
    return ""
