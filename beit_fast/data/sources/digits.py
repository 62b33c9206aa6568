"""scikit-learn's digits: 1,797 real handwritten digits with labels, at hand without a network.

They are UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998), 8 x 8
pixels of 17 grey levels, here enlarged to 32 x 32. The split is fixed and even in the classes: 500
images to test, 300 to choose by, 997 to train on. Wherever labelled images are named by a folder,
so are these by

    digits:train  digits:valid  digits:test     a part
    digits:train:10                             10 images of each class of it, drawn with seed 0
    digits:train:10:3                           another 10, drawn with seed 3

`python -m beit_fast.data.sources.digits FOLDER` writes the parts as PNG, in class folders.
"""

import argparse
import functools
import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NAME = "digits"
PARTS = {"test": 500, "valid": 300, "train": None}  # in this order; None: the rest
SIDE = 32  # pixels
LEVELS = 16  # the brightest grey level
_SPLIT_SEED = 0


class Digits:
    """An `ImageSource` of one part, in memory; `labels` int64 (n,). Named as on top of this file.

    Raises ValueError for a name that is none, a class of too few images, and without scikit-learn.
    """

    def __init__(self, name: str):
        part, *numbers = _parse(name)
        images, labels, rows = _load()
        rows = rows[part]
        if numbers:
            rows = _of_each_class(rows, labels, *numbers, name)
        self.path = name
        self.labels = torch.from_numpy(labels[rows])
        self._rows = rows
        self._files = [_png(image) for image in images[rows]]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return self._files[index]

    def name(self, index: int) -> str:
        return f"{NAME}/{int(self.labels[index])}/{self._rows[index]:04d}.png"

    def key(self, index: int) -> str:
        return self.name(index)

    def size(self, index: int) -> int:
        return len(self._files[index])

    def digest(self) -> str:
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(f"{self.name(index)}\0".encode() + self.read(index))
        return digest.hexdigest()


def is_digits(path: str | Path) -> bool:
    """Whether `path` names digits and no folder."""
    return str(path).partition(":")[0] == NAME and ":" in str(path)


def labelled_digits(name: str) -> tuple[Digits, Tensor, list[str]]:
    """Images, labels and class names, as `class_folders` gives them. Raises as `Digits`."""
    source = Digits(name)
    return source, source.labels, [str(digit) for digit in range(10)]


def _parse(name: str) -> tuple[str | int, ...]:
    """(part,), or (part, images of each class, seed of the draw)."""
    _, part, *rest = name.split(":")
    if part not in PARTS or len(rest) > 2 or not all(n.isdecimal() for n in rest):
        raise ValueError(
            f"{name!r} names no digits: take digits:train, digits:valid or digits:test, and for "
            "some of each class digits:train:10, or digits:train:10:3 for another draw"
        )
    if not rest:
        return (part,)
    return part, int(rest[0]), int(rest[1]) if len(rest) == 2 else 0


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Images uint8 (1797, 8, 8), labels int64 (1797,), and the rows of each part."""
    try:
        from sklearn.datasets import load_digits  # of the test extra: 1.5 s to import
    except ImportError as error:
        raise ValueError(
            "the digits are scikit-learn's, which is not installed: pip install scikit-learn, or "
            'the extra, pip install -e ".[test]"'
        ) from error
    digits = load_digits()
    images = np.round(digits.images * (255 / LEVELS)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    # Every class shuffled, then one of each class in turn: any run of rows is even in the classes.
    rng = np.random.default_rng(_SPLIT_SEED)
    ranks = np.empty(len(labels))
    for label in range(10):
        mine = np.flatnonzero(labels == label)
        ranks[mine] = (rng.permutation(len(mine)) + 0.5) / len(mine)
    order, rows, first = np.argsort(ranks, kind="stable"), {}, 0
    for part, count in PARTS.items():
        last = len(order) if count is None else first + count
        rows[part] = np.sort(order[first:last])
        first = last
    return images, labels, rows


def _of_each_class(
    rows: np.ndarray, labels: np.ndarray, count: int, seed: int, name: str
) -> np.ndarray:
    fewest = int(np.bincount(labels[rows], minlength=10).min())
    if not 1 <= count <= fewest:
        raise ValueError(f"{name!r}: a class has {fewest} images there: ask for 1 to {fewest}")
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(rows[labels[rows] == label], count, replace=False) for label in range(10)]
    return np.sort(np.concatenate(drawn))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    enlarged = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    enlarged.save(file, "PNG")
    return file.getvalue()


def write_digits(folder: Path) -> None:
    """PNG files `folder`/train/3/0017.png and so on; 0017 is the row in scikit-learn's order."""
    for part in PARTS:
        source = Digits(f"{NAME}:{part}")
        for index in range(len(source)):
            _, *below = source.name(index).split("/")
            path = folder.joinpath(part, *below)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the digits as PNG in class folders.")
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
