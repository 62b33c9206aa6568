"""What blocks in the middle give, chosen and laid out as timm's `forward_intermediates` does."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Layout = Literal["NCHW", "NLC"]


def chosen_blocks(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Numbers of blocks, from 0: all for None, the last n for n, or those listed (-1: the last).

    Raises ValueError for blocks that are not there.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"indices={indices}: this model has {depth} blocks, pass 1 to {depth}")
        return list(range(depth - indices, depth))
    chosen = [index + depth if index < 0 else index for index in indices]
    if not chosen or any(not 0 <= index < depth for index in chosen):
        raise ValueError(
            f"indices={list(indices)}: this model has {depth} blocks, pass at least one of "
            f"{-depth} to {depth - 1}"
        )
    return chosen


def laid_out(x: Tensor, grid: tuple[int, int], layout: Layout) -> tuple[Tensor, Tensor]:
    """Patches of a sequence (B, N, D), as maps (B, D, Gh, Gw) or (B, L, D), and [CLS] (B, 1, D).

    Raises ValueError for another layout.
    """
    if layout not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is {layout!r}: pass 'NCHW' or 'NLC'")
    cls, patches = x[:, :1], x[:, 1:]
    if layout == "NCHW":
        patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
    return patches, cls
