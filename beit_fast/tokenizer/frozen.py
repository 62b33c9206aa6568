"""The dVAE's encoder as it runs when nothing of it is trained: fewer passes, the same tokens.

Weights are cast once, channels last. A block's gain is part of its last convolution, the map of
the pixels part of the first one, and bias, ReLU, residual and pooling of the convolutions around
them. Only listed positions are scored, and the logits are not stored.

    first convolution   (a u + e) with zeros around = a conv of u with -e / a around, `conv_pixels`
    block               x <- id(x) + gain conv_4(h) + gain b_4, with gain in both

Letters   h, w: tokens per side; C, D: channels in and out; the rest as everywhere
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.kernels.conv import conv, conv_backend
from beit_fast.kernels.conv.pixels import conv_pixels, conv_pixels_backend
from beit_fast.kernels.head.linear_argmax import linear_argmax, split_fp16
from beit_fast.tokenizer.config import NUM_GROUPS, STRIDE
from beit_fast.tokenizer.dvae import PIXEL_MARGIN, Conv, Dvae, check_images

# Of features and of scores, by which tokens change least. Of 19,600 tokens of the demo's dVAE 44
# differ from fp32's with fp16 and 339 with bf16; 45 with the reference's fp16 convolutions and fp32
# scores, 61 where one fp16 product gives the scores (`python bench/tokenizer.py agreement`).
PRECISIONS = {
    "fp32": (torch.float32, "tf32x3"),
    "fp16": (torch.float16, "fp16x2"),
    "bf16": (torch.bfloat16, "tf32x3"),
}


@dataclass(frozen=True)
class Folded:
    """A convolution ready to run: weight (D, k, k, C), bias (D,) in fp32, or fp64 with the rest."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, layer: Conv, dtype: torch.dtype, *, scale: float = 1.0, offset: float = 0.0
    ) -> "Folded":
        """`layer` on (scale u + offset) where there are pixels, or scaled after; once rounded."""
        weight, bias = layer.w.detach().double(), layer.b.detach().double()
        bias = bias + offset * weight.sum(dim=(1, 2, 3)) if offset else scale * bias
        weight = (scale * weight).permute(0, 2, 3, 1).to(dtype).contiguous()
        return cls(weight, bias.to(torch.promote_types(dtype, torch.float32)))

    def to(self, device: torch.device | str) -> "Folded":
        return Folded(self.weight.to(device), self.bias.to(device))


