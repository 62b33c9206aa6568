"""Images with masks, as files and in folders."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 6
_BLOCK = 10  # pixels


def encoded(array: np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


def picture(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3), the same numbers in every library and version."""
    n = np.arange(height * width * 3, dtype=np.uint64)
    return ((n * n * 7919 + n * 104729) % 65521 % 256).astype(np.uint8).reshape(height, width, 3)


def blocks(height: int, width: int, seed: int) -> np.ndarray:
    """Ids 0 ... 5 in squares of 10 pixels, uint8 (height, width)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, NUM_CLASSES, (height // _BLOCK + 1, width // _BLOCK + 1), np.uint8)
    return coarse.repeat(_BLOCK, 0).repeat(_BLOCK, 1)[:height, :width]


def coloured(ids: np.ndarray) -> np.ndarray:
    """The image whose colours say the ids: red 40, green 255 - 40, blue 7 times them."""
    ids = ids.astype(np.uint8)
    return np.stack([40 * ids, 255 - 40 * ids, 7 * ids], axis=-1)


def write_pairs(folder: Path, count: int, size: tuple[int, int] = (40, 60)) -> tuple[Path, Path]:
    """`folder`/images and `folder`/masks with so many pairs of `coloured` blocks, losslessly."""
    images, masks = folder / "images", folder / "masks"
    for each in (images, masks):
        each.mkdir(parents=True)
    for number in range(count):
        ids = blocks(size[0] + number % 3, size[1] - number % 5, number)
        (masks / f"{number:02}.png").write_bytes(encoded(ids))
        (images / f"{number:02}.bmp").write_bytes(encoded(coloured(ids), "BMP"))
    return images, masks
