"""Random numbers that are a function of where they are used, so that no mask is ever stored.

    words = Philox4x32-10(key = seed, counter = (quad, stream, offset mod 2^32, offset / 2^32))

Four words of 31 bits come out for each (quad, stream): word w of quad c belongs to element
4 c + w. An element is kept with probability 1 - p where its word is at least p 2^31. Forward and
backward draw the same, and so does the reference here.

Shapes    rng (2,) int64: seed and offset, **on the device**, so that replaying a CUDA graph in
          which `draw_rng` was captured draws anew, and activation checkpointing draws the same
Source    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Triton's tl.philox
"""

import torch
from torch import Tensor

from beit_fast.kernels._triton import tl, triton


def draw_rng(device: torch.device) -> Tensor:
    """A fresh (seed, offset), int64 (2,), from torch's default generator of the device."""
    return torch.randint(2**63 - 1, (2,), device=device)


def threshold_of(dropout_p: float) -> int:
    """What a word is compared with: p 2^31, rounded. A word below it means dropped."""
    return round(dropout_p * 2**31)


def random_words_reference(rng: Tensor, quad: Tensor, stream: Tensor) -> Tensor:
    """The formula above, transcribed: int64 (..., 4), each word in [0, 2^31).

    quad and stream are integers below 2^32, broadcast against each other.
    """
    low, seed, offset = 0xFFFFFFFF, rng[0], rng[1]
    c0, c1 = torch.broadcast_tensors(quad.long(), stream.long())
    c2, c3 = (offset & low).expand_as(c0), (offset >> 32 & low).expand_as(c0)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        # int64 products wrap as unsigned ones do; shift and mask take their upper halves.
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c2 = (product2 >> 32 & low) ^ c1 ^ k0, (product0 >> 32 & low) ^ c3 ^ k1
        c1, c3 = product2 & low, product0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack((c0, c1, c2, c3), dim=-1) >> 1


def keep_mask_reference(
    rng: Tensor, dropout_p: float, rows: int, cols: int, streams: Tensor
) -> Tensor:
    """Which elements of a (S, rows, cols) tensor are kept, bool; one stream for each of S slices.

    Element (row, col) is word col mod 4 of quad row ceil(cols / 4) + col / 4.
    """
    quads = -(-cols // 4)
    quad = torch.arange(rows * quads, device=streams.device).view(rows, quads)
    words = random_words_reference(rng, quad, streams[:, None, None])
    return words.flatten(2)[:, :, :cols] >= threshold_of(dropout_p)


@triton.jit
def random_words(
    rng_ptr,  # (2,) int64: seed, offset
    quad,  # int32 block: which four elements
    stream,  # int32 scalar or block that broadcasts against quad
):
    """The four words of each quad, as four int32 blocks."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    offset_low = (offset & 0xFFFFFFFF).to(tl.uint32)
    offset_high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quad, stream, offset_low, offset_high)
    return (
        (w0 >> 1).to(tl.int32),
        (w1 >> 1).to(tl.int32),
        (w2 >> 1).to(tl.int32),
        (w3 >> 1).to(tl.int32),
    )


@triton.jit
def random_tile(
    rng_ptr,  # (2,) int64: seed, offset
    quad,  # int32 (ROWS, COLS / 4)
    stream,  # int32 scalar or block that broadcasts against quad
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Words (ROWS, COLS): column c is word c mod 4 of quad c / 4."""
    w0, w1, w2, w3 = random_words(rng_ptr, quad, stream)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLS))
