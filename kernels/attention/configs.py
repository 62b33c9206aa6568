"""Which attention kernel runs for which shape, and with what tiles: short tables, no search.

The choices come from machine code (`bench/machine_code.py`): nothing spilled, and as many CTAs
on a multiprocessor as shared memory admits. None has been timed.

Legend    N queries, M keys, K width of a head
"""

from dataclasses import dataclass, replace

import torch

from beit_fast.kernels._triton import Gpu, cdiv


@dataclass(frozen=True)
class WholeForward:
    """All keys at once, in two groups of static tiles; queries in tiles of block_n."""

    first: tuple[int, ...]  # widths of the key tiles of the first group
    second: tuple[int, ...] = ()  # and of the second
    maxnreg: int | None = None
    part: int = 64  # K is cut into parts of this width and a narrower rest
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class FlashForward:
    """Queries in tiles of block_n, keys in tiles of block_m and a narrower rest."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    part: int = 64  # K is cut into parts of this width and a narrower rest


# Most keys: the groups that pad them least, and, for as many queries on Hopper, registers of a
# thread for 5, 4 or 3 CTAs on a multiprocessor where the compiler alone would take more.
_KEY_GROUPS = {
    64: ((64,), (), 96),
    80: ((64, 16), (), 128),
    128: ((64,), (64,), None),
    144: ((128,), (16,), 168),
    192: ((128,), (64,), None),
    208: ((128,), (64, 16), 168),
    256: ((128,), (128,), None),
}

# Widest head: most keys that "whole" holds where products read shared memory, and elsewhere; there
# with two CTAs in 99 KiB, which is also where nothing spills on sm_120.
_WHOLE_KEYS_FROM_SHARED = {64: 256, 80: 256, 96: 208, 128: 144}
_WHOLE_KEYS = {64: 208, 128: 80}
_WHOLE_KEYS_OF_99_KIB = {64: 144, 128: 80}


def forward_config(
    gpu: Gpu, dtype: torch.dtype, N: int, M: int, K: int, dropout: bool, tf32: bool = False
) -> WholeForward | FlashForward:
    """The forward kernel and its tiles. `tf32` matters to fp32 alone."""
    from_shared = gpu.multiplies_from_shared
    if dtype == torch.float32:
        return _fp32_config(K, tf32)
    if dropout:
        return FlashForward(64, 32, num_warps=4, num_stages=2)
    limits = _WHOLE_KEYS_FROM_SHARED
    if not from_shared:
        limits = _WHOLE_KEYS if gpu.shared_bytes > 99 << 10 else _WHOLE_KEYS_OF_99_KIB
    if N <= 256 and _row_of(limits, K) >= M:
        first, second, maxnreg = _row_of(_KEY_GROUPS, M)
        capped = gpu.capability[0] == 9 and K <= 64 and sum(first + second) >= N
        return WholeForward(first, second, maxnreg if capped else None)
    if not from_shared:
        return FlashForward(64, 64 if K <= 64 else 32, num_warps=4, num_stages=2)
    # 128 rows halve the reading of keys, unless they pad the queries by another eighth.
    if K <= 80 and _fills_128(N):
        return FlashForward(128, 64, num_warps=8, num_stages=2)
    return FlashForward(64, 64, num_warps=4, num_stages=2)


def _fp32_config(K: int, tf32: bool) -> FlashForward:
    if not tf32:
        # Fewer than 64 rows: from 64 on, Triton 3.6 multiplies "ieee" in TF32 on sm_100.
        return FlashForward(32, 32, num_warps=4, num_stages=1, part=32)
    return FlashForward(64, 32 if K <= 64 else 16, num_warps=4, num_stages=2, part=32)


def head_parts(K: int, part: int) -> tuple[tuple[int, int], ...]:
    """(begin, width) of the tiles a head is cut into: powers of two, 16 at least.

    >>> head_parts(88, 64)
    ((0, 64), (64, 32))
    """
    padded, begin, parts = cdiv(K, 16) * 16, 0, []
    while begin < padded:
        width = min(part, 1 << (padded - begin).bit_length() - 1)
        parts.append((begin, width))
        begin += width
    return tuple(parts)


def tail_width(M: int, block_m: int) -> int:
    """Width of the tile that holds what is left of M keys after whole tiles of block_m."""
    return next(width for width in (0, 16, 32, 64) if M % block_m <= width)


def _row_of(table: dict, size: int):
    """The first row of a table that holds `size`."""
    return next(row for limit, row in table.items() if size <= limit)


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile of scores, and what works on it."""

    block_n: int
    block_m: int
    num_warps: int = 4
    num_stages: int = 2
    part: int = 64  # K is cut into parts of this width and a narrower rest


