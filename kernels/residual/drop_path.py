"""Which samples skip a residual branch (stochastic depth), decided on the device.

Three ways. `scale_residual` takes any:
    keep        (B,) factors of the caller's own making, 0 or 1 / (1 - p)
    drop_path_p sample b is kept where word 0 of quad 2^31 - 1, stream b is at least p 2^31
                (`philox`), so that a kernel decides for itself and its backward decides the same
    kept        a fixed number of samples, drawn without replacement; the branch runs on no other

The third changes how samples are drawn and not what is expected: each is kept with probability
C / B and scaled by B / C, C = round(B (1 - p)), but not independently of the others.

Source    stochastic depth arXiv:1603.09382; a subset of fixed size: DINOv2 arXiv:2304.07193, 5
"""

from typing import NamedTuple

import torch
from torch import Tensor

from beit_fast.kernels.philox import random_words_reference, threshold_of

# Quads of element dropout stay below D / 4.
DROP_PATH_QUAD = 2**31 - 1


class KeptSamples(NamedTuple):
    """C of B samples, as a list and as its inverse."""

    samples: Tensor  # int64 (C,), ascending
    slots: Tensor  # int32 (B,): where in the list a sample is; -1: dropped

    @property
    def scale(self) -> float:
        """What makes the branch unbiased: B / C."""
        return len(self.slots) / max(len(self.samples), 1)


def num_kept(num_samples: int, drop_path_p: float) -> int:
    """round(B (1 - p)), at least one sample where there is any."""
    return max(round(num_samples * (1 - drop_path_p)), min(num_samples, 1))


def draw_kept_samples(
    num_samples: int, drop_path_p: float, device: torch.device | None = None
) -> KeptSamples:
    """A uniform draw of `num_kept` samples without replacement, from torch's default generator.

    Static shapes and no wait for the device, so it can be captured in a CUDA graph.
    """
    count = num_kept(num_samples, drop_path_p)
    order = torch.rand(num_samples, device=device).argsort()
    samples = order[:count].sort().values
    slots = torch.full((num_samples,), -1, dtype=torch.int32, device=device)
    places = torch.arange(count, dtype=torch.int32, device=device)
    return KeptSamples(samples, slots.scatter(0, samples, places))


def drop_path_keep_reference(rng: Tensor, drop_path_p: float, num_samples: int) -> Tensor:
    """Which samples the second way keeps, bool (B,)."""
    streams = torch.arange(num_samples, device=rng.device)
    quad = torch.full((), DROP_PATH_QUAD, device=rng.device)  # filled there: nothing is copied
    return random_words_reference(rng, quad, streams)[:, 0] >= threshold_of(drop_path_p)
