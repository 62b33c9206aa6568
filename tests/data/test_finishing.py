"""Batches are finished in a thread, in order, and no error or end comes before its turn."""

import concurrent.futures.thread
import threading
import time

import pytest

from beit_fast.data.finishing import AHEAD, Finishing


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("beit_fast finish")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    end = time.monotonic() + 5  # one that closed its own pool is on its way
    while workers() and time.monotonic() < end:
        time.sleep(0.001)
    assert not workers()


def test_batches_come_in_order_from_one_other_thread():
    seen = []

    def finish(number):
        seen.append(threading.current_thread())
        return 2 * number

    finishing = Finishing(finish)
    assert list(finishing(iter(range(10)))) == [2 * number for number in range(10)]
    assert len(set(seen)) == 1
    assert threading.current_thread() not in seen
    finishing.close()


def test_so_many_are_finished_ahead_and_no_more():
    asked, done = [], []

    def numbers():
        for number in range(100):
            asked.append(number)
            yield number

    finishing = Finishing(lambda number: done.append(number) or number)
    finished = finishing(numbers())
    for number in range(5):
        assert next(finished) == number
        assert len(asked) == number + 1 + AHEAD
    while len(done) < 5 + AHEAD:
        time.sleep(0.001)
    finished.close()
    finishing.close()
    assert len(done) == 5 + AHEAD


@pytest.mark.parametrize("where", ["reading", "finishing"])
def test_an_error_is_raised_when_its_batch_is_due(where):
    def numbers():
        for number in range(6):
            if where == "reading" and number == 4:
                raise OSError("disk")
            yield number

    def finish(number):
        if where == "finishing" and number == 4:
            raise OSError("disk")
        return number

    finishing, came = Finishing(finish), []
    with pytest.raises(OSError, match="disk"):
        came.extend(finishing(numbers()))
    finishing.close()
    assert came == [0, 1, 2, 3]


def test_closing_waits_for_what_is_in_the_making_and_begins_nothing():
    begun, go_on = [], threading.Event()

    def finish(number):
        begun.append(number)
        go_on.wait(10)
        return number

    finishing = Finishing(finish)
    finished = finishing(iter(range(100)))
    consumer = threading.Thread(target=lambda: next(finished, None))
    consumer.start()
    while not begun:
        time.sleep(0.001)
    closer = threading.Thread(target=finishing.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    go_on.set()
    closer.join(10)
    consumer.join(10)
    assert begun == [0]


def test_it_may_be_closed_in_its_own_thread():
    """As a generator is that was dropped, and is finalised wherever garbage is collected."""
    finishing = Finishing(lambda number: finishing.close())
    assert list(finishing(iter([1]))) == [None]


def test_it_is_closed_when_modules_are_gone(monkeypatch):
    """With the interpreter, as what nobody closed."""
    finishing = Finishing(abs)
    assert list(finishing(iter([1]))) == [1]
    monkeypatch.setattr(concurrent.futures.thread, "queue", None)
    finishing.close()
