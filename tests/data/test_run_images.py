"""A run that goes on over other images: which it reads, under which numbers, and what it says."""

import json

import numpy as np
import pytest
import torch

from beit_fast.data.listing import ListingError
from beit_fast.data.loader import Loader
from beit_fast.data.passes import Part, Passes
from beit_fast.data.run_images import RunImages
from loaded import Seeds, assert_equal
from task_runs import take_batches

pytestmark = pytest.mark.promise("R1")
OLD = [f"{number:03}" for number in range(0, 300, 3)]
GONE = ["030", "033", "297"]
NEW = sorted({*OLD, *(f"{number:03}" for number in range(1, 120, 3))} - {*GONE})
BATCH, CHANGED = 16, 12  # images, batches: 192 samples, in the second pass over 100


class Named:
    """Images of which only the names are."""

    def __init__(self, names, bad=()):
        self.names, self.bad = names, bad

    def __len__(self):
        return len(self.names)

    def read(self, index):
        if self.names[index] in self.bad:
            raise OSError("a disk error")
        return self.names[index].encode()

    def name(self, index):
        return f"disk/{self.names[index]}"

    def key(self, index):
        return self.names[index]

    def size(self, index):
        return len(self.names[index])


def loader_of(names, bad=(), **options):
    options = {"batch_size": BATCH, "seed": 5, "num_threads": 0} | options
    return Loader(Named(names, bad), Seeds(), **options)


def went_on(names, parts, sample, folder, **options):
    """A loader whose run has been over `parts` until that sample, and its parts from there on."""
    loader = loader_of(names, **options)
    parts = loader.images.go_on(json.loads(json.dumps(parts)), sample, folder)
    return loader, parts


@pytest.fixture
def begun(tmp_path):
    """The parts of a run over the old images, whose list is kept in tmp_path."""
    images = RunImages(Named(OLD))
    images.keep(tmp_path)
    return images.begin()


def expected_of(parts, first, last):
    """(pass, place, name read) of samples, one after another, as the rule says it."""
    lists = [OLD if part["count"] == 100 else NEW for part in parts]
    passes = Passes(5, [Part(**part) for part in parts], lists)
    found = []
    for sample in range(first, last):
        epoch, place, names = passes[sample]
        turned = names[place:] + names[:place]
        found.append((epoch, place, next(name for name in turned if name in NEW)))
    return found


