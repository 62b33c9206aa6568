"""What is left to do of a batch when the loader's threads have read it, in one more thread.

That thread finishes one batch after another, AHEAD of what is asked for. Whoever asks hands it the
batches, as they are read: so a read that hangs holds up nothing but the one who asks.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Read = TypeVar("Read")
Batch = TypeVar("Batch")

AHEAD = 2  # batches: one is in the making while another waits to be taken


class Finishing(Generic[Read, Batch]):
    """Applies `finish` in a thread of its own. Close it after what `finish` waits for."""

    # A generator that nobody closed is finalised with the interpreter, when modules are gone.
    _this_thread = staticmethod(threading.current_thread)

    def __init__(self, finish: Callable[[Read], Batch]) -> None:
        self._finish = finish
        self._pool = ThreadPoolExecutor(1, "beit_fast finish")
        self._worker: threading.Thread | None = None
        self._closed = False

    def __call__(self, batches: Iterator[Read]) -> Iterator[Batch]:
        """The finished batches, in order. An error of reading or finishing one is raised when it is
        due, after those before it."""
        pending: deque[Future[Batch]] = deque()
        for future in self._submitted(batches):
            pending.append(future)
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Waits for the batch in the making, and no other is begun."""
        # A generator that is dropped may be finalised anywhere, in the worker too.
        here = self._this_thread() is self._worker
        self._closed = True
        self._pool.shutdown(wait=not here)  # its cancel_futures wants a module that may be gone

    def _submitted(self, batches: Iterator[Read]) -> Iterator[Future[Batch]]:
        try:
            for batch in batches:
                yield self._pool.submit(self._in_worker, batch)
        except Exception as error:
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            yield failed

    def _in_worker(self, batch: Read) -> Batch:
        self._worker = threading.current_thread()
        if self._closed:
            raise CancelledError
        return self._finish(batch)
