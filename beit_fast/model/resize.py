"""Positions learnt on one grid of patches, carried over to another.

Relative tables are images over the offset (rows, columns) between two patches. They are not
stretched evenly: a source offset k is placed at x_k = 1 + q + ... + q^(k-1) target patches, with q
such that the outermost lands on the outermost. So the bias one patch away stays what was learnt,
and far offsets, which matter less, take the stretch. Between the points: an interpolating cubic
spline. Even stretching costs segmentation accuracy (microsoft/unilm issue #376).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.rel_pos_bias import relative_position_rows


def resize_rel_pos_table(
    table: Tensor, src_grid: tuple[int, int], dst_grid: tuple[int, int]
) -> Tensor:
    """A table (R, H) of a (Gh, Gw) grid for another grid: (R', H), same dtype and device.

    The last three rows, [CLS]'s, stay as they are. Rows and columns are treated apart, so grids
    need not be square. Going to a smaller grid crops the table (the original's bisection stops at
    q = 1.01), nearly without squeezing it. A copy where the grids are equal.
    Raises ValueError where the table is not of `src_grid`. Source: unilm beit
    `run_class_finetuning.py`, whose `interp2d(kind="cubic")` SciPy has since removed.

    >>> resize_rel_pos_table(torch.zeros(732, 12), (14, 14), (24, 24)).shape
    torch.Size([2212, 12])
    """
    if table.ndim != 2 or len(table) != relative_position_rows(src_grid):
        raise ValueError(
            f"the table is {tuple(table.shape)}, one of a {src_grid[0]}x{src_grid[1]} grid has "
            f"{relative_position_rows(src_grid)} rows: pass the grid that it was trained on"
        )
    if src_grid == dst_grid:
        return table.detach().clone()
    axes = [_source_offsets(src, dst) for src, dst in zip(src_grid, dst_grid, strict=True)]
    offsets = [np.arange(1 - dst, dst, dtype=np.float64) for dst in dst_grid]
    image = table[:-3].detach().cpu().double().numpy().reshape(*map(len, axes), -1)
    resized = np.empty((*map(len, offsets), table.shape[1]))
    for head in range(table.shape[1]):
        resized[..., head] = _spline(axes, image[..., head])(*offsets)
    patches = torch.from_numpy(resized).flatten(0, 1).to(table)
    return torch.cat((patches, table[-3:].detach()))


def resize_pos_embed(
    pos_embed: Tensor, src_grid: tuple[int, int], dst_grid: tuple[int, int]
) -> Tensor:
    """Absolute positions (1, 1 + L, D) of one grid, bicubically for another: (1, 1 + L', D).

    [CLS]'s position stays. Raises ValueError where `pos_embed` is not of `src_grid`.
    Source: unilm beit `run_class_finetuning.py`.
    """
    if pos_embed.ndim != 3 or pos_embed.shape[:2] != (1, 1 + src_grid[0] * src_grid[1]):
        raise ValueError(
            f"the positions are {tuple(pos_embed.shape)}, those of a {src_grid[0]}x{src_grid[1]} "
            f"grid are (1, {1 + src_grid[0] * src_grid[1]}, D): pass the grid they were trained on"
        )
    if src_grid == dst_grid:
        return pos_embed.detach().clone()
    cls, patches = pos_embed.detach().split([1, pos_embed.shape[1] - 1], dim=1)
    image_1DGG = patches.unflatten(1, src_grid).permute(0, 3, 1, 2)
    image_1DGG = F.interpolate(image_1DGG, size=dst_grid, mode="bicubic", align_corners=False)
    return torch.cat((cls, image_1DGG.flatten(2).transpose(1, 2)), dim=1)


def growth_ratio(src: int, dst: int) -> float:
    """q, such that 1 + q + ... + q^(n-1) with n = src - 1 reaches dst - 1 patches.

    By the original's bisection between 1.01 and 1.5, its last midpoint included. `src` and `dst`
    are patches along one axis.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (src - 1)) / (1 - q) > dst - 1:
            high = q
        else:
            low = q
    return q


def _source_offsets(src: int, dst: int) -> np.ndarray:
    """Where the 2 src - 1 source offsets lie, in target patches, from the most negative."""
    q = 1.0 if src == dst else growth_ratio(src, dst)
    positive = np.cumsum(q ** np.arange(src - 1, dtype=np.float64))
    return np.concatenate((-positive[::-1], [0.0], positive))


def _spline(axes: list[np.ndarray], image: np.ndarray) -> Callable[..., np.ndarray]:
    """The interpolating spline, cubic where there are points enough, constant along one point."""
    from scipy.interpolate import RectBivariateSpline

    points = []
    for dimension, axis in enumerate(axes):
        if len(axis) == 1:
            image = np.repeat(image, 2, axis=dimension)
            axis = np.array([0.0, 1.0])
        points.append(axis)
    rows, columns = points
    degrees = {"kx": min(3, len(rows) - 1), "ky": min(3, len(columns) - 1)}
    return RectBivariateSpline(rows, columns, image, s=0, **degrees)
