"""Codes placed among the features of real images before training, so that all of them are in use.

From random weights the codes compete from the first step, and in a short run a few of them win
everything. Instead, the rows of the encoder's output convolution are set so that the logits are a
negative squared distance, and the code of a position is its nearest centre:

    logits_v = -scale / 2 * |f - c_v|^2 + (the same for all v)
             = scale * (c_v - m) . (f - m) - scale / 2 * |c_v - m|^2

with features f of the untrained encoder, their mean m, and centres c from k-means over them.

Source    the idea is BEiT v2's, whose codebook starts from k-means (arXiv:2208.06366); DALL-E's
          dVAE starts from random weights
Letters   P: positions, B h w; C: channels of the features; V: codes
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.head.linear_argmax import linear_argmax
from beit_fast.tokenizer.dvae import Dvae, map_pixels

# Standard deviation of a position's logits over the codes at the start. High enough that a draw
# mostly is the nearest centre, so the decoder has something definite to learn from.
CONTRAST = 12.0
_NUM_ITERATIONS = 5
_DISTANCES_OF_SAMPLE = 2**24  # 64 MiB of fp32


@torch.no_grad()
def place_codes(dvae: Dvae, images: Tensor) -> None:
    """Set the encoder's output convolution so that each code is a cluster of what `images` show.

    images (B, 3, height, width) as for `Dvae.encode`, with at least vocab_size positions (8 x 8
    pixels each). Lloyd's algorithm starts from positions chosen by a fixed seed: the same images
    and weights give the same codes. Raises ValueError for too few positions.
    """
    dtype = dvae.encoder.blocks["input"].w.dtype
    features_BChw = dvae.encoder.features(map_pixels(images, dtype)).float()
    features_PC = features_BChw.permute(0, 2, 3, 1).flatten(0, 2)
    num_positions, vocab_size = len(features_PC), dvae.vocab_size
    if num_positions < vocab_size:
        raise ValueError(
            f"{num_positions} positions for {vocab_size} codes: give at least "
            f"{-(-vocab_size * len(images) // num_positions)} images of this size, or fewer codes"
        )
    mean_C = features_PC.mean(dim=0)
    centred_PC = features_PC - mean_C
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(num_positions, generator=generator)[:vocab_size]
    codes_VC = centred_PC[chosen.to(images.device)]
    for _ in range(_NUM_ITERATIONS):
        codes_VC = _move_to_means(codes_VC, centred_PC)

    half_norm_V = codes_VC.square().sum(dim=1) / 2
    sample_PC = centred_PC[: max(2, _DISTANCES_OF_SAMPLE // vocab_size)]
    spread = F.linear(sample_PC, codes_VC, -half_norm_V).std(dim=1).mean()
    scale = CONTRAST / spread.clamp(min=1e-6)  # images of one colour have no spread
    output = dvae.encoder.blocks["output"]["conv"]
    output.w.copy_((scale * codes_VC)[:, :, None, None])
    output.b.copy_(-scale * (half_norm_V + codes_VC @ mean_C))


def _move_to_means(codes_VC: Tensor, features_PC: Tensor) -> Tensor:
    """One step of Lloyd's algorithm; a code that is nearest to nothing stays where it is."""
    half_norm_V = codes_VC.square().sum(dim=1) / 2
    nearest_P = linear_argmax(features_PC, codes_VC, -half_norm_V, precision="tf32x3")
    sums_VC = torch.zeros_like(codes_VC).index_add_(0, nearest_P, features_PC)
    counts_V = torch.zeros_like(half_norm_V).index_add_(
        0, nearest_P, torch.ones_like(features_PC[:, 0])
    )
    means_VC = sums_VC / counts_V.clamp(min=1)[:, None]
    return torch.where(counts_V[:, None] > 0, means_VC, codes_VC)
