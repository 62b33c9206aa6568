"""Passes that read a window of shards at a time: each image once, from few shards at once."""

import itertools
import random

import numpy as np
import pytest
import torch

from beit_fast.data.loader import Loader
from beit_fast.data.sources.opening import open_images
from beit_fast.data.sources.storage import LocalStorage
from beit_fast.data.sources.subset import Subset
from beit_fast.data.window import WindowOrder
from beit_fast.tasks.sources import unseen_batches
from loaded import SAMPLE, Numbers, Seeds, Sharded, assert_equal
from shards import write_shards
from task_runs import take_batches

SIZES = [30, 21, 0, 40, 25, 33, 1, 28]  # 178 images; a shard without any
WINDOW = 3


def loader_of(source, **options):
    options = {"batch_size": 12, "seed": 5, "num_threads": 0, "window": WINDOW} | options
    return Loader(source, Seeds(), **options)


def places_of(order, epoch, count):
    return [order.place(epoch, position) for position in range(count)]


@pytest.mark.parametrize(
    ("sizes", "window"), [(SIZES, 1), (SIZES, 3), (SIZES, 7), (SIZES, 99), ([5], 1), ([1] * 9, 4)]
)
def test_a_pass_has_every_image_once_from_windows_of_few_shards(sizes, window):
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    order = WindowOrder(3, sizes, window)
    orders = []
    for epoch in (0, 1, 10**6):
        places = places_of(order, epoch, sum(sizes))
        assert sorted(places) == [*range(sum(sizes))]
        each = (order.shards(epoch, number) for number in itertools.count())
        windows = [*itertools.takewhile(bool, each)]
        assert max(map(len, windows)) <= window
        assert max(map(len, windows)) - min(map(len, windows)) <= 1
        first = 0
        for shards in windows:
            last = first + sum(sizes[shard] for shard in shards)
            assert set(shard_of[places[first:last]]) == {*shards}
            first = last
        assert first == sum(sizes)
        orders.append(places)
    assert sum(sizes) < 6 or len({*map(tuple, orders)}) == 3


@pytest.mark.promise("R1", "R2")
def test_a_place_depends_on_seed_pass_and_position_alone():
    asked = [(epoch, position) for epoch in range(20) for position in range(0, 178, 11)]
    order = WindowOrder(3, SIZES, WINDOW)
    expected = {where: order.place(*where) for where in asked}
    again = WindowOrder(3, SIZES, WINDOW)
    random.Random(0).shuffle(asked)
    assert all(again.place(*where) == expected[where] for where in asked)
    other = WindowOrder(4, SIZES, WINDOW)
    assert sum(other.place(*where) == expected[where] for where in asked) < len(asked) / 10


def test_the_order_is_that_of_earlier_versions():
    # A run that was begun goes on with it, whatever library it then has.
    order = WindowOrder(3, [4, 2, 5], 2)
    assert [places_of(order, epoch, 11) for epoch in (0, 1)] == [
        [4, 5, 0, 2, 8, 7, 9, 1, 6, 10, 3],
        [1, 2, 0, 3, 10, 9, 5, 4, 6, 8, 7],
    ]


