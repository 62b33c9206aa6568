"""How well a tokenizer reconstructs, and how much of its codebook it uses.

Everything stays on the device as tensors: nothing here waits for it until `describe_codebook` is
asked for words.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A codebook is called collapsed when its perplexity is below this share of its size.
COLLAPSED_BELOW = 0.02


class ReconstructionError(NamedTuple):
    """Mean absolute and mean squared difference of pixel values in [0, 1]: scalars."""

    mae: Tensor
    mse: Tensor


class CodebookUse(NamedTuple):
    """Scalars of a histogram of codes.

    used          share of the codes that occur at all, 0 .. 1
    perplexity    exp(entropy): how many equally frequent codes would be as hard to guess, 1 .. V
    """

    used: Tensor
    perplexity: Tensor


def reconstruction_error(images: Tensor, reconstructions: Tensor) -> ReconstructionError:
    """Errors of images against reconstructions of the same shape, both floats in [0, 1]."""
    difference = reconstructions.float() - images.float()
    return ReconstructionError(difference.abs().mean(), difference.square().mean())


def count_codes(ids: Tensor, vocab_size: int) -> Tensor:
    """Histogram of ids (any shape): int64 (V,). Sums of histograms are histograms of unions.

    scatter_add_ of integers rather than bincount, which waits for the device to learn its size.
    """
    flat_ids = ids.flatten()
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, flat_ids, torch.ones_like(flat_ids))


def code_entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of the distribution of codes, the loss of a model that knows only that.

    counts (V,); a scalar, 0 for an empty histogram.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum()


def codebook_use(counts: Tensor) -> CodebookUse:
    """Use and perplexity of the codes counted by `count_codes`."""
    return CodebookUse((counts > 0).double().mean(), code_entropy(counts).exp())


def describe_codebook(counts: Tensor) -> str:
    """One line for the end of a run; says so when the codebook has collapsed. Waits for the device.

    Collapsed: perplexity below 2 % of the codes (10 of 512, 164 of 8192).
    """
    vocab_size, total = counts.numel(), int(counts.sum())
    used, perplexity = int((counts > 0).sum()), math.exp(code_entropy(counts).item())
    line = f"{used} of {vocab_size} codes used in {total} positions, perplexity {perplexity:.1f}"
    if perplexity >= COLLAPSED_BELOW * vocab_size:
        return line
    most_frequent = counts.max().item() / max(total, 1)
    return (
        f"COLLAPSED: {line}; the most frequent code takes {most_frequent:.0%}. Tokens this poor "
        "teach BEiT little: start from k-means (codebook_init), lower the encoder's learning rate "
        "(encoder_lr_scale), or train longer"
    )
