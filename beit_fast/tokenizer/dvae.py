"""The discrete variational autoencoder of DALL-E, BEiT's visual tokenizer.

    encoder   x -> logits (B, V, h, w)         conv 7x7, 4 groups of residual blocks, conv 1x1
    relaxed   z = softmax((logits + gumbel) / temperature)      while training
    discrete  z = one-hot(argmax logits)                        for BEiT
    decoder   z -> mu, ln b (B, 3, height, width)   of a logit-Laplace distribution of the pixels

Groups are joined by max-pooling (encoder) and nearest upsampling (decoder), so one token stands for
8 x 8 pixels. There is no normalisation layer; the branch of a block is scaled by the constant
1 / (number of blocks)^2 instead. Names and shapes of the parameters are the published ones.

Source    Ramesh et al., arXiv:2102.12092, appendix A; github.com/openai/DALL-E
Letters   h, w: tokens per side; C: channels; P: positions, B h w; the rest as everywhere
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.kernels.head.linear_argmax import linear_argmax
from beit_fast.tokenizer.config import NUM_GROUPS, STRIDE, DvaeConfig

PIXEL_MARGIN = 0.1  # epsilon of the paper: pixels are mapped into (epsilon, 1 - epsilon)


def map_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 in 0 .. 255 or float in [0, 1] -> `dtype` in [0.1, 0.9], where a logit is finite.

    Keeps shape and memory format. Floats outside [0, 1] are the caller's mistake and not looked
    for: finding them would wait for the device. Raises ValueError for other integer types.
    """
    if images.dtype == torch.uint8:
        return images.to(dtype).mul_((1 - 2 * PIXEL_MARGIN) / 255).add_(PIXEL_MARGIN)
    if not images.is_floating_point():
        raise ValueError(
            f"the images are {images.dtype}: pass uint8 in 0..255 or floats in [0, 1], "
            "e.g. images.to(torch.uint8)"
        )
    return images.to(dtype) * (1 - 2 * PIXEL_MARGIN) + PIXEL_MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels` for floats, cut to [0, 1]."""
    return ((mapped - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


class Conv(nn.Module):
    """Convolution of stride 1 that keeps the size, with the published names `w` and `b`.

    w (out, in, k, k) ~ N(0, 1 / (in k^2)); b (out,) = 0.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.empty(out_channels))
        self.padding = (kernel_size - 1) // 2
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w, std=self.w[0].numel() ** -0.5)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.padding)


class Block(nn.Module):
    """Bottleneck residual block, activation first: id(x) + gain * conv_4(relu(... relu(x)))."""

    def __init__(self, in_channels: int, out_channels: int, kernel_sizes: list[int], gain: float):
        super().__init__()
        hidden = out_channels // 4
        widths = [in_channels, hidden, hidden, hidden, out_channels]
        self.gain = gain
        self.id_path = (
            nn.Identity() if in_channels == out_channels else Conv(in_channels, out_channels, 1)
        )
        self.res_path = nn.ModuleDict(
            {
                f"conv_{i + 1}": Conv(widths[i], widths[i + 1], kernel_size)
                for i, kernel_size in enumerate(kernel_sizes)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for conv in self.res_path.values():
            branch = conv(F.relu(branch))
        return torch.add(self.id_path(x), branch, alpha=self.gain)


def _groups(widths: list[int], blocks_per_group: int, kernel_sizes: list[int]) -> dict:
    """group_1 .. group_4 for widths [into group 1, of group 1, ..., of group 4]."""
    gain = 1 / (NUM_GROUPS * blocks_per_group) ** 2
    return {
        f"group_{g + 1}": nn.ModuleDict(
            {
                f"block_{i + 1}": Block(
                    widths[g] if i == 0 else widths[g + 1], widths[g + 1], kernel_sizes, gain
                )
                for i in range(blocks_per_group)
            }
        )
        for g in range(NUM_GROUPS)
    }


class Encoder(nn.Module):
    """Mapped pixels (B, 3, height, width) to logits (B, V, h, w)."""

    def __init__(self, config: DvaeConfig):
        super().__init__()
        width = config.encoder_width
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.ModuleDict(
            {
                "input": Conv(3, width, 7),
                **_groups(widths, config.blocks_per_group, [3, 3, 3, 1]),
                "output": nn.ModuleDict({"conv": Conv(8 * width, config.vocab_size, 1)}),
            }
        )

    def features(self, x: Tensor) -> Tensor:
        """Mapped pixels -> what the output convolution reads, (B, C, h, w)."""
        x = self.blocks["input"](x)
        for g in range(1, NUM_GROUPS + 1):
            for block in self.blocks[f"group_{g}"].values():
                x = block(x)
            if g < NUM_GROUPS:
                x = F.max_pool2d(x, 2)
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        # The relaxation and the argmax read these logits: they stay out of half precision, as in
        # the reference, which runs this convolution and the decoder's first in fp32.
        with torch.autocast(x.device.type, enabled=False):
            output = self.blocks["output"]["conv"]
            return output(features.to(output.w.dtype))


class Decoder(nn.Module):
    """Codes (B, V, h, w), one-hot or relaxed, to pixel statistics (B, 6, height, width)."""

    def __init__(self, config: DvaeConfig):
        super().__init__()
        width = config.decoder_width
        widths = [config.decoder_input_width, 8 * width, 4 * width, 2 * width, width]
        self.blocks = nn.ModuleDict(
            {
                "input": Conv(config.vocab_size, config.decoder_input_width, 1),
                **_groups(widths, config.blocks_per_group, [1, 3, 3, 3]),
                "output": nn.ModuleDict({"conv": Conv(width, 2 * 3, 1)}),
            }
        )

    def embed(self, ids: Tensor) -> Tensor:
        """The input convolution of one-hot codes, as a look-up: ids (B, h, w) -> (B, C, h, w)."""
        conv = self.blocks["input"]
        return (F.embedding(ids, conv.w[:, :, 0, 0].t()) + conv.b).permute(0, 3, 1, 2)

    def from_embedding(self, x: Tensor) -> Tensor:
        """Output of the input convolution -> mu and ln b, stacked: (B, 6, height, width)."""
        for g in range(1, NUM_GROUPS + 1):
            for block in self.blocks[f"group_{g}"].values():
                x = block(x)
            if g < NUM_GROUPS:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.blocks["output"]["conv"](F.relu(x))

    def forward(self, codes: Tensor) -> Tensor:
        conv = self.blocks["input"]
        with torch.autocast(codes.device.type, enabled=False):
            x = conv(codes.to(conv.w.dtype))
        return self.from_embedding(x)


class DvaeOutput(NamedTuple):
    """What the training loss reads, all fp32.

    logits (B, V, h, w); mu, log_scale (B, 3, height, width): location and ln b of the logit-Laplace
    distribution; mapped (B, 3, height, width): the pixels it is to explain, in [0.1, 0.9].
    """

    logits: Tensor
    mu: Tensor
    log_scale: Tensor
    mapped: Tensor


class Dvae(nn.Module):
    """Encoder and decoder; a `Tokenizer` as it is, a model to train through `forward`.

    dvae = Dvae(dvae_config("dvae_8192"))
    ids = dvae.encode(images_uint8)          # (B, 3, 112, 112) -> int64 (B, 14, 14)
    images = dvae.decode(ids)                # -> float32 (B, 3, 112, 112) in [0, 1]
    """

    stride = STRIDE

    def __init__(self, config: DvaeConfig):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor, temperature: float | Tensor) -> DvaeOutput:
        """Encode, draw relaxed codes, decode: the terms of the training loss.

        images (B, 3, height, width), uint8 or float in [0, 1]; temperature > 0 of the
        Gumbel-softmax, which approaches a one-hot draw as it falls to 0. Draws from torch's default
        generator of the device. Raises ValueError as `encode` does.
        """
        check_images(images)
        mapped = map_pixels(images)
        logits = self.encoder(mapped.to(self.encoder.blocks["input"].w.dtype)).float()
        codes = F.gumbel_softmax(logits, tau=temperature, dim=1)
        mu, log_scale = self.decoder(codes).float().chunk(2, dim=1)
        return DvaeOutput(logits, mu, log_scale, mapped)

    @torch.no_grad()  # not inference_mode: the ids become targets, which autograd saves
    def encode(
        self, images: Tensor, index: Tensor | None = None, *, precision: str = "tf32x3"
    ) -> Tensor:
        """Images to visual tokens: argmax of the logits, equal logits to the lowest id.

        images (B, 3, height, width), uint8 in 0 .. 255 or float in [0, 1] (values outside are the
        caller's business), any memory format; returns int64 (B, h, w), h = height / 8 and
        w = width / 8. With an index, int32 or int64 (I,) into the B h w positions, only those are
        scored: int64 (I,), -1 where the index is -1.
        The convolutions run in the type of the parameters, or in autocast's where that is on. The
        last projection always runs in `precision`, one of `linear_argmax`'s, by default as good as
        fp32, which the reference takes: rounding 8192 normal scores to bf16 changes the best of
        them in 2 % of positions. The logits are not stored. Raises ValueError for another shape or
        type.
        """
        check_images(images)
        mapped = map_pixels(images, self.encoder.blocks["input"].w.dtype)
        features_BhwC = self.encoder.features(mapped).permute(0, 2, 3, 1)
        output = self.encoder.blocks["output"]["conv"]
        return linear_argmax(
            features_BhwC, output.w.flatten(1), output.b, index, precision=precision
        )

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Visual tokens to the most likely image: int64 (B, h, w) -> float32 (B, 3, 8 h, 8 w).

        Values in [0, 1]. Raises ValueError for another shape or type, and IndexError on the CPU for
        an id outside 0 .. vocab_size - 1 (a failed device assertion on CUDA).
        """
        if ids.ndim != 3 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"ids are {tuple(ids.shape)} of {ids.dtype}: decode needs integers (B, h, w), "
                "e.g. flat_ids.view(-1, h, w)"
            )
        statistics = self.decoder.from_embedding(self.decoder.embed(ids))
        return most_likely_images(statistics[:, :3].float())


def most_likely_images(mu: Tensor) -> Tensor:
    """Images in [0, 1] from the location `mu` of the logit-Laplace distribution."""
    return unmap_pixels(torch.sigmoid(mu))


def check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"the images are {tuple(images.shape)}: the dVAE needs (B, 3, height, width); "
            "permute channels-last images with images.permute(0, 3, 1, 2)"
        )
    height, width = images.shape[2:]
    if height % STRIDE or width % STRIDE or not height or not width:
        raise ValueError(
            f"the images are {height} x {width} px: the dVAE needs sides that are multiples of "
            f"{STRIDE} px; resize or crop them to "
            f"{max(1, round(height / STRIDE)) * STRIDE} x {max(1, round(width / STRIDE)) * STRIDE}"
        )
