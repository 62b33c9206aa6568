"""Which image is which sample of a run, also where the list of its images changed on the way.

The stream of samples is cut into parts, each over one list of images:

    sample p of a part   pass  = epoch + (p - first) // count
                         place = (p - first) %  count, in that pass's order

The order of a pass is Grain's shuffle of `count` places, a function of (seed, pass): over a list
that never changes it is the one order there always was. A new list begins with a pass of its own,
and passes go on counting, so a sample is a function of (seed, parts, p) alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beit_fast.data.grain import import_grain
from beit_fast.data.seeds import counter_seed

# Its pass, its place in the list of images, and that list: numbers of the source's images by place,
# a range, or an array with -1 for what is gone.
SampleOf = tuple[int, int, range | np.ndarray]


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


class Passes:
    """`passes[p]` is what sample p is of; `lists` are those of the parts. A sample has its seed
    from its pass and its place in the list."""

    def __init__(self, seed: int, parts: Sequence[Part], lists: Sequence[range | np.ndarray]):
        order = counter_seed("order", seed) % 2**32
        dataset = import_grain().MapDataset
        self._parts, self._lists = parts, lists
        self._orders = [dataset.range(part.count).shuffle(seed=order) for part in parts]

    def __getitem__(self, sample: int) -> SampleOf:
        number = part_of(self._parts, sample) if len(self._parts) > 1 else 0
        part = self._parts[number]
        passed, position = divmod(sample - part.first, part.count)
        epoch = part.epoch + passed
        place = self._orders[number][epoch * part.count + position]
        return epoch, place, self._lists[number]
