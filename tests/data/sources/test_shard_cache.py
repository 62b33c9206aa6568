"""Shards behind a URL, read in part or by windows through copies on disk."""

import logging
import os
import time
from pathlib import Path

import pytest
import torch

from beit_fast.data.loader import Loader
from beit_fast.data.sources import remote, shard_cache
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.sources.opening import labelled_images, open_images
from beit_fast.data.sources.places import matching
from beit_fast.data.sources.storage import FilePart, open_storage
from beit_fast.data.sources.tar_shards import TarShards
from loaded import SAMPLE
from object_server import serving
from shards import write_shards

pytestmark = pytest.mark.promise("R17")
SHARDS = {f"set/{number}.tar": bytes([number]) * (1000 + number) for number in range(8)}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.setattr(shard_cache, "_POLL", 0.02)
    monkeypatch.setattr(shard_cache, "_BLOCK", 300)  # bytes of a request
    with serving(dict(SHARDS)) as server:
        for name, value in server.s3().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def opened(server, tmp_path):
    """`opened(cache_size=...)`: the storage of the shards, with its cache below the test's folder;
    closed at the end."""
    storages = []

    def open_one(**limits):
        limits = {"cache": str(tmp_path / "cache"), **limits}
        storages.append(open_storage("s3://bucket/set", ReadConfig(**limits)))
        return storages[-1]

    yield open_one
    for storage in storages:
        storage.close()


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


def is_copied(storage, *names):
    return all(storage._has(FilePart(name, 0, len(SHARDS[f"set/{name}"]))) for name in names)


def check(storage, *names):
    for name in names:
        data = SHARDS[f"set/{name}"]
        for first, count in ((0, 10), (290, 20), (len(data) - 5, 5)):
            assert storage.read(FilePart(name, first, count)) == data[first : first + count]


def test_nothing_is_copied_where_files_are_read_in_any_order(opened, server, tmp_path):
    storage = opened()
    storage.files_ahead(["0.tar"])
    check(storage, "0.tar", "7.tar")
    assert server.count("set/0.tar") == 3
    assert not (tmp_path / "cache").exists()
    assert storage.names() == [f"{number}.tar" for number in range(8)]
    assert storage.state("3.tar").size == 1003


def test_a_window_is_copied_once_and_read_from_the_copy(opened, server):
    storage = opened()
    storage.windowed(2)
    storage.files_ahead(["0.tar", "1.tar"])
    check(storage, "0.tar", "1.tar", "2.tar")  # there or not
    until(lambda: is_copied(storage, "0.tar", "1.tar"))
    asked = len(server.requests)
    check(storage, "0.tar", "1.tar")
    storage.ahead([FilePart("0.tar", 3, 30), FilePart("1.tar", 0, 900)])
    check(storage, "0.tar", "1.tar")
    assert len(server.requests) == asked
    whole = [r for r in server.requests if r.key == "set/0.tar" and r.count == 300]
    assert sorted(request.first for request in whole) == [0, 300, 600]
    again = opened()  # as the next run does
    again.windowed(2)
    again.files_ahead(["1.tar", "0.tar"])
    until(lambda: is_copied(again, "0.tar", "1.tar"))
    check(again, "0.tar", "1.tar")
    assert {request.method for request in server.requests[asked:]} == {"HEAD"}


def test_this_window_and_the_next_are_held_and_no_more(opened, tmp_path):
    storage = opened()
    storage.windowed(2)
    for names in (["0.tar", "1.tar"], ["2.tar", "3.tar"], ["4.tar", "5.tar"]):
        storage.files_ahead(names)
        until(lambda: is_copied(storage, *names))  # noqa: B023
    held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    held = [path for path in held if path.startswith(str(tmp_path / "cache"))]
    assert len(held) == 4
    assert is_copied(storage, "2.tar", "3.tar", "4.tar", "5.tar")
    storage.close()
    check(storage, "2.tar")


@pytest.mark.parametrize("fault", ["500", "reset", "cut", "short"])
def test_a_copy_is_right_whatever_the_store_does_meanwhile(fault, opened, server):
    storage = opened()
    storage.windowed(1)
    server.meets("set/5.tar", "", fault, "", fault)
    storage.files_ahead(["5.tar"])
    until(lambda: is_copied(storage, "5.tar"))
    check(storage, "5.tar")


def test_a_shard_that_cannot_be_copied_is_told_and_read_from_the_store(opened, server, caplog):
    storage = opened(read_retries=0)
    storage.windowed(1)
    server.meets("set/5.tar", "", "", "404")
    with caplog.at_level(logging.WARNING):
        storage.files_ahead(["5.tar"])
        until(lambda: "could not be copied" in caplog.text)
    assert (
        "s3://bucket/set/5.tar could not be copied (No such file or directory); such shards are "
        "read from the store piece by piece"
    ) in caplog.text
    check(storage, "5.tar")
    storage.files_ahead(["6.tar"])
    until(lambda: is_copied(storage, "6.tar"))


def test_a_shard_that_changes_while_it_is_copied_is_not_kept(opened, server, tmp_path, caplog):
    server.latency = 0.02
    storage = opened()
    storage.windowed(1)
    storage.files_ahead(["5.tar"])
    until(lambda: server.count("set/5.tar"))
    server.objects["set/5.tar"] = bytes([9]) * 1005
    until(lambda: "it changed while it was copied" in caplog.text)
    assert os.listdir(tmp_path / "cache" / "copies") == [".lock"]
    assert storage.read(FilePart("5.tar", 0, 10)) == bytes([9]) * 10


