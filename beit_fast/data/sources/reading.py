"""Reads that end: each with a limit of time, and tried again where a failure may pass.

A network file system that is gone lets a read hang, and nothing ends a thread that hangs. So what
reads is handed to threads that can be given up: whoever waits for one is free again after the
limit, and at once where the reading stops. What is given up is one thread for each file that hangs;
it ends when its read does, and keeps no process alive.

A thread is handed as much work as there is, a whole batch: to hand over every read alone costs
some 20 us each, a fiftieth of a small image's decoding.
"""

import errno
import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from beit_fast.data.sources.folder import Source
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.errors import RunError

logger = logging.getLogger("beit_fast.data")

Files = TypeVar("Files")  # of one image: bytes, or those of its mask too
Result = TypeVar("Result")
Read = Callable[[int], Files]

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
_MAX_HANGING = 32  # reads at once: each keeps a thread
_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # before a read is tried again; ten times as long each time


class HungReadError(TimeoutError):
    """The files of image `index` have not been read within the limit."""

    def __init__(self, index: int, limit: float) -> None:
        super().__init__(f"no answer within {limit:g} s")
        self.index = index


class SourceHangsError(RunError):
    """So many reads hang that it is not for some files."""


class ReadsClosedError(RuntimeError):
    """Nobody wants what was asked for any more."""


class Reads(Generic[Files]):
    """`source.read` under the limits of `limits`, for several threads at once.

        with Reads(source, limits) as reads:
            pixels = reads.run(lambda read: decode(read(index)))

    That some reads succeeded only when tried again is said in the log "beit_fast.data": of the
    first at once, of how many at the end.
    """

    def __init__(self, source: Source[Files], limits: ReadConfig) -> None:
        self._source, self._limits = source, limits
        # Re-entrant: a generator that is dropped may be finalised, and close this, anywhere.
        self._stopping, self._lock = threading.Event(), threading.RLock()
        self._idle: list[_Hand] = []
        self._hanging: list[_Hand] = []  # and those that did and have ended since
        self._num_retried = 0

    def run(self, work: Callable[[Read[Files]], Result]) -> Result:
        """What `work` gives, in another thread; it may read any number of images.

        Raises what it raises; HungReadError for a read that takes more than `read_timeout` seconds,
        pauses and further tries included: `work` is given up then, and if that read ever ends, it
        raises ReadsClosedError in there. So does every read once the reading is stopped.
        SourceHangsError instead for one too many that hang at once.
        """
        with self._lock:
            hand = self._idle.pop() if self._idle else None
        if hand is None:
            hand = _Hand(self._read, self._stopping)
        hand.asked.put(work)
        try:
            result, error = self._wait(hand)
        except BaseException:
            hand.give_up()
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
        return result

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

    def _wait(self, hand: "_Hand") -> tuple[Result, BaseException | None]:
        limit, waited, seen = self._limits.read_timeout, 0.0, None
        while True:
            part = min(_SLICE, limit)
            try:
                return hand.answered.get(timeout=part)
            except queue.Empty:
                now = hand.reading
            waited = waited + part if now is seen else 0.0  # else it is another read than before
            seen = now
            if now is not None and self._stopping.is_set():
                raise ReadsClosedError("the reading was stopped")
            if now is not None and waited >= limit and hand.give_up(now):
                self._count_hanging(hand, now.index)
                raise HungReadError(now.index, limit)

    def _read(self, index: int) -> Files:
        """In the thread of a hand."""
        tries, pause = 0, _PAUSE
        failed: OSError | None = None
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

    def _count_hanging(self, hand: "_Hand", index: int) -> None:
        with self._lock:
            self._hanging = [one for one in (*self._hanging, hand) if one.reading is not None]
            count = len(self._hanging)
        if count > _MAX_HANGING:
            raise SourceHangsError(
                f"{count} reads hang, the last that of {self._source.name(index)}, none of which "
                f"was answered within {self._limits.read_timeout:g} s: see that the disk or "
                "network file system answers; then give the same command again"
            )

    def _count_retried(self, index: int, error: OSError) -> None:
        with self._lock:
            self._num_retried += 1
            first = self._num_retried == 1
        if first:
            logger.warning(
                "%s was read when it was tried again (%s); further ones are counted and not named",
                *(self._source.name(index), " ".join(str(error).split())),
            )


class _Reading:
    """One read; a new object for each, by which two of one image differ."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Hand(Generic[Files]):
    """A thread that works for others, one piece after another, until it is dismissed."""

    def __init__(self, read: Read[Files], stopping: threading.Event) -> None:
        # What to do, None to end; what came of it, or the error.
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.answered: queue.SimpleQueue = queue.SimpleQueue()
        self.reading: _Reading | None = None
        self._given_up, self._lock = False, threading.Lock()
        self._read, self._stopping = read, stopping
        self.thread = threading.Thread(target=self._serve, name="beit_fast read", daemon=True)
        self.thread.start()

    def give_up(self, reading: _Reading | None = None) -> bool:
        """Its work comes to nothing from the next read on; with `reading` only if it is at that
        one. Whether it was given up."""
        with self._lock:
            if reading is None or reading is self.reading:
                self._given_up = True
            return self._given_up

    def dismiss(self) -> None:
        """It ends now, or when its work does."""
        self.asked.put(None)

    def read(self, index: int) -> Files:
        if self._given_up or self._stopping.is_set():
            raise ReadsClosedError("the reading was stopped")
        self.reading = _Reading(index)
        try:
            return self._read(index)
        finally:
            with self._lock:
                self.reading = None
                if self._given_up:
                    raise ReadsClosedError("this read was given up")

    def _serve(self) -> None:
        while (work := self.asked.get()) is not None:
            try:
                answer = work(self.read), None
            except BaseException as error:  # somebody waits
                answer = None, error
            self.answered.put(answer)
            del work, answer  # a batch, perhaps
