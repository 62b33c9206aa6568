"""Indices of many shards: kept, shared by processes, of a disk and of what is far away."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from beit_fast.data.sources import tar_indices
from beit_fast.data.sources.limits import READS
from beit_fast.data.sources.storage import FileState, LocalStorage
from beit_fast.data.sources.tar_indices import shard_indices
from shards import write_shards, write_tar

SHARDS = [f"train-{number:04d}.tar" for number in range(4)]


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "shards", 4, 3)


@pytest.fixture
def made(monkeypatch):
    """Shards that were indexed, and not read from what is kept."""
    names, own = [], tar_indices.index_shard

    def index(shard, *rest):
        names.append(shard)
        return own(shard, *rest)

    monkeypatch.setattr(tar_indices, "index_shard", index)
    return names


def indices(folder, reads=READS, shards=SHARDS, progress=None):
    return shard_indices(LocalStorage(folder), shards, reads, progress)


def kept(folder):
    return sorted(path for path in (folder / ".beit_fast").iterdir() if path.suffix == ".index")


def same(ours, theirs):
    return [(i.shard, i.names, i.first.tolist(), i.label.tolist()) for i in ours] == [
        (i.shard, i.names, i.first.tolist(), i.label.tolist()) for i in theirs
    ]


def test_an_index_is_made_once_and_beside_the_shards(folder, made):
    first = indices(folder)
    assert [index.shard for index in first] == SHARDS
    assert sorted(made) == SHARDS
    assert len(kept(folder)) == 4
    made.clear()
    assert same(indices(folder), first)
    assert made == []


def test_the_indices_of_shards_that_changed_are_made_anew_and_no_others(folder, made):
    indices(folder)
    made.clear()
    other = write_shards(folder.parent / "other", 4, 2)
    os.replace(other / SHARDS[1], folder / SHARDS[1])
    os.utime(folder / SHARDS[2], ns=(1, 1))
    assert [len(index) for index in indices(folder)] == [3, 2, 3, 3]
    assert sorted(made) == SHARDS[1:3]


@pytest.mark.promise("R16")
def test_indices_that_are_cut_or_damaged_or_planted_are_made_anew(folder, made):
    first = indices(folder)
    paths = kept(folder)
    paths[0].write_bytes(paths[0].read_bytes()[:-40])
    paths[1].write_bytes(b"")
    paths[2].unlink()
    paths[2].symlink_to("/dev/zero")
    paths[3].unlink()
    os.mkfifo(paths[3])
    made.clear()
    assert same(indices(folder), first)
    assert sorted(made) == SHARDS
    made.clear()
    assert same(indices(folder), first)
    assert made == []


def test_with_a_cache_folder_nothing_is_written_beside_the_shards(folder, made, tmp_path):
    reads = replace(READS, cache=str(tmp_path / "cache"))
    indices(folder, reads)
    made.clear()
    indices(folder, reads)
    assert made == []
    assert not (folder / ".beit_fast").exists()
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 4


def test_a_folder_that_cannot_be_written_to_has_its_indices_in_the_users_own(
    folder, made, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (folder / ".beit_fast").write_text("in the way, as permissions are for all but root")
    first = indices(folder)
    assert len(list((tmp_path / "own" / "beit_fast" / "indices").rglob("*.index"))) == 4
    made.clear()
    assert same(indices(folder), first)
    assert made == []
    assert caplog.text == ""


def test_indices_that_can_be_kept_nowhere_are_made_every_time_and_that_is_said(
    folder, made, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    for path in (folder / ".beit_fast", tmp_path / "own"):
        path.write_text("in the way")
    indices(folder)
    indices(folder)
    assert len(made) == 8
    told = "the indices of the shards cannot be kept"
    assert [told in record.message for record in caplog.records] == [True, True]
    assert "--data.cache" in caplog.text
    reads = replace(READS, cache=str(tmp_path / "cache"))  # the remedy
    indices(folder, reads)
    made.clear()
    indices(folder, reads)
    assert made == []


def test_a_cache_folder_that_was_named_and_cannot_be_written_is_an_error(folder, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    reads = replace(READS, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"--data.cache .*cache cannot be written .*: give a"):
        indices(folder, reads)
    assert not (folder / ".beit_fast").exists()


def test_a_disk_that_is_full_costs_the_indices_and_is_said_once(folder, made, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.index")

    monkeypatch.setattr("beit_fast.data.sources.tar_keeping.replace_file", full)
    assert [len(index) for index in indices(folder)] == [3] * 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text


# A child for each process; it prints how many indices it made.
PROCESSES = """
import json, os, signal, sys, time
from beit_fast.data.sources import tar_indices
from beit_fast.data.sources.limits import READS
from beit_fast.data.sources.storage import LocalStorage

folder, own = sys.argv[1], tar_indices.index_shard
shards = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))

def child(work):
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    return process, reader

def num_begun():
    return sum(name.startswith(".began") for name in os.listdir(folder))

def opened(most=10**9):
    made = []
    def index(shard, *rest):
        if len(made) >= most:
            time.sleep(600)
        made.append(shard)
        open(os.path.join(folder, f".began-{os.getpid()}"), "w").close()
        while most > 24 and len(made) > 4 and num_begun() < 3:
            time.sleep(0.01)  # for another one: the killed one has begun too
        return own(shard, *rest)
    tar_indices.index_shard = index
    found = tar_indices.shard_indices(LocalStorage(folder), shards, READS)
    return len(made), [len(index) for index in found]

