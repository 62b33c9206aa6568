"""Random numbers as a function of where they are used, not of when.

    rng = random.Random(blake2b(purpose, seed, epoch, index))

Every sample draws its crop, jitter and mask from a generator of its own, seeded by counters alone.
No worker, rank or restart changes it, so a resumed run sees the data of the run that never stopped.
"""

import hashlib
import random
import struct
from typing import NamedTuple


def counter_seed(purpose: str, *counters: int) -> int:
    """A 64-bit seed from what the numbers are for and any number of signed 64-bit counters.

    Distinct inputs give unrelated seeds: unlike `seed + epoch`, seed 0 in epoch 1 shares nothing
    with seed 1 in epoch 0. The value is the same on every machine and in every version of Python.
    """
    digest = hashlib.blake2b(purpose.encode(), digest_size=8)
    # The separator keeps ("a", 0x62...) apart from ("ab", ...): no purpose holds a zero byte.
    digest.update(struct.pack(f"<x{len(counters)}q", *counters))
    return int.from_bytes(digest.digest(), "little")


def below(rng: random.Random, count: int) -> int:
    """rng.randrange(count), to the same bits, in a third of its time: one of 0 ... count - 1.

    What Python does since 3.2: as many bits as `count` has, drawn again while they are too many.
    """
    num_bits = count.bit_length()
    number = rng.getrandbits(num_bits)
    while number >= count:
        number = rng.getrandbits(num_bits)
    return number


class SampleSeed(NamedTuple):
    """Which sample: the run's seed, the pass over the data, the place in the data set."""

    seed: int
    epoch: int
    index: int

    def rng(self, purpose: str) -> random.Random:
        """A fresh generator. Another purpose ("view", "mask") gives independent numbers, so a
        change in what one consumes leaves the others as they were."""
        return random.Random(self.value(purpose))

    def value(self, purpose: str) -> int:
        """What `rng` is seeded with."""
        return counter_seed(purpose, *self)
