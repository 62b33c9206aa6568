"""The indices of all shards of a place: those that are kept, and the others made and kept.

Several processes that want the same ones share the work: whoever makes an index holds a lock on it
meanwhile, which ends with the process, and what one has made the others read. Each index is kept
when it is made, so a command that is stopped goes on there.
"""

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.sources.places import is_url
from beit_fast.data.sources.reading import Read, Reads, ReadsClosedError
from beit_fast.data.sources.storage import FilePart, FileState, Storage
from beit_fast.data.sources.tar_index import ShardIndex, index_shard
from beit_fast.data.sources.tar_keeping import Keeping

Progress = Callable[[int, int], None]  # shards that are done, of how many; it may raise

_THREADS = 8  # of them most wait for the disk: a process works at one at a time
_ASKING = 32  # of a store, each for the size of a shard
# Bytes read at once. A disk is asked for what lies between two images, a store for everything: it
# takes as long to answer as to send a mebibyte.
_NEAR, _FAR = 4096, 8 * 2**20
_PAUSE = 0.1  # seconds, until it is looked again whether another process is done


def shard_indices(
    storage: Storage, shards: Sequence[str], reads: ReadConfig, progress: Progress | None = None
) -> list[ShardIndex]:
    """In the order of the shards.

    Raises ValueError for a shard that is not there, cannot be read, or changes meanwhile.
    """
    making = _Making(storage, shards, reads)
    try:
        making.load_kept()
        if making.waiting:
            making.make(progress or (lambda done, total: None))
    finally:
        making.stop()
    return making.found


def forget_index(storage: Storage, index: ShardIndex, reads: ReadConfig) -> str:
    """Have it made anew by the next command: its shard has other content, whatever its size and
    time stamp say. Returns the path of an index that cannot be removed, else ""."""
    keeping = Keeping(storage.place, reads.cache, is_far=is_url(storage.place))
    return keeping.forget(index.shard, index.state)


class _Making:
    def __init__(self, storage: Storage, shards: Sequence[str], reads: ReadConfig) -> None:
        self._storage, self._shards = storage, shards
        self._parts = _Parts(storage, shards)
        self._reads = Reads(self._parts, reads)
        self._is_far = is_url(storage.place)
        self._keeping = Keeping(storage.place, reads.cache, is_far=self._is_far)
        self.found: list[ShardIndex | None] = [None] * len(shards)
        self._states: list[FileState | None] = [None] * len(shards)
        self.waiting: deque[int] = deque()
        self._error: BaseException | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self._reads.close()
        self._keeping.close()

    def load_kept(self) -> None:
        self.waiting.extend(range(len(self._shards)))
        missing: list[int] = []

        def load(number: int) -> bool:
            with self._told(number):
                self._states[number] = self._reads.run(lambda read: read(number))
            self.found[number] = self._load(number)
            if self.found[number] is None:
                missing.append(number)
            return True

        self._run(load, lambda: None, _ASKING if self._is_far else _THREADS)
        self.waiting.extend(sorted(missing))

    def make(self, progress: Progress) -> None:
        total = len(self.waiting)
        self._keeping.open()
        wanted = list(self.waiting)

        def make(number: int) -> bool:
            if not self._keeping.take(self._shards[number]):
                self.found[number] = self._load(number)  # by the process that holds it
                return self.found[number] is not None
            try:
                index = self._load(number) or self._make(number)
            finally:
                self._keeping.give_back(self._shards[number])
            self.found[number] = index
            return True

        def say() -> None:
            progress(sum(self.found[number] is not None for number in wanted), total)

        self._run(make, say, _THREADS)

    def _load(self, number: int) -> ShardIndex | None:
        return self._keeping.load(self._shards[number], self._states[number])

    def _make(self, number: int) -> ShardIndex:
        shard, state = self._shards[number], self._states[number]

        def work(read: Read) -> ShardIndex:
            def read_part(part: FilePart) -> bytes:
                self._parts.wanted[number] = part
                return read(number)

            ahead = self._storage.ahead if self._is_far else None
            index = index_shard(shard, state, _Window(shard, state.size, read_part, ahead).read)
            self._parts.wanted[number] = None
            if read(number) != state:
                raise OSError(errno.EBUSY, "it changes while it is read")
            return index

        with self._told(number):
            index = self._reads.run(work)
        self._keeping.keep(index)
        return index

    @contextlib.contextmanager
    def _told(self, number: int) -> Iterator[None]:
        path = self._parts.name(number)
        try:
            yield
        except FileNotFoundError as error:
            raise ValueError(f"the shard {path} does not exist: check the path") from error
        except OSError as error:
            raise ValueError(
                f"the shard {path} cannot be read ({error.strerror or error}): make it readable, "
                "or move it out of the way and give the same command again"
            ) from error

    def _run(self, work: Callable[[int], bool], say: Callable[[], None], num_threads: int) -> None:
        """`work` on every shard that waits, again where it returns False, in threads; `say` in this
        one. Raises what either does."""
        lock, num_left = threading.Lock(), len(self.waiting)
        changed = threading.Event()

        def serve() -> None:
            nonlocal num_left
            while not self._stopping.is_set():
                with lock:
                    number = self.waiting.popleft() if self.waiting else None
                if number is None:
                    return
                try:
                    done = work(number)
                except ReadsClosedError:
                    return
                except BaseException as error:  # whoever waits raises it
                    self._error, done = error, True
                    self._stopping.set()
                with lock:
                    if done:
                        num_left -= 1
                    else:
                        self.waiting.append(number)
                changed.set()
                if not done:
                    self._stopping.wait(_PAUSE)

        for _ in range(min(num_threads, num_left)):
            threading.Thread(target=serve, name="beit_fast index", daemon=True).start()
        while num_left and self._error is None:
            say()
            changed.wait(_PAUSE)
            changed.clear()
        if self._error is not None:
            raise self._error
        say()


