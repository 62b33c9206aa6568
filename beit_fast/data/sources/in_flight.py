"""Requests that are out at once: those of a batch together, each waited for by whoever reads it.

A store answers in 20 to 100 ms, and a thread that waits for each in turn gets 10 to 50 images a
second. So what a batch will read is asked for when the batch begins, by threads that do nothing
else. obstore's calls hold no lock of the interpreter while they wait: threads in them got more
answers for less CPU than as many of its coroutines (bench/stores.py).
"""

import contextlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple

from beit_fast.data.sources.storage import FilePart

MOST_REQUESTS = 256  # at once, and threads that wait for them
MOST_BYTES = 2**30  # asked for and not taken yet
MOST_PARTS = 16384
_IDLE = 5.0  # seconds after which a thread without work ends


class _Asked(NamedTuple):
    when: float
    answer: "Future[bytes]"


class InFlight:
    """`fetch` of parts of files, ahead of who takes them.

    keep: seconds after which what was asked for and not taken is forgotten, once there is room
    wanted. What finds no room is fetched when it is taken.
    """

    def __init__(
        self,
        fetch: Callable[[FilePart], bytes],
        keep: float,
        *,
        most_requests: int = MOST_REQUESTS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._fetch, self._keep = fetch, keep
        self._most_requests, self._most_bytes = most_requests, most_bytes
        self._asked: OrderedDict[FilePart, _Asked] = OrderedDict()  # by when they were
        self._num_bytes = 0
        self._queue: queue.SimpleQueue[tuple[FilePart, Future[bytes]] | None] = queue.SimpleQueue()
        self._num_threads = 0
        self._is_closed, self._lock = False, threading.Lock()

    def ask(self, parts: Sequence[FilePart]) -> None:
        """Begin to fetch them. Returns at once."""
        now = time.monotonic()
        with self._lock:
            self._forget(now - self._keep)
            for part in parts:
                size = max(part.count, 0)
                full = self._num_bytes + size > self._most_bytes or len(self._asked) >= MOST_PARTS
                if self._is_closed or full:
                    break
                if part in self._asked:
                    continue
                answer: Future[bytes] = Future()
                self._asked[part] = _Asked(now, answer)
                self._num_bytes += size
                self._queue.put((part, answer))
            wanted = 0 if self._is_closed else min(self._most_requests, len(self._asked))
            for _ in range(self._num_threads, wanted):
                self._num_threads += 1
                threading.Thread(target=self._serve, name="beit_fast store", daemon=True).start()

    def take(self, part: FilePart) -> bytes:
        """What was asked for, once it is there; what was not, or has not begun, is fetched now.

        Raises what `fetch` does.
        """
        with self._lock:
            asked = self._asked.pop(part, None)
            if asked is not None:
                self._num_bytes -= max(part.count, 0)
        if asked is None or asked.answer.cancel():
            return self._fetch(part)
        try:
            return asked.answer.result()
        except CancelledError:  # by `close`
            return self._fetch(part)

    def close(self) -> None:
        """Forget all. What is out comes back to nobody; waits for nothing."""
        with self._lock:
            self._is_closed = True
            for _, answer in self._asked.values():
                answer.cancel()
            self._asked.clear()
            self._num_bytes = 0
            for _ in range(self._num_threads):
                self._queue.put(None)

    def _forget(self, before: float) -> None:
        while self._asked:
            part, asked = next(iter(self._asked.items()))
            if asked.when > before:
                return
            asked.answer.cancel()
            del self._asked[part]
            self._num_bytes -= max(part.count, 0)

    def _next(self) -> tuple[FilePart, Future[bytes]] | None:
        """None for a thread that has nothing to do any more."""
        with contextlib.suppress(queue.Empty):
            return self._queue.get(timeout=_IDLE)
        with self._lock:  # who asks counts threads under it
            with contextlib.suppress(queue.Empty):
                return self._queue.get_nowait()
            self._num_threads -= 1
            return None

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            part, answer = work
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(self._fetch(part))
                except BaseException as error:  # somebody waits
                    answer.set_exception(error)
            del work, answer  # an image
