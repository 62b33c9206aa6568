"""Reads that end: each with a limit of time, and tried again where a failure may pass.

A network file system that is gone lets a read hang, and nothing ends a thread that hangs. So reads
are handed to threads that can be given up: whoever waits for one is free again after the limit,
and at once where the reading stops. What is given up is one thread for each file that hangs; it
ends when its read does, and keeps no process alive.
"""

import errno
import logging
import queue
import threading
from typing import Generic, TypeVar

from beit_fast.data.config import ReadConfig
from beit_fast.data.sources.folder import Source

logger = logging.getLogger("beit_fast.data")

Files = TypeVar("Files")  # of one image: bytes, or those of its mask too

# What disks and networks say in passing. A file that is not there, or not ours, stays so.
PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EREMOTEIO),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE),
    }
)
# Seconds. A process that was stopped and goes on has waited for one slice at most: what it was
# reading is not given up for it.
_SLICE = 0.1
_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # before a read is tried again; ten times as long each time


class ReadsClosedError(RuntimeError):
    """Nobody wants what was asked for any more."""


class Reads(Generic[Files]):
    """`source.read` for several threads at once, under the limits of `limits`.

        with Reads(source, limits) as read:
            data = read(index)

    Raises what the source raises, and TimeoutError, an OSError, for what is not read within
    `read_timeout` seconds, pauses and further tries included. That some reads succeeded only when
    tried again is said in the log "beit_fast.data": of the first at once, of how many at the end.
    """

    def __init__(self, source: Source[Files], limits: ReadConfig) -> None:
        self._source, self._limits = source, limits
        # Re-entrant: a generator that is dropped may be finalised, and close this, anywhere.
        self._stopping, self._lock = threading.Event(), threading.RLock()
        self._idle: list[_Hand] = []
        self._num_retried = 0

    def __call__(self, index: int) -> Files:
        with self._lock:
            hand = self._idle.pop() if self._idle else None
        if hand is None:
            hand = _Hand(self._read)
        hand.asked.put(index)
        try:
            files, error = self._wait(hand)
        except BaseException:
            hand.dismiss()
            raise
        with self._lock:
            closed = self._stopping.is_set()
            if not closed:
                self._idle.append(hand)
        if closed:
            hand.dismiss()
        if error is not None:
            raise error
        return files

    def __enter__(self) -> "Reads[Files]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """Whoever waits for a read is told within a tenth of a second, by ReadsClosedError."""
        self._stopping.set()

    def close(self) -> None:
        """Stop, and end all threads but those that still read. Waits for no read."""
        self.stop()
        with self._lock:
            hands, self._idle = self._idle, []
            num_retried, self._num_retried = self._num_retried, 0
        for hand in hands:
            hand.dismiss()
        for hand in hands:
            if hand.thread is not threading.current_thread():
                hand.thread.join()
        if num_retried > 1:
            logger.warning("%d reads succeeded only when they were tried again", num_retried)

    def _wait(self, hand: "_Hand") -> tuple[Files, Exception | None]:
        limit, waited = self._limits.read_timeout, 0.0
        while waited < limit:
            part = min(_SLICE, limit - waited)
            try:
                return hand.answered.get(timeout=part)
            except queue.Empty:
                waited += part
            if self._stopping.is_set():
                raise ReadsClosedError("the reading was stopped")
        raise TimeoutError(f"no answer within {limit:g} s")

    def _read(self, index: int) -> Files:
        """In the thread of a hand."""
        tries, pause, failed = 0, _PAUSE, None
        while True:
            try:
                files = self._source.read(index)
            except OSError as error:
                if error.errno not in PASSING or tries == self._limits.read_retries:
                    raise
                failed = error
            else:
                if failed is not None:
                    self._count_retried(index, failed)
                return files
            if self._stopping.wait(pause):
                raise failed
            tries, pause = tries + 1, min(10 * pause, _LONGEST_PAUSE)

    def _count_retried(self, index: int, error: OSError) -> None:
        with self._lock:
            self._num_retried += 1
            first = self._num_retried == 1
        if first:
            logger.warning(
                "%s was read when it was tried again (%s); further ones are counted and not named",
                *(self._source.name(index), " ".join(str(error).split())),
            )


class _Hand:
    """A thread that reads for others, one file after another, until it is dismissed."""

    def __init__(self, read) -> None:
        # Number of the image, None to end; what was read, or the error.
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.answered: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(
            target=self._serve, args=(read,), name="beit_fast read", daemon=True
        )
        self.thread.start()

    def dismiss(self) -> None:
        """It ends now, or when its read does."""
        self.asked.put(None)

    def _serve(self, read) -> None:
        while (index := self.asked.get()) is not None:
            try:
                answer = read(index), None
            except Exception as error:
                answer = None, error
            self.answered.put(answer)
            del answer  # a whole file
