"""Where the indices of shards are kept, and which process makes one: a lock on a byte of a file."""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import threading
import zlib
from pathlib import Path

from beit_fast.data.sources.kept import HIDDEN, kept_folder
from beit_fast.data.sources.storage import FileState
from beit_fast.data.sources.tar_index import ShardIndex, from_bytes, to_bytes
from beit_fast.files import describe, open_no_link, replace_file
from beit_fast.flags import flag

logger = logging.getLogger("beit_fast.data")

_LOCK = "lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_MOST_BESIDE = 2**16  # bytes of an index besides those of names and headers, which its shard has


class Keeping:
    """Indices of the shards of one place: beside shards on disk in a hidden folder, those of a
    store, and of a folder that cannot be written to, in the user's cache folder; with `cache` all
    are below that.

    Where neither can be written the log "beit_fast.data" says so, and nothing is kept.
    """

    def __init__(self, place: str, cache: str, *, is_far: bool) -> None:
        own = place if is_far else os.path.realpath(place)
        self._folders = [] if cache or is_far else [Path(place, HIDDEN)]
        self._failed: OSError | None = None
        try:
            self._folders.append(kept_folder(own, cache, "indices"))
        except OSError as error:
            self._failed = error
        self._cache = cache
        self._folder: Path | None = None
        self._lock: int | None = None
        self._warning = threading.Lock()
        self._flag = f"{flag('data.cache')} (or --cache where that is the flag)"  # a thread says it

    def load(self, shard: str, state: FileState) -> ShardIndex | None:
        """None where none is kept, or not of the shard as it is."""
        for folder in self._folders:
            data = _read(folder / _name(shard), state.size + _MOST_BESIDE)
            index = None if data is None else from_bytes(data, shard, state)
            if index is not None:
                return index
        return None

    def forget(self, shard: str, state: FileState) -> str:
        """Remove the index of a shard that is not as its state says. Returns the path of one that
        cannot be removed, else ""."""
        for folder in self._folders:
            path = folder / _name(shard)
            data = _read(path, state.size + _MOST_BESIDE)
            if data is None or from_bytes(data, shard, state) is None:
                continue  # of another state: whoever opens the shard sees that
            try:
                path.unlink(missing_ok=True)
            except OSError:
                return str(path)
        return ""

    def open(self) -> None:
        """From now on indices are made. Raises ValueError where the folder that the setting names
        cannot be written."""
        for folder in self._folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = open_no_link(folder / _LOCK, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                self._failed = error
            else:
                self._folder = folder
                return
        if self._cache:
            why = self._failed.strerror or self._failed
            raise ValueError(
                f"{self._flag} {self._cache} cannot be written ({why}): give a folder that can be"
            )
        self._warn()

    def take(self, shard: str) -> bool:
        """Whether this process is to make the index; what has no locks lets all of them make it."""
        if self._lock is None:
            return True
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(shard))
        except OSError as error:
            return error.errno not in _TAKEN
        return True

    def give_back(self, shard: str) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _place(shard))

    def keep(self, index: ShardIndex) -> None:
        folder, data = self._folder, to_bytes(index)
        if folder is None:
            return
        try:
            replace_file(folder / _name(index.shard), lambda file: file.write(data))
        except OSError as error:
            with self._warning:
                if self._folder is not None:
                    self._folder, self._failed = None, error
                    self._warn()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _warn(self) -> None:
        logger.warning(
            "the indices of the shards cannot be kept (%s), and are made anew by every command: "
            "make room, or pass %s with a folder that can be written",
            *(describe(self._failed), self._flag),
        )


def _name(shard: str) -> str:
    """Of an index: a store's shards may lie at any depth, and names may be as long as can be."""
    digest = hashlib.sha256(os.fsencode(shard)).hexdigest()[:16]
    return f"{os.path.basename(shard)[:100]}-{digest}.index"


def _place(shard: str) -> int:
    return zlib.crc32(os.fsencode(shard)) >> 1


def _read(path: Path, most: int) -> bytes | None:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                return None
            return file.read(most)
    except OSError:
        return None


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write into a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)
