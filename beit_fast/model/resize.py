"""Positions learnt on one grid of patches, carried over to another.

Relative tables are images over the offset (rows, columns) between two patches. They are not
stretched evenly: a source offset k is placed at x_k = 1 + q + ... + q^(k-1) target patches, with q
such that the outermost lands on the outermost. So the bias one patch away stays what was learnt,
and far offsets, which matter less, take the stretch. Between the points: an interpolating cubic
spline. Even stretching costs segmentation accuracy (microsoft/unilm issue #376).

Such a spline is linear in the table, and one in rows and columns is the one in rows after the one
in columns: resized = A_rows image A_columns^T per head, each A fixed by its two lengths. So the
gradient is exact, and a live table is resized whenever it is used: 14 x 14 to 24 x 24 with 12 heads
takes 0.3 ms of the 190 ms that a core needs for such a block of Base and one image. Nothing but the
A is kept, which no weight can make stale.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import exporting
from beit_fast.kernels.arguments import check_floating
from beit_fast.kernels.attention.rel_pos_bias import relative_position_rows


def resize_rel_pos_table(
    table: Tensor, src_grid: tuple[int, int], dst_grid: tuple[int, int]
) -> Tensor:
    """A table (R, H) of a (Gh, Gw) grid for another grid: (R', H), same dtype and device.

    The last three rows, [CLS]'s, stay as they are. Rows and columns are treated apart, so grids
    need not be square. Going to a smaller grid crops the table (the original's bisection stops at
    q = 1.01), nearly without squeezing it. A copy where the grids are equal. Differentiable.
    Raises ValueError where the table is not of `src_grid`. Source: unilm beit
    `run_class_finetuning.py`, whose `interp2d(kind="cubic")` SciPy has since removed.

    >>> resize_rel_pos_table(torch.zeros(732, 12), (14, 14), (24, 24)).shape
    torch.Size([2212, 12])
    """
    check_floating(table=table)
    if table.ndim != 2 or len(table) != relative_position_rows(src_grid):
        raise ValueError(
            f"the table is {tuple(table.shape)}, one of a {src_grid[0]}x{src_grid[1]} grid has "
            f"{relative_position_rows(src_grid)} rows: pass the grid that it was trained on"
        )
    if src_grid == dst_grid:
        return table.clone()
    if exporting():  # where tensors are stand-ins, of which none may be kept
        options = {"dtype": torch.float64, "device": table.device}
        ends = zip(src_grid, dst_grid, strict=True)
        matrices = [_axis_matrix(int(src), int(dst)).tolist() for src, dst in ends]
        return _resize(table, *(torch.tensor(matrix, **options) for matrix in matrices))
    return torch.ops.beit_fast.resize_rel_pos_table(table, [*src_grid], [*dst_grid], False)


def resize_pos_embed(
    pos_embed: Tensor, src_grid: tuple[int, int], dst_grid: tuple[int, int]
) -> Tensor:
    """Absolute positions (1, 1 + L, D) of one grid, bicubically for another: (1, 1 + L', D).

    [CLS]'s position stays. Differentiable. Raises ValueError where `pos_embed` is not of
    `src_grid`. Source: unilm beit `run_class_finetuning.py`.
    """
    check_floating(pos_embed=pos_embed)
    if pos_embed.ndim != 3 or pos_embed.shape[:2] != (1, 1 + src_grid[0] * src_grid[1]):
        raise ValueError(
            f"the positions are {tuple(pos_embed.shape)}, those of a {src_grid[0]}x{src_grid[1]} "
            f"grid are (1, {1 + src_grid[0] * src_grid[1]}, D): pass the grid they were trained on"
        )
    if src_grid == dst_grid:
        return pos_embed.clone()
    cls, patches = pos_embed.split([1, pos_embed.shape[1] - 1], dim=1)
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


@functools.lru_cache(maxsize=256)
def _axis_matrix(src: int, dst: int) -> np.ndarray:
    """A (2 dst - 1, 2 src - 1): the spline through values at the source offsets, read at integers.

    Cubic where there are points enough, constant along one point; beyond the outermost points it
    keeps their values. In fp64.
    """
    from scipy.interpolate import make_interp_spline

    axis = _source_offsets(src, dst)
    if src == 1:
        return np.ones((2 * dst - 1, 1))
    offsets = np.clip(np.arange(1 - dst, dst, dtype=np.float64), axis[0], axis[-1])
    spline = make_interp_spline(axis, np.eye(len(axis)), k=min(3, len(axis) - 1))
    return spline(offsets)


# As many as there are lengths up to 4096 px in patches of 16: a CUDA graph that was captured reads
# them, so none may go while a model is in use.
@functools.lru_cache(maxsize=256)
def _axis_matrix_on(device: torch.device, src: int, dst: int) -> Tensor:
    return torch.from_numpy(_axis_matrix(src, dst)).to(device)


def _resize(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows image columns^T for each head, computed in fp64; [CLS]'s rows as they are."""
    patches, cls = table.split([len(table) - 3, 3])
    image_RCH = patches.double().unflatten(0, (rows.shape[1], columns.shape[1]))
    image_RCH = (rows @ image_RCH.flatten(1)).unflatten(1, image_RCH.shape[1:])
    return torch.cat(((columns @ image_RCH).flatten(0, 1).to(table.dtype), cls))


# An operator, so that to the compiler it is one node for any two grids. `transposed`: the gradient,
# from a table of `dst` to one of `src`.
torch.library.define(
    "beit_fast::resize_rel_pos_table",
    "(Tensor table, SymInt[] src, SymInt[] dst, bool transposed) -> Tensor",
)


def _resize_rel_pos_table(
    table: Tensor, src: list[int], dst: list[int], transposed: bool
) -> Tensor:
    rows, columns = (_axis_matrix_on(table.device, *ends) for ends in zip(src, dst, strict=True))
    if transposed:
        rows, columns = rows.t(), columns.t()
    return _resize(table, rows, columns)


torch.library.impl("beit_fast::resize_rel_pos_table", ("CPU", "CUDA"), _resize_rel_pos_table)


@torch.library.register_fake("beit_fast::resize_rel_pos_table")
def _(table: Tensor, src: list[int], dst: list[int], transposed: bool) -> Tensor:
    return table.new_empty((relative_position_rows(src if transposed else dst), table.shape[1]))


def _save(ctx, inputs, output) -> None:
    _, ctx.src, ctx.dst, ctx.transposed = inputs


def _differentiate(ctx, dresized: Tensor) -> tuple[Tensor | None, ...]:
    operator = torch.ops.beit_fast.resize_rel_pos_table
    return operator(dresized, ctx.src, ctx.dst, not ctx.transposed), None, None, None


torch.library.register_autograd(
    "beit_fast::resize_rel_pos_table", _differentiate, setup_context=_save
)