class FrozenTokenizer:
    """A `Tokenizer` made from a dVAE, for images to tokens as fast as the hardware allows.

    tokenizer = FrozenTokenizer(load_tokenizer(path, "cuda"), "fp16")
    ids = tokenizer.encode(images_uint8)     # (B, 3, 112, 112) -> int64 (B, 14, 14)
    """

    stride = STRIDE

    def __init__(self, dvae: Dvae, precision: str = "fp32", *, backend: str | None = None):
        """Copies the encoder's weights in their place; the dVAE itself stays as it is.

        precision of features and activations: fp32, fp16 or bf16. backend of the convolutions as
        for `conv`; a "triton" one also convolves pixels and scores. Raises ValueError for another
        name of either.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}: pass one of {', '.join(PRECISIONS)}")
        self.dvae, self.precision, self.backend = dvae, precision, backend
        self.vocab_size = dvae.vocab_size
        self.dtype, self.score_precision = PRECISIONS[precision]
        self._convs = fold_encoder(dvae, self.dtype)
        output = Folded.of(dvae.encoder.blocks["output"]["conv"], torch.float32)
        weight_VC = output.weight.flatten(1)
        halves = split_fp16(weight_VC) if self.score_precision == "fp16x2" else (weight_VC, None)
        self._scores = (*halves, output.bias)
        if backend is not None:
            self.backends()  # which raises for one that cannot run

    def to(self, device: torch.device | str) -> "FrozenTokenizer":
        """Moves itself and its dVAE, and returns itself."""
        self.dvae.to(device)
        self._convs = {name: folded.to(device) for name, folded in self._convs.items()}
        self._scores = tuple(None if t is None else t.to(device) for t in self._scores)
        return self

    @torch.no_grad()  # not inference_mode: the ids become targets, which autograd saves
    def encode(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Images to visual tokens, as `Dvae.encode` but for the rounding of `precision`.

        images (B, 3, height, width), uint8 in 0 .. 255 or float in [0, 1]; channels last in memory
        costs no copy. int64 ids (B, h, w), or of the listed positions (I,), -1 for -1. Autocast
        does not change them. Raises ValueError as there.
        """
        weight_VC, rest_VC, bias_V = self._scores
        return linear_argmax(
            self.features(images),
            weight_VC,
            bias_V,
            index,
            rest=rest_VC,
            precision=self.score_precision,
            backend=self.backend if self.backend == "triton" else None,
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the output convolution reads, (B, h, w, C)."""
        check_images(images)
        return run_folded(self._convs, images, self.backend)

    def decode(self, ids: Tensor) -> Tensor:
        """`Dvae.decode`."""
        return self.dvae.decode(ids)

    def backends(self) -> dict[str, str]:
        """What each convolution runs on, by its name in the dVAE."""
        found = {}
        for name, folded in self._convs.items():
            wanted = _pixels_backend(self.backend) if name == "input" else self.backend
            decide = conv_pixels_backend if name == "input" else conv_backend
            sample = folded.weight[:1]  # device, type and channels of what it will be given
            found[name] = decide(sample, folded.weight, wanted)
        return found


def fold_encoder(dvae: Dvae, dtype: torch.dtype) -> dict[str, Folded]:
    """The encoder's convolutions but the output's, by name, in the order in which they run."""
    blocks = dvae.encoder.blocks
    a = (1 - 2 * PIXEL_MARGIN) / 255
    folded = {"input": Folded.of(blocks["input"], dtype, scale=a, offset=PIXEL_MARGIN)}
    for g in range(1, NUM_GROUPS + 1):
        for block_name, block in blocks[f"group_{g}"].items():
            prefix = f"group_{g}.{block_name}"
            if isinstance(block.id_path, Conv):
                folded[f"{prefix}.id_path"] = Folded.of(block.id_path, dtype)
            for name, layer in block.res_path.items():
                scale = block.gain if name == "conv_4" else 1.0
                folded[f"{prefix}.{name}"] = Folded.of(layer, dtype, scale=scale)
    return folded


def run_folded(convs: dict[str, Folded], images: Tensor, backend: str | None = None) -> Tensor:
    """Images (B, 3, height, width) through folded convolutions: features (B, h, w, C), >= 0."""
    first = convs["input"]
    x = conv_pixels(
        images.permute(0, 2, 3, 1),
        first.weight,
        first.bias,
        scale=1.0 if images.dtype == torch.uint8 else 255.0,
        fill=-255 * PIXEL_MARGIN / (1 - 2 * PIXEL_MARGIN),  # -31.875, which is exact in bf16
        backend=_pixels_backend(backend),
    )
    blocks = list(_blocks(convs))
    for number, (group, block) in enumerate(blocks):
        is_last = number + 1 == len(blocks)
        ends_group = not is_last and blocks[number + 1][0] != group

        def run(name: str, x: Tensor, block: dict[str, Folded] = block, **options) -> Tensor:
            return conv(x, block[name].weight, block[name].bias, backend=backend, **options)

        hidden = run("conv_1", x, relu_input=True, relu=True)
        hidden = run("conv_3", run("conv_2", hidden, relu=True), relu=True)
        if "id_path" in block:
            x = run("id_path", x)
        x = run("conv_4", hidden, residual=x, overwrite=True, relu=is_last, pool=ends_group)
    return x


def _blocks(convs: dict[str, Folded]) -> Iterator[tuple[str, dict[str, Folded]]]:
    """(group, its convolutions) of each block in order."""
    blocks: dict[tuple[str, str], dict[str, Folded]] = {}
    for name, folded in convs.items():
        if name != "input":
            group, block, layer = name.split(".")
            blocks.setdefault((group, block), {})[layer] = folded
    for (group, _), block in blocks.items():
        yield group, block


def _pixels_backend(backend: str | None) -> str | None:
    """`conv_pixels` knows the kernel, and torch for all libraries."""
    return backend if backend in (None, "triton") else "torch"
