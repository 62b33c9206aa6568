"""Which patches are hidden: blockwise masking, its variants, and plain random masking.

    block        the authors' script: rectangles of log-uniform aspect until `num_masked` patches
                 are hidden; a rectangle that would pass the target is drawn again, so masks can
                 fall short (14 x 14: mean 74.47 of 75) and never exceed it
    block_exact  the same, then single patches hidden or shown until the target is met (BEiT v2)
    block_paper  Algorithm 1 to the letter: linear aspect, no rejection, until more than 40 % of
                 the grid is hidden (14 x 14: 79 to 98 patches, mean 84.6)
    random       `num_masked` patches, each set equally likely (the paper's ablation)

Source: arXiv:2106.08254 section 2.3 and Algorithm 1; unilm `beit/masking_generator.py`;
arXiv:2208.06366 for the exact count. `python -m beit_fast.data.masking` draws some.

A mask under construction is a Python integer, patch (row, column) being bit row * Gw + column: the
overlap of a block and a mask is then one AND and one bit count, which is what makes a mask cheap.
"""

import functools
import math
import random
from collections.abc import Iterator

import numpy as np

from beit_fast.data.config import MaskingConfig
from beit_fast.data.seeds import below
from beit_fast.flags import flag

PAPER_RATIO = 0.4  # Algorithm 1 goes on until more than this share of the patches is hidden
TRIES = 10  # rectangles drawn before a mask is left as it is


def draw_mask(grid: tuple[int, int], config: MaskingConfig, rng: random.Random) -> np.ndarray:
    """One mask: bool (Gh, Gw), True where the patch is hidden and must be predicted.

    Raises ValueError where `max_masked` does.
    """
    _check(grid, config)
    if config.strategy == "random":
        mask = _random_bits(grid, config.num_masked, rng)
    elif config.strategy == "block_paper":
        mask = _algorithm_1(grid, config, rng)
    else:
        mask = _blocks(grid, config, rng)
        if config.strategy == "block_exact":
            mask = _force_count(mask, grid, config.num_masked, rng)
    return _to_array(mask, grid)


@functools.lru_cache(maxsize=64)
def max_masked(grid: tuple[int, int], config: MaskingConfig) -> int:
    """An upper bound on the hidden patches of any one mask: what fixed-size buffers hold.

    Raises ValueError for a configuration that cannot mask this grid.
    """
    _check(grid, config)
    if config.strategy != "block_paper":
        return config.num_masked
    num_patches = grid[0] * grid[1]
    limit = PAPER_RATIO * num_patches
    # The last block starts from at most `limit` hidden patches, and rounding may make it larger
    # than the area drawn for it.
    bound = max(
        hidden + _largest_block(grid, max(config.min_block, limit - hidden), config.aspects)
        for hidden in range(math.floor(limit) + 1)
    )
    return min(bound, num_patches)


def _blocks(grid: tuple[int, int], config: MaskingConfig, rng: random.Random) -> int:
    """The loop of the authors' script."""
    height, width = grid
    low, high = map(math.log, config.aspects)
    log_range = high - low
    num_masked, min_block = config.num_masked, config.min_block  # looked up once: 20 tries a mask
    max_block = config.max_block or num_masked
    mask = count = 0
    while count < num_masked:
        room = min(num_masked - count, max_block)
        for _ in range(TRIES):
            # With less room than min_block the interval is simply reversed, as in the script.
            area = min_block + (room - min_block) * rng.random()
            aspect = math.exp(low + log_range * rng.random())
            block_height = round(math.sqrt(area * aspect))
            block_width = round(math.sqrt(area / aspect))
            if block_height >= height or block_width >= width:
                continue
            top = below(rng, height - block_height + 1)
            left = below(rng, width - block_width + 1)
            block = _block(block_height, block_width, width) << (top * width + left)
            new = (block & ~mask).bit_count()
            if 0 < new <= room:
                mask |= block
                count += new
                break
        else:
            break  # nothing fits any more: the mask stays short of the target
    return mask


