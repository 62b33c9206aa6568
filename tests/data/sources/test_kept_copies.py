"""Copies of files in a bounded folder, whoever else is at it."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from beit_fast.data.sources.kept_copies import BusyError, KeptCopies, NoRoomError
from beit_fast.data.sources.storage import FileState

pytestmark = pytest.mark.promise("R17")
STATE = FileState(1000, "tag")
BLOCKS = [bytes([number]) * 250 for number in range(4)]
FULL = 1032  # bytes of a copy with its digest


@pytest.fixture
def kept(tmp_path):
    return KeptCopies(tmp_path, 3 * FULL)


def make(kept, url="s3://b/a", blocks=BLOCKS):
    *_, copy = kept.make(url, STATE, iter(blocks))
    return copy


def files(kept):
    return sorted(name for name in os.listdir(kept._folder) if name != ".lock")


def test_a_copy_is_read_as_it_grows_and_taken_when_it_is_whole(kept):
    growing = kept.make("s3://b/a", STATE, iter(BLOCKS))
    copy = next(growing)
    assert copy.read(0, 1) == b""
    assert kept.take("s3://b/a", STATE) is None
    next(growing)
    next(growing)
    assert copy.read(240, 20) == bytes(10) + bytes([1]) * 10
    assert copy.read(490, 20) == b""
    assert list(growing) == [copy] * 2
    taken = kept.take("s3://b/a", STATE)
    assert copy.read(0, 1000) == taken.read(0, 1000) == b"".join(BLOCKS)
    assert taken.read(990, 20) == b""  # the digest is no part of it
    assert kept.take("s3://b/a", FileState(1000, "other")) is None
    assert kept.take("s3://b/b", STATE) is None


def test_a_damaged_copy_is_told_removed_and_made_anew(kept, caplog):
    make(kept)
    (name,) = files(kept)
    path = kept._folder / name
    for damage in (lambda data: data[:-1], lambda data: b"\1" + data[1:], lambda data: b""):
        path.write_bytes(damage(path.read_bytes()))
        with caplog.at_level(logging.WARNING):
            assert kept.take("s3://b/a", STATE) is None
        assert f"the copy of s3://b/a at {path} is damaged" in caplog.text
        assert files(kept) == []
        make(kept)
        assert kept.take("s3://b/a", STATE).read(0, 1000) == b"".join(BLOCKS)


def test_the_one_taken_longest_ago_makes_room_and_what_is_in_use_does_not(kept):
    for number in range(3):
        make(kept, f"s3://b/{number}")
        time.sleep(0.01)
    assert kept.take("s3://b/0", STATE)  # used again, and let go
    held = kept.take("s3://b/1", STATE)
    time.sleep(0.01)
    make(kept, "s3://b/3")
    assert [kept.take(f"s3://b/{n}", STATE) is not None for n in range(4)] == [1, 1, 0, 1]
    make(kept, "s3://b/4")
    make(kept, "s3://b/5")
    assert held.read(0, 1000) == b"".join(BLOCKS)
    everything = [held, kept.take("s3://b/4", STATE), kept.take("s3://b/5", STATE)]
    with pytest.raises(NoRoomError):
        make(kept, "s3://b/6")
    assert len(files(kept)) == 3
    del everything, held
    assert make(kept, "s3://b/6").read(0, 250) == BLOCKS[0]
    assert len(files(kept)) == 3


def test_a_file_larger_than_all_is_refused_before_it_is_asked_for(tmp_path):
    kept = KeptCopies(tmp_path, FULL - 1)

    def blocks():
        raise AssertionError("it was asked for")
        yield

    with pytest.raises(NoRoomError):
        next(kept.make("s3://b/a", STATE, blocks()))
    assert files(kept) == []


@pytest.mark.parametrize("blocks", [BLOCKS[:3], [*BLOCKS, b"x"]], ids=["short", "long"])
def test_what_is_not_as_long_as_it_was_said_is_not_kept(blocks, kept):
    with pytest.raises(OSError, match="of 1000 bytes came"):
        make(kept, blocks=blocks)
    assert files(kept) == []


def test_what_is_given_up_or_fails_leaves_nothing(kept):
    growing = kept.make("s3://b/a", STATE, iter(BLOCKS))
    next(growing)
    next(growing)
    assert len(files(kept)) == 1
    growing.close()
    assert files(kept) == []

    def failing():
        yield BLOCKS[0]
        raise OSError(5, "a fault")

    with pytest.raises(OSError, match="a fault"):
        make(kept, blocks=failing())
    assert files(kept) == []


def test_a_copy_in_the_making_is_left_to_who_makes_it_and_counts(kept, tmp_path):
    growing = kept.make("s3://b/a", STATE, iter(BLOCKS))
    next(growing)
    other = KeptCopies(tmp_path, 2 * FULL)
    with pytest.raises(BusyError):
        make(other)
    held = make(other, "s3://b/b")
    with pytest.raises(NoRoomError):
        make(other, "s3://b/c")
    assert held.read(0, 250) == BLOCKS[0]
    assert len(list(growing)) == 4
    assert other.take("s3://b/a", STATE).read(0, 1000) == b"".join(BLOCKS)


CHILD = """
    import os, sys, time
    from beit_fast.data.sources.kept_copies import *
    from beit_fast.data.sources.storage import FileState
    kept = KeptCopies(__import__("pathlib").Path(sys.argv[1]), {most})
    def blocks(stop):
        for number in range(4):
            if number == stop:
                print("half", flush=True)
                time.sleep(60)
            yield bytes([number]) * 250