def test_a_cache_smaller_than_a_shard_is_told_and_passed_by(opened, server, caplog):
    storage = opened(cache_size=1000 / 2**30)
    storage.windowed(1)
    storage.files_ahead(["5.tar"])
    until(lambda: caplog.text)
    assert (
        "no room for s3://bucket/set/5.tar in the cache, of which 9.31323e-07 GiB may be used and "
        "others may be using them: raise --data.cache_size; such shards are read from the store"
    ) in caplog.text
    check(storage, "5.tar")
    larger = opened(cache_size=2000 / 2**30)
    larger.windowed(1)
    larger.files_ahead(["5.tar"])
    until(lambda: is_copied(larger, "5.tar"))


def test_an_older_window_makes_room(opened, tmp_path):
    storage = opened(cache_size=3300 / 2**30)
    storage.windowed(1)
    for number in range(6):
        storage.files_ahead([f"{number}.tar"])
        until(lambda: is_copied(storage, f"{number}.tar"))  # noqa: B023
    check(storage, *(f"{number}.tar" for number in range(6)))
    copies = os.scandir(tmp_path / "cache" / "copies")
    assert 2000 < sum(entry.stat().st_size for entry in copies) <= 3300


def test_two_that_share_a_folder_copy_each_shard_once(opened, server):
    server.latency = 0.01
    both = [opened(), opened()]
    names = [f"{number}.tar" for number in range(4)]
    for storage in both:
        storage.windowed(4)
    for storage in both:
        storage.files_ahead(names)
    until(lambda: all(is_copied(storage, *names) for storage in both))
    for name in names:
        starts = [r.first for r in server.requests if r.key == f"set/{name}" and r.method == "GET"]
        assert sorted(starts) == [0, 300, 600, 900]
    for storage in both:
        check(storage, *names)


def test_of_a_user_without_a_home_folder_nothing_is_kept(opened, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    opened(cache="").windowed(1)
    assert "the user's cache folder cannot be written (this user has no home folder)" in caplog.text


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_folder_that_cannot_be_written_is_told_with_its_flag(
    opened, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^--data.cache .*/file/x cannot be written .Not a direct"
    ):
        opened(cache=str(tmp_path / "file" / "x")).windowed(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    storage = opened(cache="")
    storage.windowed(1)  # the user's own, which nobody named
    assert (
        "file/beit_fast cannot be written (Not a directory): pass --data.cache with" in caplog.text
    )
    storage.files_ahead(["1.tar"])
    check(storage, "1.tar")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    storage = opened(cache="")
    storage.windowed(1)
    storage.files_ahead(["1.tar"])
    until(lambda: is_copied(storage, "1.tar"))
    assert len(os.listdir(tmp_path / "user" / "beit_fast" / "copies")) == 2


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_tars_behind_a_url_are_those_on_disk_read_in_either_way(
    local, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_cache, "_BLOCK", 4096)
    names = sorted(path.name for path in local.glob("*.tar"))
    server.objects = {f"set/{name}": (local / name).read_bytes() for name in names}
    reads, theirs = ReadConfig(cache=str(tmp_path)), labelled_images(str(local))
    assert matching(names, "train-{0000..0002}.tar") == names
    for url in ("s3://bucket/set", f"{server.url}/set/train-{{0000..0002}}.tar"):
        ours = labelled_images(url, reads=reads)
        assert isinstance(ours[0], TarShards)
        numbers = range(len(theirs[0]))
        for ask in ("key", "size", "read"):
            assert [getattr(ours[0], ask)(n) for n in numbers] == [
                getattr(theirs[0], ask)(n) for n in numbers
            ]
        assert ours[0].digest() == theirs[0].digest()
        assert ours[1].tolist() == theirs[1].tolist()
        server.always("set/train-0001.tar", "500")
        ours[0].windowed(1)
        server.always("set/train-0001.tar", "")
        ours[0].shards_ahead([1])
        storage, part = ours[0]._storage, FilePart("train-0001.tar", 0, 512)
        until(lambda: storage._has(part))  # noqa: B023
        assert [ours[0].read(n) for n in numbers] == [theirs[0].read(n) for n in numbers]
        storage.close()
    asked = len(server.requests)
    again = open_images("s3://bucket/set", reads=reads)
    assert again.read(0) == theirs[0].read(0)
    indexed = [r for r in server.requests[asked:] if r.method == "GET" and r.key != "?"]
    assert len(indexed) == 1  # the image: indices are kept


def test_a_loader_reads_windows_of_a_store_as_those_of_a_disk(local, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_BLOCK", 4096)
    server.objects = {f"set/{path.name}": path.read_bytes() for path in local.glob("*.tar")}
    server.latency = 0.002

    def batches(source):
        return Loader(source, SAMPLE, batch_size=4, num_threads=2, window=1, seed=3).batches()

    far = batches(open_images("s3://bucket/set", reads=ReadConfig(cache=str(tmp_path))))
    near = batches(open_images(str(local)))
    copies = tmp_path / "copies"
    num_batches = 0
    # Three passes and more; and as many as it takes, for a window may be over before its copy.
    while num_batches < 12 or len([p for p in copies.iterdir() if p.name[0] != "."]) < 3:
        a, b = next(far), next(near)
        assert all(torch.equal(a[name], b[name]) for name in b)
        num_batches += 1
        assert num_batches < 2000
    far.close()
    near.close()
