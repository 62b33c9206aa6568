"""Storage of a URL that keeps copies of whole files on disk, where files are read by windows.

Read in any order, shards are read piece by piece and nothing is copied: each image is one request.
Read a window at a time, every shard of the next window is copied while this one is read, one at a
time, in requests of some megabytes. What is not there yet is read from the store.
"""

import collections
import errno
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from beit_fast.data.sources.kept import user_cache
from beit_fast.data.sources.kept_copies import BusyError, Copy, KeptCopies, NoRoomError
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.remote import RemoteStorage
from beit_fast.data.sources.storage import FilePart, FileState
from beit_fast.flags import flag

logger = logging.getLogger("beit_fast.data")

_BLOCK = 2**22  # bytes of a request; a slow line gets it within the time of one
_BLOCKS_AHEAD = 8
_POLL = 0.2  # seconds until a copy that another process makes is looked for again


class CachedStorage(RemoteStorage):
    """As `RemoteStorage`, with copies in the folder that `reads` names.

    Several processes share the folder: each copies what no other does. Where a copy finds no room,
    or the disk fails, its file is read from the store, which the log "beit_fast.data" says once.
    """

    def __init__(self, url: str, *, reads: ReadConfig = READS) -> None:
        super().__init__(url, reads=reads)
        self._kept: KeptCopies | None = None
        self._copies: collections.OrderedDict[str, Copy | None] = collections.OrderedDict()
        self._wanted: collections.deque[str] = collections.deque()
        self._num_held = 0
        self._condition = threading.Condition()
        self._is_closed = self._is_told = False
        self._cache_flag = flag("data.cache"), flag("data.cache_size")  # a thread names them

    def windowed(self, num_files: int) -> None:
        """Raises ValueError where the folder that the setting names cannot be written; where the
        user's own cannot, the log says so and nothing is kept."""
        self._num_held = 2 * num_files  # this window and the next
        if self._kept is not None:
            return
        folder = self._reads.cache or "the user's cache folder"
        try:
            folder = Path(self._reads.cache) if self._reads.cache else user_cache()
            self._kept = KeptCopies(folder, int(self._reads.cache_size * 2**30))
        except OSError as error:
            said = f"{folder} cannot be written ({error.strerror})"
            if self._reads.cache:
                raise ValueError(
                    f"{self._cache_flag[0]} {said}: give a folder that can be"
                ) from error
            self._tell(f"{said}: pass {self._cache_flag[0]} with a folder that can be")
            return
        threading.Thread(target=self._copy, name="beit_fast copies", daemon=True).start()

    def files_ahead(self, names: Sequence[str]) -> None:
        if self._kept is None:
            return
        with self._condition:
            for name in names:
                if name not in self._copies:
                    self._copies[name] = None
                    self._wanted.append(name)
                self._copies.move_to_end(name)
            while len(self._copies) > max(self._num_held, len(names)):
                self._copies.popitem(last=False)
            self._condition.notify()

    def read(self, part: FilePart) -> bytes:
        copy = self._copies.get(part.name)
        if copy is None or part.count < 0:
            return super().read(part)
        data = copy.read(part.first, part.count)
        return data if len(data) == part.count else super().read(part)

    def ahead(self, parts: Sequence[FilePart]) -> None:
        super().ahead([part for part in parts if not self._has(part)])

    def close(self) -> None:
        with self._condition:
            self._is_closed = True
            self._wanted.clear()
            self._copies.clear()
            self._condition.notify()
        super().close()

    def _has(self, part: FilePart) -> bool:
        copy = self._copies.get(part.name)
        return copy is not None and 0 <= part.count <= copy.num_there - part.first

    def _copy(self) -> None:
        """In a thread of its own: the copies that are wanted, those first that nobody makes."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._wanted or self._is_closed)
                if self._is_closed:
                    return
                name = self._wanted.popleft()
                if name not in self._copies:  # its window is over
                    continue
            try:
                self._copy_one(name)
            except BusyError:
                with self._condition:
                    self._wanted.append(name)
                    others = len(self._wanted) > 1
                time.sleep(_POLL / 10 if others else _POLL)
            except NoRoomError:
                self._tell(
                    f"no room for {self.place}/{name} in the cache, of which "
                    f"{self._reads.cache_size:g} GiB may be used and others may be using them: "
                    f"raise {self._cache_flag[1]}"
                )
            except OSError as error:
                self._drop(name)
                self._tell(f"{self.place}/{name} could not be copied ({error.strerror})")

    def _copy_one(self, name: str) -> None:
        state, url = self.state(name), f"{self.place}/{name}"
        copy = self._kept.take(url, state)
        if copy is None:
            with closing(self._kept.make(url, state, self._blocks(name, state))) as growing:
                for copy in growing:
                    if not self._hold(name, copy):
                        return
        self._hold(name, copy)

    def _hold(self, name: str, copy: Copy) -> bool:
        """Read from it, from now on; False where nobody will."""
        with self._condition:
            if self._is_closed or name not in self._copies:
                return False
            self._copies[name] = copy
            return True

    def _drop(self, name: str) -> None:
        with self._condition:
            if name in self._copies:
                self._copies[name] = None

    def _blocks(self, name: str, state: FileState) -> Iterator[bytes]:
        starts = range(0, state.size, _BLOCK)
        parts = [FilePart(name, first, min(_BLOCK, state.size - first)) for first in starts]
        for number, part in enumerate(parts):
            RemoteStorage.ahead(self, parts[number : number + _BLOCKS_AHEAD])
            yield self.patiently(lambda part=part: RemoteStorage.read(self, part))
        if self.state(name) != state:
            raise OSError(errno.ESTALE, "it changed while it was copied")

    def _tell(self, why: str) -> None:
        if not self._is_told:
            logger.warning("%s; such shards are read from the store piece by piece", why)
            self._is_told = True
