"""Reads that hang, fail for a while, or fail."""

import errno
import logging
import os
import signal
import threading
import time

import pytest

from beit_fast.data.sources import reading
from beit_fast.data.sources.folder import ImageFiles, read_image_file
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.sources.reading import (
    PASSING,
    HungReadError,
    Reads,
    ReadsClosedError,
    SourceHangsError,
)
from faults import LET_GO, Injector, fired
from loaded import Faulty, Numbers, readers

QUICK = ReadConfig(read_timeout=0.2)
pytestmark = pytest.mark.promise("R17")


@pytest.fixture(autouse=True)
def no_reader_stays(monkeypatch):
    LET_GO.clear()
    monkeypatch.setattr(reading, "_PAUSE", 0.01)
    yield
    LET_GO.set()
    for thread in readers():  # those that were given up
        thread.join(5)
    assert not readers()


@pytest.fixture
def faulty(tmp_path):
    """Sources of numbers with faults."""
    return lambda *armed, again=1: Faulty(Numbers(100), Injector(tmp_path, armed, again=again))


def one(reads: Reads, index: int):
    return reads.run(lambda read: read(index))


def test_a_read_is_the_sources(faulty):
    with Reads(faulty(), QUICK) as reads:
        assert [one(reads, index) for index in (3, 4)] == [b"3", b"4"]
        assert reads.run(lambda read: [read(index) for index in (5, 6)]) == [b"5", b"6"]
        assert len(readers()) == 1
    assert not readers()


def test_a_read_that_hangs_is_given_up_after_the_limit_and_others_go_on(faulty, tmp_path):
    done = []

    def work(read):
        for index in (12, 13, 14):
            done.append(read(index))

    with Reads(faulty("0:13:hang_read"), QUICK) as reads:
        began = time.monotonic()
        with pytest.raises(HungReadError, match=r"no answer within 0\.2 s") as error:
            reads.run(work)
        assert 0.2 <= time.monotonic() - began < 5
        assert error.value.index == 13
        assert isinstance(error.value, OSError)
        assert one(reads, 15) == b"15"
        assert len(readers()) == 2
    (hanging,) = readers()
    assert hanging.daemon
    assert fired(tmp_path) == {"0:13:hang_read": 1}
    LET_GO.set()
    hanging.join(5)
    assert done == [b"12"]  # what was given up does nothing more


def test_slow_reads_below_the_limit_are_no_hang_however_many(faulty, tmp_path):
    armed = [f"0:{index}:slow_read" for index in range(3)]
    with Reads(faulty(*armed), ReadConfig(read_timeout=0.6)) as reads:
        assert reads.run(lambda read: [read(index) for index in range(3)]) == [b"0", b"1", b"2"]
    assert sum(fired(tmp_path).values()) == 3


def test_work_that_takes_long_between_reads_is_no_hang():
    with Reads(Numbers(3), ReadConfig(read_timeout=0.1)) as reads:
        assert reads.run(lambda read: (read(1), time.sleep(0.4), read(2))) == (b"1", None, b"2")


