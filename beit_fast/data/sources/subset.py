"""A part of a source of images, as a source: to hold images out of training."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.sources.folder import (
    ImageSource,
    damage_of,
    read_ahead,
    read_shards_ahead,
    read_windowed,
    shard_sizes_of,
)


class Subset:
    """The images of `source` with these numbers, numbered anew."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]):
        self.source, self._numbers = source, [int(number) for number in numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> bytes:
        return self.source.read(self._numbers[index])

    def name(self, index: int) -> str:
        return self.source.name(self._numbers[index])

    def key(self, index: int) -> str:
        return self.source.key(self._numbers[index])

    def size(self, index: int) -> int | None:
        return self.source.size(self._numbers[index])

    def ahead(self, indices: Sequence[int]) -> None:
        read_ahead(self.source, [self._numbers[index] for index in indices])

    @property
    def shard_sizes(self) -> np.ndarray | None:
        """Images of each shard of the source that are among these, int64 (S,): the shards keep
        their numbers. None for a source without, and where these are not in its order."""
        sizes = shard_sizes_of(self.source)
        if sizes is None or (np.diff(self._numbers) < 0).any():
            return None
        return np.diff(np.searchsorted(self._numbers, np.cumsum([0, *sizes])))

    def windowed(self, window: int) -> None:
        read_windowed(self.source, window)

    def shards_ahead(self, shards: Sequence[int]) -> None:
        read_shards_ahead(self.source, shards)

    @property
    def damage(self) -> Mapping[str, str]:
        return damage_of(self.source)

    def digest(self) -> str:
        numbers = ",".join(map(str, self._numbers))
        return hashlib.sha256(f"{self.source.digest()} {numbers}".encode()).hexdigest()


def split(labels: Tensor, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to choose by: `share` of every class, at least one image of each
    class that has two. Raises ValueError where none could be held out."""
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        held_out.append(rows[:count])
        train.append(rows[count:])
    held_out = torch.cat(held_out).sort().values.numpy()
    if len(held_out) == 0:
        raise ValueError("every class has one image: none is left to choose the rate by; add more")
    return torch.cat(train).sort().values.numpy(), held_out