def test_shards_are_shuffled_and_images_in_their_window():
    order = WindowOrder(0, [100] * 64, 16)
    passes = np.array([places_of(order, epoch, 6400) for epoch in range(6)])
    # Rank correlations of shuffles have deviation 1 / sqrt(n - 1): here 0.126 and 0.025.
    shards = np.array([np.concatenate([order.shards(e, w) for w in range(4)]) for e in range(6)])
    between = np.corrcoef([range(64), *shards.argsort(axis=1)])
    assert np.abs(between[np.triu_indices(7, 1)]).max() < 0.5
    for places in passes[:, :1600]:  # the first window of each pass
        ranks = places.argsort().argsort()
        assert abs(np.corrcoef(ranks, range(1600))[0, 1]) < 0.12
        of_one_shard = np.flatnonzero(places // 100 == places[0] // 100)
        assert len(of_one_shard) == 100
        assert np.diff(of_one_shard).max() < 200  # 16 in the mean


@pytest.mark.promise("R1", "R2")
@pytest.mark.parametrize("num_threads", [0, 2])
def test_any_number_of_ranks_goes_on_with_the_batches_of_one(num_threads):
    whole = take_batches(loader_of(Sharded(SIZES)), 40)
    again = loader_of(Sharded(SIZES), num_threads=num_threads)
    assert_equal(take_batches(again, 27, 13), whole[13:])
    for world_size in (2, 3):
        ranks = [
            loader_of(
                Sharded(SIZES),
                batch_size=12 // world_size,
                rank=rank,
                world_size=world_size,
                num_threads=num_threads,
            )
            for rank in range(world_size)
        ]
        parts = [take_batches(rank, 27, 13) for rank in ranks]
        for expected, *batches in zip(whole[13:], *parts, strict=True):
            for name, value in expected.items():
                assert torch.equal(torch.cat([batch[name] for batch in batches]), value)


def test_the_source_is_told_the_window_and_the_shards_that_are_next():
    source = Sharded(SIZES)
    loader = loader_of(source, batch_size=1)
    assert source.window == WINDOW
    take_batches(loader, 178)
    windows = [shards for shards in source.ahead_of if shards]
    assert len(windows) == 3  # 7 shards have images
    assert [len(shards) for shards in windows] == [2 + 2, 2 + 3, 3]
    assert windows[0][2:] == windows[1][:2]
    assert windows[1][2:] == windows[2]
    first = sum(SIZES[shard] for shard in windows[0][:2])
    assert {source.shard_of(index) for index in source.reads[:first]} == {*windows[0][:2]}


def test_a_few_batches_from_elsewhere_announce_nothing():
    source = Sharded(SIZES)
    for _ in unseen_batches(loader_of(source), 3, torch.device("cpu")):
        pass
    assert len(source.reads) == 3 * 12
    assert source.ahead_of == []


def test_no_more_shards_are_open_than_a_window_has(tmp_path, monkeypatch):
    num_open = []

    def take(self, name, real=LocalStorage._take):
        file = real(self, name)
        num_open.append(len(self._open))
        return file

    monkeypatch.setattr(LocalStorage, "_take", take)
    write_shards(tmp_path, 7, 4)
    for window, most in ((2, 2), (None, 7)):
        source = open_images(tmp_path)  # which may open all
        loader = Loader(source, SAMPLE, batch_size=7, window=window)
        del num_open[:]
        read = take_batches(loader, 8)
        assert {*torch.cat([batch["sample_index"] for batch in read]).tolist()} == {*range(28)}
        assert max(num_open) == most


def test_images_in_order_announce_their_shards():
    source = Sharded(SIZES)
    loader = loader_of(source)
    read = [batch["read"] for batch in loader.batches_in_order(0, 25, 60)]
    assert torch.cat(read).tolist() == [*range(25, 60)]
    assert source.ahead_of == [[1, 2, 3], [3, 4, 5]]
    full = Sharded(SIZES)
    list(loader_of(full, window=None).batches_in_order(0, 25, 60))
    assert (full.window, full.ahead_of) == (None, [])


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_bad_image_is_replaced_by_one_of_its_shard(window):
    # The last of shard 0, the first and last of shard 3, and the one image of shard 6.
    source = Sharded(SIZES, bad=(29, 51, 90, 149))
    loader = loader_of(source, window=window, max_bad_share=1.0)
    batches = take_batches(loader, 15)
    read = torch.cat([batch["read"] for batch in batches])
    places = torch.cat([batch["seed"] for batch in batches])[:, 2]
    replaced = {p: r for p, r in zip(places.tolist(), read.tolist(), strict=True) if p != r}
    assert replaced == {29: 0, 51: 52, 90: 52, 149: 150}
    assert len(loader.bad_samples) == 4
    # So tokens that are made in order are those of the images that a run reads.
    in_order = [*loader.batches_in_order(0, 0, 178)]
    read = torch.cat([batch["read"] for batch in in_order]).tolist()
    assert {place: number for place, number in enumerate(read) if place != number} == replaced


def test_a_part_of_the_images_keeps_the_shards():
    source = Sharded(SIZES)
    kept = [number for number in range(178) if number % 5 and not 30 <= number < 51]
    part = Subset(source, kept)
    shards = [source.shard_of(number) for number in kept]
    assert part.shard_sizes.tolist() == [shards.count(shard) for shard in range(len(SIZES))]
    loader = loader_of(part, batch_size=1)
    take_batches(loader, len(kept))
    assert sorted(source.reads) == kept
    assert source.window == WINDOW
    assert not any(1 in shards for shards in source.ahead_of)  # which has none of them
    assert Subset(source, [5, 3]).shard_sizes is None
    assert Subset(Subset(source, kept), range(3)).shard_sizes.tolist() == [3] + [0] * 7


def test_what_has_no_shards_is_refused_and_shuffled_whole():
    source = Numbers(10)
    for without in (source, Subset(source, [0, 1])):
        with pytest.raises(
            ValueError, match=r"--data\.shuffle is window and image-0 lies in no shard"
        ):
            loader_of(without)
    read = take_batches(loader_of(source, batch_size=10, window=None), 1)[0]["read"]
    assert sorted(read.tolist()) == [*range(10)]
    with pytest.raises(ValueError, match="window=0"):
        loader_of(Sharded(SIZES), window=0)
