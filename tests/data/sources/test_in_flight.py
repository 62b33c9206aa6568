"""Requests that are out at once, and who waits for them."""

import threading
import time

import pytest

from beit_fast.data.sources import in_flight
from beit_fast.data.sources.in_flight import InFlight
from beit_fast.data.sources.storage import FilePart

PARTS = [FilePart(str(number), 0, 10) for number in range(40)]


class Store:
    """Answers when it is let, and knows what was asked of it."""

    def __init__(self):
        self.go, self.asked, self.most, self._at_once = threading.Event(), [], 0, 0
        self._lock = threading.Lock()

    def fetch(self, part):
        with self._lock:
            self.asked.append(part.name)
            self._at_once += 1
            self.most = max(self.most, self._at_once)
        assert self.go.wait(5)
        with self._lock:
            self._at_once -= 1
        if part.name == "3":
            raise OSError(5, "no")
        return part.name.encode()


@pytest.fixture
def store():
    return Store()


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


def test_all_are_out_together_up_to_the_limit_and_each_is_asked_for_once(store):
    flights = InFlight(store.fetch, 60, most_requests=16)
    flights.ask(PARTS)
    until(lambda: len(store.asked) == 16)
    time.sleep(0.05)
    assert len(store.asked) == 16
    store.go.set()
    got = [flights.take(part) for part in PARTS if part.name != "3"]
    assert got == [part.name.encode() for part in PARTS if part.name != "3"]
    with pytest.raises(OSError, match="no"):
        flights.take(PARTS[3])
    assert sorted(store.asked, key=int) == [part.name for part in PARTS]
    assert store.most <= 17  # and what is taken before its turn
    flights.close()


def test_who_waits_for_what_has_not_begun_fetches_it(store):
    flights = InFlight(store.fetch, 60, most_requests=1)
    flights.ask(PARTS[:3])
    until(lambda: store.asked == ["0"])
    threading.Timer(0.1, store.go.set).start()
    assert flights.take(PARTS[2]) == b"2"
    assert store.asked[:2] == ["0", "2"]
    assert flights.take(PARTS[0]) == b"0"
    assert flights.take(PARTS[1]) == b"1"
    assert sorted(store.asked) == ["0", "1", "2"]
    flights.close()


def test_what_is_never_taken_is_forgotten_and_gives_its_room_back(store):
    store.go.set()
    flights = InFlight(store.fetch, 0.1, most_bytes=50)
    flights.ask(PARTS[:10])
    until(lambda: len(store.asked) == 5)  # as many as there is room for
    flights.ask(PARTS[20:30])  # none
    assert flights.take(PARTS[20]) == b"20"  # is fetched all the same
    time.sleep(0.15)
    flights.ask(PARTS[30:40])
    until(lambda: len(store.asked) == 11)
    assert flights.take(PARTS[0]) == b"0"
    assert store.asked.count("0") == 2  # it was forgotten
    flights.close()


def test_closing_waits_for_nothing_and_ends_its_threads(store):
    before = set(threading.enumerate())
    flights = InFlight(store.fetch, 60, most_requests=2)
    flights.ask(PARTS[:8])
    until(lambda: len(store.asked) == 2)
    flights.close()
    flights.ask(PARTS[10:])  # of which nothing comes
    store.go.set()
    until(lambda: not set(threading.enumerate()) - before)
    assert len(store.asked) == 2


def test_threads_without_work_end_and_come_again(store, monkeypatch):
    monkeypatch.setattr(in_flight, "_IDLE", 0.05)
    store.go.set()
    before = set(threading.enumerate())
    flights = InFlight(store.fetch, 60, most_requests=2)
    for parts in (PARTS[:3], PARTS[10:20]):
        flights.ask(parts)
        until(lambda: store.asked[-1:] == [parts[-1].name])  # noqa: B023
        until(lambda: not set(threading.enumerate()) - before)
    assert [flights.take(part) for part in PARTS[10:20]] == [b"%d" % n for n in range(10, 20)]
    assert len(store.asked) == 13
    flights.close()