def _algorithm_1(grid: tuple[int, int], config: MaskingConfig, rng: random.Random) -> int:
    """The paper's loop, areas, heights, widths and corners being whole numbers."""
    height, width = grid
    limit = PAPER_RATIO * height * width
    mask = 0
    while mask.bit_count() <= limit:
        # Once less than min_block is left the paper's interval is empty: blocks stay that large.
        room = max(config.min_block, int(limit - mask.bit_count()))
        area = rng.randint(config.min_block, room)
        aspect = rng.uniform(*config.aspects)
        block_height = min(round(math.sqrt(area * aspect)), height)
        block_width = min(round(math.sqrt(area / aspect)), width)
        top = rng.randint(0, height - block_height)
        left = rng.randint(0, width - block_width)
        mask |= _block(block_height, block_width, width) << (top * width + left)
    return mask


def _random_bits(grid: tuple[int, int], count: int, rng: random.Random) -> int:
    return sum(1 << patch for patch in rng.sample(range(grid[0] * grid[1]), count))


def _force_count(mask: int, grid: tuple[int, int], count: int, rng: random.Random) -> int:
    """Shows or hides single patches, drawn at random, until `count` are hidden."""
    missing = count - mask.bit_count()
    patches = range(grid[0] * grid[1])
    candidates = [patch for patch in patches if (mask >> patch & 1) == (missing < 0)]
    for patch in rng.sample(candidates, abs(missing)):
        mask ^= 1 << patch
    return mask


@functools.lru_cache(maxsize=4096)
def _block(block_height: int, block_width: int, width: int) -> int:
    """The bits of a block in the top left corner of a grid `width` patches wide."""
    row = (1 << block_width) - 1
    return sum(row << (i * width) for i in range(block_height))


def _to_array(mask: int, grid: tuple[int, int]) -> np.ndarray:
    num_patches = grid[0] * grid[1]
    octets = np.frombuffer(mask.to_bytes((num_patches + 7) // 8, "little"), np.uint8)
    bits = np.unpackbits(octets, count=num_patches, bitorder="little")
    return bits.view(np.bool_).reshape(grid)


@functools.lru_cache(maxsize=64)
def _check(grid: tuple[int, int], config: MaskingConfig) -> None:
    """Raises ValueError where masks would be impossible or always empty."""
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"a grid of {height}x{width} has no patches to hide")
    if config.strategy != "block_paper" and config.num_masked > height * width:
        raise ValueError(
            f"num_masked={config.num_masked}, but a {height}x{width} grid has {height * width} "
            f"patches: lower {flag('masking.num_masked')}"
        )
    if config.strategy in ("block", "block_exact"):
        largest = min(config.max_block or config.num_masked, config.num_masked)
        if not any(_possible_blocks((height - 1, width - 1), config, largest)):
            low, high = config.aspects
            raise ValueError(
                f"no block of {config.min_block} to {largest} patches with aspect {low:.3g} to "
                f"{high:.3g} fits a {height}x{width} grid: lower {flag('masking.min_block')} or "
                f"widen the aspects ({flag('masking.min_aspect')})"
            )


def _possible_blocks(
    limits: tuple[int, int], config: MaskingConfig, largest: float
) -> Iterator[tuple[int, int]]:
    """(height, width) of the blocks within `limits` that areas of min_block to `largest` give."""
    low, high = config.aspects
    for height in range(1, limits[0] + 1):
        for width in range(1, limits[1] + 1):
            # Rounding gives this block for true heights and widths within half a patch of it.
            tall, flat = (height + 0.5) / (width - 0.5), (height - 0.5) / (width + 0.5)
            small, large = (height - 0.5) * (width - 0.5), (height + 0.5) * (width + 0.5)
            if flat <= high and tall >= low and small <= largest and large >= config.min_block:
                yield height, width


def _largest_block(grid: tuple[int, int], area: float, aspects: tuple[float, float]) -> int:
    """The most patches of one block that is drawn with at most `area`, after rounding."""
    config = MaskingConfig(
        strategy="block_paper", min_block=1, min_aspect=aspects[0], max_aspect=aspects[1]
    )
    return max((h * w for h, w in _possible_blocks(grid, config, area)), default=1)


def _draw(mask: np.ndarray) -> list[str]:
    return ["".join(" ■" if hidden else " ·" for hidden in row) for row in mask]


if __name__ == "__main__":
    rng = random.Random(0)
    for strategy in ("block", "block_exact", "block_paper", "random"):
        masks = [draw_mask((14, 14), MaskingConfig(strategy=strategy), rng) for _ in range(3)]
        print(f"{strategy}: {', '.join(str(mask.sum()) for mask in masks)} of 196 hidden")
        print("\n".join("   ".join(rows) for rows in zip(*map(_draw, masks), strict=True)), "\n")
