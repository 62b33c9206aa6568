"""Which image is which sample of a run, also where the list of its images changed on the way.

The stream of samples is cut into parts, each over one list of images:

    sample p of a part   pass  = epoch + (p - first) // count
                         place = (p - first) %  count, in that pass's order

The order of a pass is Grain's shuffle of `count` places, a function of (seed, pass): over a list
that never changes it is the one order there always was. Or, where a window of shards is read at a
time, it is the one of window.py. A new list begins with a pass of its own, and passes go on
counting, so a sample is a function of (seed, parts, p) alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from beit_fast.data.grain import import_grain
from beit_fast.data.image_list import ImageList
from beit_fast.data.seeds import counter_seed
from beit_fast.data.window import WindowOrder

SampleOf = tuple[int, int, ImageList]  # its pass, its place in the list of images, and that list


class Part(NamedTuple):
    """Samples `first` and the following, until the next part, are over the list `images`, which has
    `count` images; its first pass has the number `epoch`. A manifest holds these."""

    first: int
    epoch: int
    count: int
    images: str  # the digest of its list

    def epochs(self, sample: int, every: float = 1.0) -> float:
        """How many times `every` passes are over before this sample."""
        passed = (sample - self.first) / (every * self.count)
        return self.epoch / every + passed if self.epoch else passed


def part_of(parts: Sequence[Part], sample: int) -> int:
    """The number of the part that a sample is of."""
    return max((i for i, part in enumerate(parts) if part.first <= sample), default=0)


def with_list(
    parts: Sequence[Part], images: str, count: int, sample: int, *, at_once: bool = False
) -> list[Part]:
    """The parts where `sample` is the next one and the list is another one: it begins with the next
    pass, or `at_once` with the rest of this one left out."""
    now = parts[part_of(parts, sample)]
    epoch = now.epoch + max(0, -(-(sample - now.first) // now.count))  # the next to begin
    first = max(sample, now.first) if at_once else now.first + (epoch - now.epoch) * now.count
    kept = [part for part in parts if part.first < first]
    if kept and kept[-1].images == images and not at_once:
        return kept  # it is back before it was gone
    return [*kept, Part(first, epoch, count, images)]


class FullOrder:
    """`order.place(epoch, position)`: which image of a list of `count` a sample is."""

    def __init__(self, seed: int, count: int) -> None:
        order = counter_seed("order", seed) % 2**32
        self._count = count
        self._places = import_grain().MapDataset.range(count).shuffle(seed=order)

    def place(self, epoch: int, position: int) -> int:
        return self._places[epoch * self._count + position]


class Passes:
    """`passes[p]` is what sample p is of; `lists` are those of the parts. A sample has its seed
    from its pass and its place in the list.

    window: shards that are read at a time, of lists that have shards; None: all images are. begun:
    told a list and the shards of it that are next, see `WindowOrder`.
    """

    def __init__(
        self,
        seed: int,
        parts: Sequence[Part],
        lists: Sequence[ImageList],
        window: int | None = None,
        begun: Callable[[ImageList, Sequence[int]], None] = lambda images, shards: None,
    ):
        self._parts, self._lists = parts, lists
        self._orders: list[FullOrder | WindowOrder] = [
            FullOrder(seed, part.count)
            # Of a part that is over the list may be another one: nobody asks for its images.
            if window is None or len(images) != part.count
            else WindowOrder(seed, images.shard_sizes, window, functools.partial(begun, images))
            for part, images in zip(parts, lists, strict=True)
        ]

    def __getitem__(self, sample: int) -> SampleOf:
        number = part_of(self._parts, sample) if len(self._parts) > 1 else 0
        part = self._parts[number]
        passed, position = divmod(sample - part.first, part.count)
        epoch = part.epoch + passed
        return epoch, self._orders[number].place(epoch, position), self._lists[number]