"""


def child(tmp_path, code, most=3 * FULL):
    code = textwrap.dedent(CHILD.format(most=most)) + textwrap.dedent(code)
    command = [sys.executable, "-c", code, str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_left_is_begun_anew_or_makes_room(kept, tmp_path):
    for url in ("s3://b/a", "s3://b/b"):
        code = f"list(kept.make('{url}', FileState(1000, 'tag'), blocks(2)))"
        with child(tmp_path, code) as process:
            assert process.stdout.readline() == "half\n"
            with pytest.raises(BusyError):
                make(kept, url)
            process.send_signal(signal.SIGKILL)
    assert len(files(kept)) == 2
    assert kept.take("s3://b/a", STATE) is None
    assert make(kept, "s3://b/a").read(0, 1000) == b"".join(BLOCKS)
    held = [make(kept, "s3://b/c"), make(kept, "s3://b/d")]  # in the place of b's half
    assert len(files(kept)) == 3
    assert all(not name.startswith(".") for name in files(kept))
    assert len(held) == 2


def test_processes_and_threads_at_one_folder_never_see_a_wrong_copy(kept, tmp_path):
    code = """
        import random
        random.seed(int(os.environ["SEED"]))
        made = 0
        end = time.monotonic() + 30
        while made < 8 and time.monotonic() < end:
            time.sleep(0.001)  # a lock goes to who waits
            n = random.randrange(5)
            url, state = f"s3://b/{n}", FileState(1000, "tag")
            copy = kept.take(url, state)
            try:
                if copy is None:
                    for copy in kept.make(url, state, (bytes([n]) * 250 for _ in range(4))):
                        pass
                    made += 1
            except (BusyError, NoRoomError):
                continue
            assert copy.read(0, 1000) == bytes([n]) * 1000, n
            with kept._space():
                sizes = [entry.stat().st_size for entry in os.scandir(kept._folder)]
            assert sum(sizes) <= 3 * 1032, sizes
        print(made)
    """
    processes = []
    for seed in range(3):
        os.environ["SEED"] = str(seed)
        processes.append(child(tmp_path, code))
    del os.environ["SEED"]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert said == ["8\n"] * 3


def test_a_link_in_the_place_of_a_copy_is_not_followed(kept, tmp_path):
    make(kept)
    (name,) = files(kept)
    (tmp_path / "mine").write_bytes(b"mine")
    (kept._folder / name).unlink()
    (kept._folder / name).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        kept.take("s3://b/a", STATE)
    (kept._folder / name).unlink()
    (kept._folder / f".{name}.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        make(kept)
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_nobody_waits_for_the_lock_of_space_longer_than_it_is_held(kept):
    with kept._space():
        thread = threading.Thread(target=make, args=(kept,))
        thread.start()
        time.sleep(0.1)
        assert files(kept) == []
    thread.join(5)
    assert len(files(kept)) == 1
