"""Every image once, in order."""

import threading
import time

import numpy as np
import pytest
import torch

from beit_fast.data import in_order
from beit_fast.data.in_order import batches_in_order, each_in_order, unusable_images
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.limits import ReadConfig
from faults import LET_GO, Injector, fired
from loaded import Faulty, readers


class Numbers:
    """Image n is the byte n; 7 cannot be read."""

    def __init__(self):
        self.reads = []

    def read(self, index):
        self.reads.append(index)
        if index == 7:
            raise BadImageError("is broken")
        return bytes([index])

    def name(self, index):
        return f"number {index}"


def view(data):
    return np.full((1, 2, 3), data[0], np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 6, 100])
def test_every_listed_image_comes_once_and_in_order(batch_size):
    source, indices = Numbers(), [5, 0, 4, 6, 2, 1]
    parts = list(batches_in_order(source, indices, view, batch_size=batch_size, num_threads=3))
    got = torch.full((len(indices),), -1)
    for where, images in parts:
        assert images.shape[1:] == (1, 2, 3)
        got[where] = images[:, 0, 0, 0].long()
    assert got.tolist() == indices
    assert sorted(source.reads) == sorted(indices)
    assert len(parts) == -(-len(indices) // batch_size)


def test_no_images_make_no_batches():
    assert list(batches_in_order(Numbers(), range(0), view, batch_size=4, num_threads=1)) == []


def test_an_image_that_cannot_be_used_is_named_and_no_thread_stays():
    before = threading.active_count()
    batches = batches_in_order(Numbers(), range(9), view, batch_size=4, num_threads=2)
    assert len(next(batches)[1]) == 4
    with pytest.raises(ValueError, match=r"cannot use number 7 \(is broken\): repair or remove it"):
        next(batches)
    assert threading.active_count() == before


@pytest.mark.promise("R14", "R17")
def test_an_image_that_hangs_is_named_and_keeps_nobody(tmp_path):
    LET_GO.clear()
    before = threading.active_count()
    source = Faulty(Numbers(), Injector(tmp_path, ["0:5:hang_read"], again=2))
    options = {"num_threads": 2, "reads": ReadConfig(read_timeout=0.2)}
    with pytest.raises(ValueError, match=r"cannot use number 5 \(no answer within 0\.2 s\)"):
        list(batches_in_order(source, range(7), view, batch_size=7, **options))
    found = unusable_images(source, range(9), look=view, **options)
    assert found == {"number 5": "no answer within 0.2 s", "number 7": "is broken"}
    LET_GO.set()
    for thread in readers():
        thread.join(5)
    assert threading.active_count() == before
    assert fired(tmp_path) == {"0:5:hang_read": 2}


@pytest.mark.promise("R17")
def test_closing_waits_for_no_image_that_hangs(tmp_path):
    LET_GO.clear()
    source = Faulty(Numbers(), Injector(tmp_path, ["0:5:hang_read"]))
    batches = batches_in_order(source, range(7), view, batch_size=4, num_threads=2)
    next(batches)
    while not fired(tmp_path):
        time.sleep(0.01)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 5
    LET_GO.set()
    for thread in readers():
        thread.join(5)


@pytest.mark.promise("R14")
def test_images_that_cannot_be_used_are_all_found(make_image, make_file, monkeypatch):
    class Files:
        """Every third is broken in one of two ways."""

        good = make_file(make_image(8, 8), "PNG")

        def __len__(self):
            return 9

        def read(self, index):
            if index == 3:
                raise OSError("disk error")
            return self.good if index % 3 else self.good[:50]

        def name(self, index):
            return f"number {index}"

    monkeypatch.setattr(in_order, "_AT_ONCE", 4)
    found = unusable_images(Files(), num_threads=2)
    assert list(found) == ["number 0", "number 3", "number 6"]
    assert found["number 3"] == "disk error"


@pytest.mark.parametrize("num_threads", [1, 5])
def test_each_image_comes_once_and_in_order_with_what_was_made_of_it_or_the_error(num_threads):
    indices = [5, 7, 0, 4, 6, 2, 1, 9, 8, 3]
    looks = each_in_order(
        Numbers(), indices, lambda index, data: (index, data[0]), num_threads=num_threads
    )
    for wanted, (index, looked) in zip(indices, looks, strict=True):
        assert index == wanted
        if index == 7:
            assert isinstance(looked, BadImageError)
        else:
            assert looked == (index, index)


def test_no_more_images_are_read_ahead_than_was_said():
    source, most = Numbers(), 0
    looks = each_in_order(source, [1] * 200, lambda *_: None, num_threads=4, at_once=20)
    for number, _ in enumerate(looks, 1):
        time.sleep(0.001)
        most = max(most, len(source.reads) - number)
    assert most <= 20 + in_order._PART
    assert len(source.reads) == 200


def test_a_source_is_told_of_every_image_before_it_is_read():
    class Far(Numbers):
        told = ()

        def ahead(self, indices):
            self.told = (*self.told, *indices)

        def read(self, index):
            assert index in self.told
            return super().read(index)

    source, indices = Far(), [3, 1, 2, 7, 0, 6]
    list(each_in_order(source, indices, lambda *_: None, num_threads=2))
    assert [*source.told] == indices


def test_an_error_of_another_kind_comes_when_its_image_is_due():
    def look(index, data):
        return 1 // (index - 3)

    looks = each_in_order(Numbers(), [0, 1, 2, 4, 5, 6, 3, 8], look, num_threads=2)
    assert [index for index, _ in (next(looks) for _ in range(4))] == [0, 1, 2, 4]
    with pytest.raises(ZeroDivisionError):
        list(looks)


def test_of_a_part_with_an_image_that_hangs_the_others_are_looked_at():
    class Hangs(Numbers):
        def read(self, index):
            if index == 2:
                time.sleep(0.5)
            return super().read(index)

    looks = each_in_order(
        Hangs(),
        range(6),
        lambda _, data: data[0],
        num_threads=1,
        reads=ReadConfig(read_timeout=0.2),
    )
    found = dict(looks)
    assert isinstance(found.pop(2), TimeoutError)
    assert found == {index: index for index in (0, 1, 3, 4, 5)}