def test_the_pass_that_a_run_is_in_goes_on_over_the_old_images(begun, tmp_path):
    loader, parts = went_on(NEW, begun, CHANGED * BATCH, tmp_path)
    assert [part["first"] for part in parts] == [0, 200]
    assert [part["epoch"] for part in parts] == [0, 2]
    assert loader.images.note == (
        "pass 1 goes on over the 100 images of before, 3 of which are gone and replaced by the "
        f"next; pass 2 and all later ones are over the {len(NEW)} of now"
    )
    last = 200 + 2 * len(NEW)
    batches = take_batches(loader, -(-last // BATCH) - CHANGED, CHANGED)
    seeds = torch.cat([batch["seed"] for batch in batches]).tolist()
    numbers = torch.cat([batch["sample_index"] for batch in batches]).tolist()
    read = [(epoch, place, NEW[n]) for (_, epoch, place), n in zip(seeds, numbers, strict=True)]
    assert read == expected_of(parts, CHANGED * BATCH, CHANGED * BATCH + len(read))
    first_new = [name for epoch, _, name in read if epoch == 2]
    assert sorted(first_new) == NEW
    assert loader.bad_samples == {}  # what is gone counts as no bad file


@pytest.mark.promise("R2")
def test_later_resumes_read_what_the_run_without_them_does_on_any_number_of_ranks(begun, tmp_path):
    whole, parts = went_on(NEW, begun, CHANGED * BATCH, tmp_path)
    whole.images.keep(tmp_path)
    expected = take_batches(whole, 8, CHANGED)
    for stopped in (CHANGED, CHANGED + 1, CHANGED + 6):  # the last in the new list
        again, same = went_on(NEW, parts, stopped * BATCH, tmp_path, num_threads=2)
        assert same == parts
        assert_equal(take_batches(again, 20 - stopped, stopped), expected[stopped - CHANGED :])
    ranks = [
        went_on(
            NEW, parts, CHANGED * BATCH, tmp_path, batch_size=BATCH // 2, rank=rank, world_size=2
        )[0]
        for rank in (0, 1)
    ]
    halves = [take_batches(rank, 8, CHANGED) for rank in ranks]
    for whole_batch, *parts_of_it in zip(expected, *halves, strict=True):
        for name, value in whole_batch.items():
            assert torch.equal(torch.cat([part[name] for part in parts_of_it]), value)


def test_another_change_before_the_first_took_place_takes_its_place(begun, tmp_path):
    first, parts = went_on(NEW, begun, CHANGED * BATCH, tmp_path)
    first.images.keep(tmp_path)
    third = NEW[:-20]
    loader, later = went_on(third, parts, 199, tmp_path)
    assert [(part["first"], part["count"]) for part in later] == [(0, 100), (200, len(third))]
    loader, back = went_on(OLD, later, 199, tmp_path)
    assert back == begun
    assert_equal(take_batches(loader, 8, 12), take_batches(loader_of(OLD), 8, 12))


def test_at_the_end_of_a_pass_the_new_images_are_next(begun, tmp_path):
    loader, parts = went_on(NEW, begun, 200, tmp_path)
    assert [(part["first"], part["epoch"]) for part in parts] == [(0, 0), (200, 2)]
    assert loader.images.note == ""


def test_evaluation_is_on_the_images_of_now(begun, tmp_path):
    loader, _ = went_on(NEW, begun, 192, tmp_path)
    (batch,) = take_batches(loader, 1, 2**32)
    assert batch["seed"][0, 1] == 2 + (2**32 * BATCH - 200) // len(NEW)


def test_a_bad_file_of_now_is_replaced_in_both_lists_and_counted_once(begun, tmp_path):
    loader, _ = went_on(NEW, begun, 100, tmp_path, bad=("036",))
    batches = take_batches(loader, 16, 7)
    assert list(loader.bad_samples) == ["disk/036"]
    read = torch.cat([batch["sample_index"] for batch in batches])
    assert NEW.index("036") not in read.tolist()


@pytest.mark.parametrize("why", ["lost", "damaged", "few are left", "an earlier version"])
def test_where_a_pass_cannot_go_on_a_new_one_begins_at_once(begun, tmp_path, why):
    names, said = NEW, "which 100 images the run had is not known"
    (kept,) = tmp_path.iterdir()
    if why == "lost":
        kept.unlink()
    elif why == "damaged":
        kept.write_bytes(kept.read_bytes()[:-20])
    elif why == "few are left":
        names, said = [*OLD[:49], "other"], "49 of the 100 images that the run had are left"
    else:
        begun[0]["images"] = ""
    loader, parts = went_on(names, begun, 130, tmp_path)
    assert [(part["first"], part["epoch"]) for part in parts] == [(0, 0), (130, 2)]
    assert said in loader.images.note
    assert f"pass 2, over the {len(names)} images of now, begins at once" in loader.images.note
    again, same = went_on(names, parts, 144, tmp_path)
    assert same == parts
    passes = again.images.passes(5)
    read = [passes[sample] for sample in range(130, 130 + len(names))]
    assert {epoch for epoch, _, _ in read} == {2}
    assert sorted(images[place] for _, place, images in read) == [*range(len(names))]


def test_as_many_images_of_an_earlier_version_are_the_same(tmp_path):
    before = [{"first": 0, "epoch": 0, "count": 100, "images": ""}]
    loader, parts = went_on(OLD, before, 130, tmp_path)
    assert parts == loader.images.begin()
    assert loader.images.note == ""


def test_what_no_run_wrote_is_refused(begun, tmp_path):
    part = begun[0]
    for parts in (
        [],
        [part, part],
        [part | {"count": 0}],
        [part | {"first": "0"}],
        [part | {"epoch": -1}],
        [part | {"images": None}],
        [part | {"more": 1}],
        ["part"],
    ):
        with pytest.raises(ListingError, match="images by pass are damaged"):
            went_on(OLD, parts, 130, tmp_path)


def test_what_is_gone_has_no_number(begun, tmp_path):
    loader, _ = went_on(NEW, begun, 110, tmp_path)
    passes = loader.images.passes(5)
    lists = {id(passes[sample][2]): passes[sample][2] for sample in range(110, 200)}
    (images,) = lists.values()
    numbers = images.numbers
    assert np.flatnonzero(numbers < 0).tolist() == [OLD.index(name) for name in GONE]


SHARDS = [30, 25, 45]  # of OLD
SHARDS_NOW = [20, 29, 50, 38]  # of NEW


class NamedShards(Named):
    """The same in shards, that says which were asked for."""

    def __init__(self, names, sizes, bad=()):
        super().__init__(names, bad)
        self.shard_sizes, self.ahead_of = sizes, []

    def shards_ahead(self, shards):
        self.ahead_of.append(list(shards))


def windowed(names, sizes, **options):
    options = {"batch_size": BATCH, "seed": 5, "num_threads": 0, "window": 2} | options
    return Loader(NamedShards(names, sizes), Seeds(), **options)


@pytest.mark.promise("R2")
def test_a_pass_over_windows_goes_on_in_the_shards_of_before(tmp_path):
    before = windowed(OLD, SHARDS)
    before.images.keep(tmp_path)
    parts = before.images.begin()
    expected = take_batches(before, 13)[7:]
    now = windowed(NEW, SHARDS_NOW)
    parts = now.images.go_on(json.loads(json.dumps(parts)), 7 * BATCH, tmp_path)
    assert [part["first"] for part in parts] == [0, 200]
    batches = take_batches(now, 13 + 9, 7)
    seeds = torch.cat([batch["seed"] for batch in batches])
    read = [NEW[n] for n in torch.cat([batch["sample_index"] for batch in batches]).tolist()]
    # The crops and places of before; where an image is gone the next of its shard, of then.
    assert torch.equal(seeds[:88], torch.cat([batch["seed"] for batch in expected])[:88])
    shards = [OLD[:30], OLD[30:55], OLD[55:]]
    for (_, _, place), name in zip(seeds[:88].tolist(), read[:88], strict=True):
        if OLD[place] in NEW:
            assert name == OLD[place]
        else:
            (shard,) = (shard for shard in shards if OLD[place] in shard)
            turned = shard[shard.index(OLD[place]) :] + shard
            assert name == next(other for other in turned if other in NEW)
    assert sorted(read[88 : 88 + len(NEW)]) == NEW
    # Of the pass over the old images what is announced are the shards that these lie in now.
    assert set(now.source.ahead_of[0]) == {0, 1, 2, 3}
    assert all(len(shards) <= 4 for shards in now.source.ahead_of)
    again = windowed(NEW, SHARDS_NOW)
    now.images.keep(tmp_path)
    assert again.images.go_on(parts, 11 * BATCH, tmp_path) == parts
    assert_equal(take_batches(again, 18, 11), batches[4:])


def test_a_list_without_shards_cannot_go_on_in_windows(begun, tmp_path):
    loader = windowed(NEW, SHARDS_NOW)
    parts = loader.images.go_on(begun, 130, tmp_path)
    assert [(part["first"], part["epoch"]) for part in parts] == [(0, 0), (130, 2)]
    assert "in which shards the 100 images of the run were is not known" in loader.images.note
    take_batches(loader, 20, 8)
    whole = windowed(NEW, SHARDS_NOW, window=None)  # to a full shuffle they are no matter
    assert whole.images.go_on(begun, 130, tmp_path)[1]["first"] == 200


def test_other_shards_of_the_same_images_are_told(tmp_path):
    before = windowed(OLD, SHARDS)
    before.images.keep(tmp_path)
    now = windowed(OLD, [50, 50])
    assert now.images.digest != before.images.digest != RunImages(Named(OLD)).digest
    found = now.images.difference(tmp_path, before.images.digest, 100)
    assert str(found) == "they are in other shards"
    same = windowed(OLD, SHARDS).images.difference(tmp_path, before.images.digest, 100)
    assert not same