@dataclass(frozen=True)
class GeneralBackward:
    """The tiles of the three kernels of `backward_general`."""

    dq: Tile
    dk_dv: Tile
    dbias: Tile


def general_config(
    gpu: Gpu, dtype: torch.dtype, N: int, M: int, K: int, dropout: bool, tf32: bool = False
) -> GeneralBackward:
    """The tiles of the general backward: the largest that spill nothing. `tf32` as in forward."""
    if dtype == torch.float32:
        return _fp32_backward_config(K, tf32)
    rows = 128 if _fills_128(N) else 64
    tall = Tile(rows, 64, num_warps=rows // 16)
    small = Tile(64, 32)
    if gpu.capability[0] == 9:
        if dropout:
            return GeneralBackward(small, Tile(32, 64 if K <= 96 else 32), small)
        wide = K <= 64 and rows == 128 and _fills_128(M)
        return GeneralBackward(
            dq=tall if K <= 64 else Tile(64, 64),
            dk_dv=Tile(64 if K <= 96 else 32, 64),
            dbias=replace(tall, block_m=128) if wide else tall,
        )
    if gpu.capability[0] == 10:
        if dropout:
            return GeneralBackward(small, Tile(32, 64), small)
        return GeneralBackward(
            dq=tall if K <= 64 else Tile(64, 64),
            dk_dv=Tile(64 if K <= 64 else 32, 64),
            dbias=tall if K <= 64 or rows == 128 else small,
        )
    tiles = {64: Tile(32, 64), 80: Tile(32, 64, num_stages=1), 112: Tile(16, 64, num_stages=1)}
    takes_small = dropout or (K > 80 and rows == 64)
    takes_small = takes_small or _dbias_bytes(gpu, dtype, K, tall, dropout) > gpu.shared_bytes
    return GeneralBackward(
        dq=small if (64 if dropout else 80) >= K else Tile(64, 16),
        dk_dv=_row_of({**tiles, 128: small}, K),
        dbias=small if takes_small else tall,
    )


def dbias_ctas(gpu: Gpu, dtype: torch.dtype, K: int, tile: Tile, dropout: bool) -> int:
    """How many CTAs of the dbias kernel a multiprocessor holds, as its machine code has it.

    It takes up to 255 registers of a thread, but for small tiles and where the operands of narrow
    heads are none of them.
    """
    registers = 256
    if dtype == torch.float32 or (gpu.capability[0] == 9 and K <= 64 and tile.block_m == 64):
        registers = 128
    elif tile.block_m == 32 and (not dropout or (gpu.multiplies_from_shared and K <= 64)):
        registers = 168
    by_registers = 65536 // (registers * 32 * tile.num_warps)
    # A CTA reserves 1 KiB more, and a multiprocessor has 1 KiB more than the most of one CTA.
    taken = _dbias_bytes(gpu, dtype, K, tile, dropout) + 1024
    return min(by_registers, (gpu.shared_bytes + 1024) // taken)


def _dbias_bytes(gpu: Gpu, dtype: torch.dtype, K: int, tile: Tile, dropout: bool) -> int:
    """Shared memory of the dbias kernel: q, k, v, dout once for each stage, and a tile of scores.

    Where products read registers, the last stage is there.
    """
    stages = tile.num_stages if gpu.multiplies_from_shared else max(tile.num_stages - 1, 1)
    operands = 2 * (tile.block_n + tile.block_m) * cdiv(K, 16) * 16 * dtype.itemsize
    scores = 0 if dtype == torch.float32 else tile.block_n * tile.block_m * (4 if dropout else 2)
    return stages * operands + scores


def _fp32_backward_config(K: int, tf32: bool) -> GeneralBackward:
    # Fewer than 64 rows, as in forward, and keys too: dk and dv transpose the scores.
    if tf32:
        tile = Tile(32, 32, part=32)
        if K <= 64:
            return GeneralBackward(tile, tile, tile)
        return GeneralBackward(Tile(32, 16, part=32), Tile(16, 16, part=32), tile)
    tile = Tile(32, 32, num_stages=1, part=16)
    if K <= 64:
        return GeneralBackward(tile, Tile(16, 32, num_stages=1, part=32), tile)
    return GeneralBackward(tile, replace(tile, block_m=16), tile)


def _fills_128(length: int) -> bool:
    """Whether tiles of 128 pad a length by no eighth more than tiles of 64."""
    return 8 * cdiv(length, 128) * 128 <= 9 * cdiv(length, 64) * 64