class _Parts:
    """What `Reads` reads, by the number of the shard: the part that is wanted of it, else what is
    known of it without reading any."""

    def __init__(self, storage: Storage, shards: Sequence[str]) -> None:
        self._storage, self._shards = storage, shards
        self.wanted: list[FilePart | None] = [None] * len(shards)

    def read(self, number: int) -> bytes | FileState:
        part = self.wanted[number]
        return (
            self._storage.state(self._shards[number]) if part is None else self._storage.read(part)
        )

    def name(self, number: int) -> str:
        return os.path.join(self._storage.place, self._shards[number])


class _Window:
    """Of a shard that is read from its beginning to its end, what was read last.

    ahead: says what is read next, and so all of the shard is read; else what is hopped over is not.
    """

    def __init__(
        self,
        shard: str,
        size: int,
        read: Callable[[FilePart], bytes],
        ahead: Callable[[Sequence[FilePart]], None] | None,
    ) -> None:
        self._shard, self._size, self._read, self._ahead = shard, size, read, ahead
        self._at_once = _NEAR if ahead is None else _FAR
        self._first, self._data = 0, b""

    def read(self, first: int, count: int) -> bytes:
        start = first - self._first
        if not 0 <= start <= len(self._data) - count:
            self._move(first, count)
            start = first - self._first
        return self._data[start : start + count]

    def _move(self, first: int, count: int) -> None:
        end = self._first + len(self._data)
        if self._ahead is None or not end - len(self._data) <= first:
            self._first, self._data = first, self._piece(first, count)
            return
        kept = self._data[first - self._first :] if first < end else b""
        while end < first + count:
            piece = self._piece(end, 0)
            kept, end = kept + piece[max(0, first - end) :], end + len(piece)
            if end < self._size:
                self._ahead([self._part(end, 0)])
        self._first, self._data = first, kept

    def _piece(self, first: int, count: int) -> bytes:
        return self._read(self._part(first, count))

    def _part(self, first: int, count: int) -> FilePart:
        return FilePart(self._shard, first, min(max(count, self._at_once), self._size - first))