def test_a_process_that_was_stopped_gives_up_no_read(faulty, tmp_path):
    """Its clock has gone on, and its disk may have had no chance to answer."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            source = faulty("0:7:slow_read")
            with Reads(source, ReadConfig(read_timeout=0.5)) as reads:
                code = 0 if one(reads, 7) == b"7" else 2
        finally:
            os._exit(code)
    while not fired(tmp_path):
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.promise("R14")
@pytest.mark.parametrize("fault", ["eio", "stale"])
def test_what_fails_in_passing_is_tried_again_and_counted(faulty, tmp_path, caplog, fault):
    armed = [f"0:{index}:{fault}" for index in (7, 8, 9)]
    with (
        caplog.at_level(logging.WARNING, "beit_fast.data"),
        Reads(faulty(*armed), ReadConfig()) as reads,
    ):
        assert [one(reads, index) for index in (7, 8, 9)] == [b"7", b"8", b"9"]
    assert fired(tmp_path) == dict.fromkeys(armed, 1)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("image-7 was read when it was tried again ([Errno ")
    assert last == "3 reads succeeded only when they were tried again"


@pytest.mark.promise("R14")
@pytest.mark.parametrize(
    ("fault", "retries", "tries"), [("eio", 2, 3), ("eio", 0, 1), ("denied", 2, 1)]
)
def test_what_goes_on_failing_is_raised(faulty, tmp_path, fault, retries, tries):
    name = f"0:7:{fault}"
    with Reads(faulty(name, again=9), ReadConfig(read_retries=retries)) as reads:
        with pytest.raises(OSError, match=r"\[Errno"):
            one(reads, 7)
        assert one(reads, 8) == b"8"
    assert fired(tmp_path) == {name: tries}


def test_no_error_that_stays_is_tried_again():
    stays = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
    assert not PASSING & {*stays, errno.ENAMETOOLONG, errno.EFBIG}


def test_pauses_and_tries_together_have_the_limit(faulty, monkeypatch):
    monkeypatch.setattr(reading, "_PAUSE", 0.15)
    limits = ReadConfig(read_timeout=0.2, read_retries=5)
    with Reads(faulty("0:7:eio", again=9), limits) as reads:
        began = time.monotonic()
        with pytest.raises(HungReadError):
            one(reads, 7)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("armed", ["0:7:hang_read", "0:7:eio"], ids=["hanging", "pausing"])
def test_closing_waits_neither_for_a_read_nor_for_a_pause(faulty, tmp_path, monkeypatch, armed):
    monkeypatch.setattr(reading, "_PAUSE", 30)
    raised = []

    def ask():
        with pytest.raises((ReadsClosedError, OSError)) as error:
            one(reads, 7)
        raised.append(error.value)

    reads = Reads(faulty(armed), ReadConfig())
    asker = threading.Thread(target=ask)
    asker.start()
    while not fired(tmp_path):
        time.sleep(0.01)
    began = time.monotonic()
    reads.close()
    asker.join()
    assert time.monotonic() - began < 5
    assert len(raised) == 1
    with pytest.raises(ReadsClosedError):
        one(reads, 8)


def test_a_disk_that_answers_nothing_is_said_and_keeps_few_threads(faulty, monkeypatch):
    monkeypatch.setattr(reading, "_MAX_HANGING", 3)
    limits = ReadConfig(read_timeout=0.01)
    with Reads(faulty(*(f"0:{n}:hang_read" for n in range(5))), limits) as reads:
        for index in range(3):
            with pytest.raises(HungReadError):
                one(reads, index)
        with pytest.raises(SourceHangsError, match=r"4 reads hang, .* of image-3, "):
            one(reads, 3)
        LET_GO.set()
        while len(readers()) > 0:
            time.sleep(0.01)
        LET_GO.clear()
        with pytest.raises(HungReadError):  # those that hung have ended
            one(reads, 4)


def test_whatever_work_raises_is_raised():
    class Odd(BaseException):
        pass

    def work(read):
        raise Odd

    with Reads(Numbers(3), QUICK) as reads:
        with pytest.raises(Odd):
            reads.run(work)
        assert one(reads, 1) == b"1"


def test_ctrl_c_while_a_read_hangs_leaves_no_thread_that_waits(faulty, tmp_path):
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with Reads(faulty("0:7:hang_read"), ReadConfig()) as reads:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            one(reads, 7)
        assert one(reads, 8) == b"8"
    assert fired(tmp_path)


@pytest.mark.promise("R14")
def test_fewer_bytes_than_the_file_has_are_an_error_that_may_pass(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 100)
    fstat, calls = os.fstat, []

    def longer(descriptor):
        calls.append(descriptor)
        found = list(fstat(descriptor))
        found[6] += 50 * (len(calls) <= 2)
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", longer)
    with pytest.raises(OSError, match=r"100 of 150 bytes came: .*a\.jpg") as error:
        read_image_file(path)
    assert error.value.errno in PASSING
    calls.clear()
    with Reads(ImageFiles([str(path)]), ReadConfig()) as reads:
        assert one(reads, 0) == b"x" * 100
