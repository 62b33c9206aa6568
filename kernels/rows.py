"""Rows of D columns in the registers of a program, as chunks: tiles of (ROWS, CHUNK).

A power of two is what a tile must be wide, and D seldom is one: some chunks waste less.
"""

from beit_fast.kernels._triton import cdiv, tl, triton


@triton.jit
def there(
    rows,  # (ROWS,) bool
    i: tl.constexpr,  # number of the chunk
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The rows' mask for chunk i; columns matter in a last chunk that is not full."""
    mask = rows[:, None]
    if (i + 1) * CHUNK > D:
        mask = mask & (columns(i, CHUNK) < D)
    return mask


@triton.jit
def columns(i: tl.constexpr, CHUNK: tl.constexpr):
    return i * CHUNK + tl.arange(0, CHUNK)[None, :]


@triton.jit
def load_vector(
    ptr,  # (D,)
    i: tl.constexpr,  # number of the chunk
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Chunk i of a vector as fp32 (1, CHUNK)."""
    cols = columns(i, CHUNK)
    return tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32)


def best_chunk(D: int, widest: int, most: int) -> int:
    """The power of two, 16 to `widest`, of which at most `most` cover D, with least beyond it."""
    chunks = [widest]
    while chunks[-1] > 16 and cdiv(D, chunks[-1] // 2) <= most:
        chunks.append(chunks[-1] // 2)
    return min(chunks, key=lambda chunk: (cdiv(D, chunk) * chunk, -chunk))
