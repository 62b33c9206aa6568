"""The order of a pass that reads a window of shards at a time.

    shards of a pass   in an order of (seed, pass), cut into windows: as few as hold at most
                       `window` shards each, and as even
    window k           the images of its shards, in an order of (seed, pass, k)

So the place of a sample is a function of (seed, pass, position) and of how many images each shard
has, whoever asks for it and after whatever: there is nothing to keep but the position. An order is
that of the hashes of the numbers it permutes; no library's generator has a part in it, for these
may give other numbers in their next version.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from beit_fast.data.seeds import counter_seed

# The threads that read ahead are in one window, or at the border of two; of short ones in more.
_KEPT = 8


class _Pass(NamedTuple):
    shards: list[np.ndarray]  # of each window, by number
    ends: np.ndarray  # int64: the position after the last of each window


class WindowOrder:
    """`order.place(epoch, position)`: which image of the list a sample is, by its place there.

    sizes: images of each shard, int (S,); the list has them shard after shard. begun: told the
    shards of a window and those of the next one when the first sample of it is asked for, perhaps
    again later, in the thread that asks. May be used by several threads.
    """

    def __init__(
        self,
        seed: int,
        sizes: Sequence[int],
        window: int,
        begun: Callable[[Sequence[int]], None] = lambda shards: None,
    ) -> None:
        self._seed, self._window, self._begun = seed, window, begun
        self._sizes = np.asarray(sizes, np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._with_images = np.flatnonzero(self._sizes)
        self._pass = functools.lru_cache(_KEPT)(self._draw_pass)
        self._places = functools.lru_cache(_KEPT)(self._draw_places)

    def place(self, epoch: int, position: int) -> int:
        ends = self._pass(epoch).ends
        window = int(ends.searchsorted(position, side="right"))
        places = self._places(epoch, window)
        return int(places[position - int(ends[window]) + len(places)])

    def shards(self, epoch: int, window: int) -> list[int]:
        """The shards of a window of a pass; none of one after the last."""
        windows = self._pass(epoch).shards
        return windows[window].tolist() if window < len(windows) else []

    def _draw_pass(self, epoch: int) -> _Pass:
        count = len(self._with_images)
        shards = self._with_images[_permutation(count, "shards", self._seed, epoch)]
        num_windows = -(-count // self._window)
        cuts = [number * count // num_windows for number in range(1, num_windows)]
        ends = self._sizes[shards].cumsum()[[*(cut - 1 for cut in cuts), count - 1]]
        return _Pass(np.split(shards, cuts), ends)

    def _draw_places(self, epoch: int, window: int) -> np.ndarray:
        self._begun([*self.shards(epoch, window), *self.shards(epoch, window + 1)])
        shards = self._pass(epoch).shards[window]
        sizes = self._sizes[shards]
        # Of the image at i of the window, one shard after another, the place in the list.
        shift = self._firsts[shards] - (sizes.cumsum() - sizes)
        places = np.arange(sizes.sum()) + np.repeat(shift, sizes)
        kind = np.min_scalar_type(self._sizes.sum())  # of millions, several windows are kept
        return places.astype(kind)[_permutation(len(places), "window", self._seed, epoch, window)]


def _permutation(count: int, purpose: str, *counters: int) -> np.ndarray:
    """0 .. count - 1 in the order of their hashes, int64 (count,)."""
    keys = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys += np.uint64(counter_seed(purpose, *counters))
    # SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014): a bijection, so no two are equal.
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(keys ^ (keys >> np.uint64(31)))