killed, _ = child(lambda: opened(most=3))
beside = os.path.join(folder, ".beit_fast")
while not os.path.isdir(beside) or len(os.listdir(beside)) < 4:
    time.sleep(0.01)
time.sleep(0.1)
children = [child(opened) for _ in range(4)]
time.sleep(0.5)
waited = [os.waitpid(process, os.WNOHANG)[0] for process, _ in children]
os.kill(killed, signal.SIGKILL)
os.waitpid(killed, 0)
answers = [json.loads(os.read(reader, 10**6)) for _, reader in children]
print(json.dumps([waited, answers]))
"""


def test_processes_share_the_work_and_one_that_is_killed_leaves_its_part_to_the_others(tmp_path):
    folder = write_shards(tmp_path, 24, 2)
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, folder], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    waited, answers = json.loads(done.stdout)
    assert waited == [0] * 4  # for those that the killed one was at
    made = [count for count, _ in answers]
    assert sum(made) == 24 - 3
    assert sum(count > 0 for count in made) > 1
    assert all(sizes == [2] * 24 for _, sizes in answers)


class Far:
    """A storage behind a URL, whose reads are noted; `faults` are raised, one a read."""

    place = "s3://bucket/data"

    def __init__(self, content, faults=()):
        self._content, self.faults = content, list(faults)
        self.parts, self.asked = [], []

    def state(self, name):
        return FileState(len(self._content[name]), "etag")

    def read(self, part):
        if self.faults:
            raise self.faults.pop()
        self.parts.append(part)
        return self._content[part.name][part.first : part.first + part.count]

    def ahead(self, parts):
        self.asked += parts


def test_a_shard_that_is_far_away_is_streamed_once(folder, monkeypatch, tmp_path):
    content = {name: (folder / name).read_bytes() for name in SHARDS}
    content["large.tar"] = write_tar([("a.jpg", b"x" * 70_000), ("b.jpg", b"y"), ("b.cls", b"4")])
    (folder / "large.tar").write_bytes(content["large.tar"])
    shards, reads = [*SHARDS, "large.tar"], replace(READS, cache=str(tmp_path / "cache"))
    expected = indices(folder, shards=shards)
    for window in (1000, 512, 8 * 2**20):
        monkeypatch.setattr(tar_indices, "_FAR", window)
        far = Far(content)
        found = shard_indices(far, shards, replace(reads, cache=str(tmp_path / str(window))))
        assert same(found, expected)
        for shard in shards:
            parts = [part for part in far.parts if part.name == shard]
            ends = [0, *[part.first + part.count for part in parts]]
            assert [part.first for part in parts] == ends[:-1]  # each byte once, one by one
            later = [part for part in far.asked if part.name == shard]
            assert set(parts[1:]) <= set(later)
    assert not os.path.exists("s3:")


def test_a_read_that_fails_in_passing_is_tried_again(folder, caplog, tmp_path):
    content = {name: (folder / name).read_bytes() for name in SHARDS}
    far = Far(content, [OSError(errno.ECONNRESET, "reset")])
    found = shard_indices(far, SHARDS, replace(READS, cache=str(tmp_path / "cache")))
    assert [len(index) for index in found] == [3] * 4
    assert "was read when it was tried again" in caplog.text


def test_a_shard_that_cannot_be_read_or_hangs_is_named_with_what_to_do(folder, tmp_path):
    content = {name: (folder / name).read_bytes() for name in SHARDS}
    reads = replace(READS, cache=str(tmp_path / "cache"), read_timeout=0.3, read_retries=0)
    far = Far(content, [OSError(errno.EACCES, "no")])
    with pytest.raises(
        ValueError, match=r"s3://bucket/data/train-000\d.tar cannot be read .*no.*move"
    ):
        shard_indices(far, SHARDS, reads)
    own, goes_on = far.read, threading.Event()
    reads = replace(reads, cache=str(tmp_path / "other"))  # the first may have kept some

    def read(part):
        if part.name == SHARDS[2]:
            goes_on.wait(20)
        return own(part)

    far.read = read
    try:
        with pytest.raises(
            ValueError, match=r"train-0002.tar cannot be read \(no answer within 0.3"
        ):
            shard_indices(far, SHARDS, reads)
    finally:
        goes_on.set()
    far.read = own
    assert [len(index) for index in shard_indices(far, SHARDS, reads)] == [3] * 4  # as it says


def test_a_shard_that_changes_while_it_is_indexed_is_no_shard_yet(folder, tmp_path):
    content = {name: (folder / name).read_bytes() for name in SHARDS}
    far, states = Far(content), []

    def state(name):
        states.append(name)
        return FileState(len(content[name]), str(states.count(name)))

    far.state = state
    with pytest.raises(ValueError, match="it changes while it is read"):
        shard_indices(far, SHARDS[:1], replace(READS, cache=str(tmp_path / "cache")))


def test_progress_is_told_and_what_it_raises_ends_the_work(folder, made):
    told = []
    indices(folder, progress=lambda *counts: told.append(counts))
    assert told[-1] == (4, 4)
    assert told == sorted(told)
    told.clear()
    indices(folder, progress=lambda *counts: told.append(counts))
    assert told == []  # there is nothing to wait for

    def leave(done, total):
        raise KeyboardInterrupt

    for path in kept(folder):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        indices(folder, progress=leave)
    assert [len(index) for index in indices(folder)] == [3] * 4


def test_a_shard_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match=r"train-0009.tar does not exist"):
        indices(folder, shards=[*SHARDS, "train-0009.tar"])
