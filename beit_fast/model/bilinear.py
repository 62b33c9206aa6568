"""Maps resized and pooled so that their gradients have the same bits every time.

    out = R x C^T        dx = R^T dout C

R (H, h) resizes a column of a map, C (W, w) a row. On a GPU torch adds up the gradients of
`interpolate` and `adaptive_avg_pool2d` in an order of chance; there both are two products each.
On a CPU they are torch's own.

Letters   B images, C channels, h, w of a map, H, W of the output
Source    torch's notes on reproducibility, `torch.use_deterministic_algorithms`
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) of another size, bilinearly between the centres of pixels."""
    if x.shape[2:] == torch.Size(size):
        return x
    if x.is_cuda:
        return by_products(x, enlarging(x, size))
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_backward(dout: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient of maps of `size` (h, w), from that of what `resize` made of them."""
    shape = (*dout.shape[:2], *size)
    if dout.is_cuda:
        like = dout.new_empty(()).expand(shape)
        return by_products(dout, [each.t() for each in enlarging(like, dout.shape[2:])])
    return torch.ops.aten.upsample_bilinear2d_backward(dout, dout.shape[2:], shape, False)


class Pool(nn.AdaptiveAvgPool2d):
    """Maps (B, C, h, w) to means over a grid of (side, side) parts, which may share pixels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return by_products(x, pooling(x, self.output_size))
        return super().forward(x)


def enlarging(x: Tensor, size: Sequence[int]) -> list[Tensor]:
    """R and C that resize x to `size`; of fp32 at least, until they meet x."""
    return [
        F.interpolate(_eye(before, x), size=after, mode="linear", align_corners=False)[0].t()
        for before, after in zip(x.shape[2:], size, strict=True)
    ]


def pooling(x: Tensor, side: int) -> list[Tensor]:
    """R and C that take means over `side` parts."""
    return [F.adaptive_avg_pool1d(_eye(before, x), side)[0].t() for before in x.shape[2:]]


def by_products(x: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """R x C^T for `lines` R and C, in x's dtype, (B, C, H, W) in channels-last layout."""
    rows_Hh, columns_Ww = (line.to(x.dtype) for line in lines)
    with torch.autocast(x.device.type, enabled=False):  # `interpolate` has x's dtype under it too
        x_BhwC = x.permute(0, 2, 3, 1)
        x_BHwC = (rows_Hh @ x_BhwC.flatten(2)).unflatten(2, x_BhwC.shape[2:])
        return (columns_Ww @ x_BHwC).permute(0, 3, 1, 2)


def _eye(side: int, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.eye(side, dtype=dtype, device=like.device)[None]
