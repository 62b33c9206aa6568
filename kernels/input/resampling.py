"""Weights of Pillow's antialiased resize, as the integers that it multiplies 8-bit levels by.

    centre[i] = (i + 1/2) scale,  scale = in / out,  widened s = max(scale, 1)
    w[i,p]    = f((p + 1/2 - centre[i]) / s)          for pixels p within `support` s of the centre
    k[i,p]    = round(2^22 w[i,p] / sum_p w[i,p])     halves away from zero

and a resized level is clip((sum_p k[i,p] level[p] + 2^21) >> 22, 0, 255): along rows, and from the
levels so rounded along columns, or the other way round where `columns_first` says so. Integers have
one sum in any order: what is left to chance is a weight within 1e-15 of a half, one in 10^9.

Both filters are 0 where they end. So a pixel at the very end, that one rounding counts in and
another one does not, changes nothing, and no more than `most_taps` pixels count.

Source: Pillow 13.0 `src/libImaging/Resample.c`, older ones of which go along rows first, always.
Bicubic has a = -1/2, Lanczos three lobes.
"""

import math

import torch
from torch import Tensor

PRECISION = 22  # bits behind the point
SUPPORT = {"bicubic": 2, "lanczos": 3}  # pixels on either side, where nothing is widened


def filter_values(name: str, x: Tensor) -> Tensor:
    """f(x), float64."""
    x = x.abs()
    if name == "lanczos":
        return torch.where(x < 3, _sinc(x) * _sinc(x / 3), 0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def most_taps(name: str, num_in: Tensor, num_out: Tensor | int) -> Tensor:
    """Pixels that count for a resized one, at most: integers like num_in."""
    widest = 2 * SUPPORT[name]
    return (-(-widest * num_in // num_out)).clamp(min=widest).minimum(num_in)


def columns_first(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether the height loses pixels, and more than twice as many as the width.

    Heights and widths may be tensors: then it is one as well.
    """
    lost = height - size[0]
    return (lost > 0) & (lost > 2 * (width - size[1]))


def resize_weights(name: str, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """First pixel of each resized one, int64 (out,), and weights from it on, int64 (taps, out).

    A pixel beyond the last one has weight 0.
    """
    scale = num_in / num_out
    widened = max(scale, 1.0)
    support = SUPPORT[name] * widened
    centre = (torch.arange(num_out, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (centre - support + 0.5).long().clamp(min=0)
    last = (centre + support + 0.5).long().clamp(max=num_in)
    taps = int(most_taps(name, torch.tensor(num_in, device="cpu"), num_out))
    pixel = first + torch.arange(taps, device="cpu")[:, None]
    values = filter_values(name, (pixel - centre + 0.5) * (1 / widened))
    values = torch.where(pixel < last, values, 0)
    values = values / values.sum(0) * 2**PRECISION
    return first, (values + values.sign() * 0.5).long()


def rounded_levels(sums: Tensor) -> Tensor:
    """Levels of sums of weighted levels, in their dtype."""
    return ((sums + 2 ** (PRECISION - 1)) >> PRECISION).clamp(0, 255)


def _sinc(x: Tensor) -> Tensor:
    angle = x * math.pi
    return torch.where(x == 0, 1, angle.sin() / torch.where(x == 0, 1, angle))
