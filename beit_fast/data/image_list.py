"""The images of a pass: numbers of a source's images by place, and in which shards they lie."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class ImageList:
    """numbers: of the source's images by place; a range, or an array with -1 for what is gone.
    shard_sizes: images of each shard, where there are shards; the list has one after another."""

    def __init__(
        self, numbers: range | np.ndarray, shard_sizes: Sequence[int] | None = None
    ) -> None:
        self.numbers, self.shard_sizes = numbers, shard_sizes
        sizes = [] if shard_sizes is None else shard_sizes
        self._borders = np.cumsum([0, *sizes], dtype=np.int64)  # of shard s: s and s + 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> int:
        return int(self.numbers[place])

    def shard_of(self, place: int) -> int:
        """The number of the shard that a place lies in."""
        return int(self._borders.searchsorted(place, side="right")) - 1

    def places_of(self, shard: int) -> range:
        return range(int(self._borders[shard]), int(self._borders[shard + 1]))

    def from_place(self, place: int) -> Iterator[int]:
        """The image at a place, then those that may take its place, in turn, all that are not gone:
        the next ones of its shard, the shard's first ones, the next shards, the first ones. Without
        shards the next ones and then the first ones."""
        count = len(self)
        place %= count
        yield from self._there([place])
        near = range(count) if self.shard_sizes is None else self.places_of(self.shard_of(place))
        first, end = near.start, near.stop
        turns = range(place + 1, end), range(first, place), range(end, count), range(first)
        yield from self._there(itertools.chain(*turns))

    def shards_in(self, now: "ImageList", shards: Sequence[int]) -> list[int]:
        """The shards of the list `now`, which has all of the source, that have what is left of
        these of this list."""
        if self is now:
            return list(shards)
        numbers = [np.asarray(self.numbers)[self.places_of(shard)] for shard in shards]
        left = np.concatenate([np.arange(0), *numbers])
        return [*dict.fromkeys(now.shard_of(number) for number in left[left >= 0].tolist())]

    def _there(self, places: Iterable[int]) -> Iterator[int]:
        numbers = (self[place] for place in places)
        return (number for number in numbers if number >= 0)
