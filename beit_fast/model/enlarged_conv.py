"""A 3x3 convolution of maps enlarged to one size and joined, with no map enlarged before it.

    out = conv3x3(concat_i enlarge(x_i))
        = sum_i sum_kl  R_k  (W_ikl x_i)  C_l^T

A convolution is nine products with channels, each moved by a pixel, and bilinear enlargement treats
rows, columns and channels apart, so the products may come first, where a map is still small: a map
of half the size costs a quarter, the next a sixteenth. R_k and C_l enlarge and move by k - 1 and
l - 1 pixels, with zeros from outside. Equal but for the order of sums. For UPerNet's last
convolution, more than half of its arithmetic, that is 3 times less; and kept for the backward pass
are the small maps, not their enlarged concatenation.

Letters   B images, C channels, O of the output; h, w of a map, H, W of the output, k, l of the
          kernel; R all rows k h of all maps
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_of_enlarged_reference(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Maps (B, C_i, h_i, w_i) at the first one's size, joined, by weight (O, sum C_i, 3, 3)."""
    size = maps[0].shape[2:]
    others = [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps[1:]]
    return F.conv2d(torch.cat((maps[0], *others), dim=1), weight, padding=1)


def conv_of_enlarged(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """`conv_of_enlarged_reference`, (B, O, H, W) in channels-last layout."""
    (height, width), first = maps[0].shape[2:], maps[0]
    parts = weight.split([each.shape[1] for each in maps], dim=1)
    columns = [_by_column(m, part, width) for m, part in zip(maps[1:], parts[1:], strict=True)]
    rows = [_moved(m.shape[2], height, m).transpose(1, 2).flatten(1) for m in maps[1:]]
    # All maps in one product, so that their sum is rounded once.
    rows_BHR = torch.cat(rows, dim=1).expand(first.shape[0], -1, -1)
    out_BHWO = F.conv2d(first, parts[0], padding=1).permute(0, 2, 3, 1)
    out = torch.baddbmm(out_BHWO.flatten(2), rows_BHR, torch.cat(columns, dim=1).flatten(2))
    return out.unflatten(2, (width, -1)).permute(0, 3, 1, 2)


def _by_column(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """A map's products with each row of the kernel, enlarged along rows: (B, k h, width, O)."""
    x_BhwC, columns_WwL = x.permute(0, 2, 3, 1), _moved(x.shape[3], width, x).flatten(1)
    by_row = []
    for weight_OCl in weight.unbind(2):
        product_BhwlO = F.linear(x_BhwC, weight_OCl.permute(2, 0, 1).flatten(0, 1))
        by_row.append(columns_WwL @ product_BhwlO.unflatten(3, (3, -1)).flatten(2, 3))
    return torch.cat(by_row, dim=1)


def _moved(small: int, large: int, like: Tensor) -> Tensor:
    """What enlarges a line of `small` to `large` pixels, moved by -1, 0, 1: (large, small, 3)."""
    eye = torch.eye(small, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    enlarge = F.interpolate(eye[None], size=large, mode="linear", align_corners=False)[0].t()
    return F.pad(enlarge, (0, 0, 1, 1)).unfold(0, 3, 1).to(like.dtype)
