"""What BEiT asks of a tokenizer: a grid of discrete visual tokens for an image, and back.

Anything with these two attributes and two methods can supply the targets of pre-training: the
DALL-E dVAE of this folder, or BEiT v2's VQ-KD in its place (stride 16 on 224 px images).
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Images to visual tokens and back.

    vocab_size    number of codes; ids lie in 0 .. vocab_size - 1
    stride        pixels per token along each side: 8 for the dVAE, so that the 112 px view of a
                  224 px image has one token for each 16 px patch (BEiT section 2.1)
    """

    vocab_size: int
    stride: int

    def encode(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """(B, 3, height, width), uint8 in 0 .. 255 or float in [0, 1] -> int64 ids (B, h, w).

        h = height / stride and w = width / stride. With an index, integers (I,) into the B h w
        positions, the ids (I,) of those alone, -1 where the index is -1. Any memory format, so an
        NHWC batch may be passed as `images.permute(0, 3, 1, 2)`. Carries no gradient; equal scores
        go to the lowest id. Raises ValueError for another shape or type, or sides that the stride
        does not divide.
        """
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """int64 ids (B, h, w) -> float images (B, 3, h * stride, w * stride) in [0, 1]."""
        ...
