"""What the tests of the loader load: numbers, whose samples are their seeds, and small views."""

import itertools
import threading

import numpy as np
import torch

from beit_fast.data.config import MaskingConfig
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.views.config import ViewConfig
from faults import Injector

SAMPLE = PretrainSample(
    ViewConfig(size=32, token_size=16), MaskingConfig(num_masked=6, min_block=2), (4, 4)
)


class Numbers:
    """A source that says which image was asked for, without decoding anything."""

    def __init__(self, length: int, bad: tuple[int, ...] = ()):
        self.length, self.bad, self.reads = length, bad, []

    def __len__(self):
        return self.length

    def read(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise OSError(f"disk error at {index}")
        return str(index).encode()

    def name(self, index):
        return f"image-{index}"

    key = name

    def size(self, index):
        return 10 + index % 7


class Faulty:
    """Another source whose reads meet faults."""

    def __init__(self, source, injector: Injector):
        self._source, self._injector = source, injector

    def __len__(self):
        return len(self._source)

    def read(self, index):
        return self._injector.meet("read", index, self._source.read(index))

    def name(self, index):
        return self._source.name(index)


def readers() -> list[threading.Thread]:
    """Threads that read, or wait for something to read."""
    return [thread for thread in threading.enumerate() if thread.name == "beit_fast read"]


class Seeds:
    """A sample that is its seed."""

    def __call__(self, data, seed: SampleSeed):
        return {"read": np.array(int(data)), "seed": np.array(seed)}

    def collate(self, samples):
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


class Sharded(Numbers):
    """Numbers in shards, that says which of these were asked for and in what windows."""

    def __init__(self, sizes, bad: tuple[int, ...] = ()):
        super().__init__(sum(sizes), bad)
        self.shard_sizes, self.window, self.ahead_of = sizes, None, []

    def shard_of(self, index):
        return next(
            s for s, end in enumerate(itertools.accumulate(self.shard_sizes)) if index < end
        )

    def windowed(self, window):
        self.window = window

    def shards_ahead(self, shards):
        self.ahead_of.append(list(shards))
