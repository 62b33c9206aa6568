"""What the shapes of a checkpoint's tensors say of heads and grid, and where they leave it open.

A relative-position table has a column a head; a plain ViT's tensors do not show its heads, so these
are known of the published sizes alone. Rows count the offsets or the positions of a grid: one of
(4, 9) has as many positions as one of (6, 6).
"""

import math
from collections.abc import Iterator

from torch import Tensor

from beit_fast.kernels.attention.rel_pos_bias import relative_position_rows
from beit_fast.model.config import BeitConfig
from beit_fast.weights.published import PUBLISHED, Published

LONGEST = 3  # times the other side: images longer than that are not what a row count suggests


class UnknownHeads(ValueError):
    """Nothing says how many heads there are; `sizes` are (embed_dim, depth)."""

    def __init__(self, message: str, sizes: tuple[int, int]) -> None:
        super().__init__(message)
        self.sizes = sizes


def num_heads_of(
    table: Tensor | None, width: int, known: tuple[int, int], wanted: int | None = None
) -> tuple[int, str | None]:
    """Heads of a model of these sizes, and in words that they are `wanted`, or None.

    table (R, H) or None; width: channels of all heads; known: (embed_dim, depth). `wanted` counts
    where there is no table. Raises UnknownHeads.
    """
    published = [entry.config.num_heads for entry in PUBLISHED.values() if _sizes(entry) == known]
    num_heads = (wanted or next(iter(published), 0)) if table is None else table.shape[-1]
    if num_heads < 1 or width % num_heads:
        raise UnknownHeads(
            f"how many heads share the {width} channels of attention is not known: no table of "
            f"relative positions shows it, no published BEiT has {known[1]} blocks of {known[0]}"
            f"{f', and {num_heads} heads do not divide them' if num_heads else ''}; pass num_heads",
            known,
        )
    if table is not None or num_heads in published:
        return num_heads, None
    return num_heads, f"num_heads {num_heads} was asked for: the source does not show it"


def grid_of(
    table: Tensor | None,
    pos_embed: Tensor | None,
    patch_pixels: tuple[int, int],
    known: tuple[int, int],
    wanted: int | tuple[int, int] | None = None,
) -> tuple[tuple[int, int], str | None]:
    """(Gh, Gw) of the positions, and in words what of it is a guess, or None.

    `wanted` (pixels) is the grid where the rows are as many as it has; else it is square. `known`:
    (embed_dim, depth); square grids of the published sizes are no guess.
    Raises ValueError where there are no positions, and where no square grid has so many.
    """
    if table is None and pos_embed is None:
        if wanted is None:
            raise ValueError("no positions, so no size of images: pass img_size")
        return BeitConfig(img_size=wanted, patch_size=patch_pixels).grid, None
    if table is not None:
        rows, what, count = len(table), f"a table of {len(table)} rows", relative_position_rows
    else:
        rows = pos_embed.shape[1] if pos_embed.ndim == 3 else 0
        what, count = f"positions {tuple(pos_embed.shape)}", _positions
    grids = list(_grids(rows, table is not None))
    square = next((grid for grid in grids if grid[0] == grid[1]), None)
    if wanted is not None:
        try:
            grid = BeitConfig(img_size=wanted, patch_size=patch_pixels).grid
        except ValueError:
            grid = None  # patches do not divide it: what is made of it says so
        if grid is not None and count(grid) == rows:
            if square in (None, grid):
                return grid, None
            return grid, (
                f"{what} is taken for the grid {grid[0]}x{grid[1]} that was asked for; "
                f"{square[0]}x{square[1]} would have as many"
            )
    if square is None:
        fit = [f"{h * patch_pixels[0]}x{w * patch_pixels[1]}" for h, w in grids]
        raise ValueError(
            f"{what} is of no square grid: pass img_size, the (height, width) it was trained on"
            f"{f' (so many have {ways} px)' if (ways := ', '.join(fit)) else ''}, or convert it "
            "with that img_size to a .safetensors file, which says it"
        )
    published = any(
        (known, square) == (_sizes(entry), entry.config.grid) for entry in PUBLISHED.values()
    )
    others = [f"{h}x{w}" for h, w in grids if h != w]
    if published or not others:
        return square, None
    return square, (
        f"{what} is taken for the grid {square[0]}x{square[1]}; {', '.join(others)} would have as "
        "many: pass img_size if it is one of these"
    )


def _sizes(entry: Published) -> tuple[int, int]:
    return entry.config.embed_dim, entry.config.depth


def _positions(grid: tuple[int, int]) -> int:
    return 1 + grid[0] * grid[1]


def _grids(rows: int, is_table: bool) -> Iterator[tuple[int, int]]:
    """Grids that have so many rows, of sides in a usual proportion, the flattest first."""
    product = rows - 3 if is_table else rows - 1
    if product < 1:
        return
    for first in range(1, math.isqrt(5 * product) + 1):  # 5 = (2 * 3 - 1) / (2 * 1 - 1)
        second, rest = divmod(product, first)
        if rest or (is_table and not (first % 2 and second % 2)):
            continue
        height, width = ((first + 1) // 2, (second + 1) // 2) if is_table else (first, second)
        if max(height, width) <= LONGEST * min(height, width):
            yield height, width
