"""Files under a place, read in part: a folder on disk, or a store behind a URL."""

import errno
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.places import is_url

MOST_OPEN = 4096  # files of a local storage at once: on a network disk opening one is a round trip


class FileState(NamedTuple):
    size: int  # bytes
    tag: str  # another one where the content may have changed


class FilePart(NamedTuple):
    """Bytes first .. first + count - 1 of a file."""

    name: str
    first: int
    count: int


class Storage(Protocol):
    """Files by their names relative to a place. All methods may be called from several threads, and
    raise OSError, with an errno of `reading.PASSING` where the failure may pass."""

    place: str  # to show, as `os.path.join` begins the name of a file; no credentials in it

    def names(self) -> list[str]:
        """Of the files in the place, sorted; a store has no folders, so its are at any depth."""
        ...

    def state(self, name: str) -> FileState: ...

    def read(self, part: FilePart) -> bytes:
        """Exactly those bytes; fewer are an OSError."""
        ...

    def ahead(self, parts: Sequence[FilePart]) -> None:
        """They will be read soon: a storage that is far away asks for them together, and `read`
        then waits for its own. What is never read is forgotten. Raises nothing."""
        ...

    def windowed(self, num_files: int) -> None:
        """From now on files are read a window of so many at a time: no more need be open, or kept,
        and of those a store copies the whole."""
        ...

    def files_ahead(self, names: Sequence[str]) -> None:
        """The files of the next window. As `ahead`."""
        ...

    def close(self) -> None:
        """Let go of connections, files and whatever was asked for ahead. Waits for nothing."""
        ...


class LocalStorage:
    """Files of a folder. At most `most_open` are open at a time, those read last; None: a quarter
    of what the process may have open."""

    def __init__(self, folder: str | Path, *, most_open: int | None = None) -> None:
        self.place = str(folder)
        self._most_open = _most_open() if most_open is None else most_open
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Also links that lead to nothing: what they should lead to would be missing unsaid."""
        with os.scandir(self.place) as entries:
            return sorted(entry.name for entry in entries if _is_file_or_lost(entry))

    def state(self, name: str) -> FileState:
        status = os.stat(os.path.join(self.place, name))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no file", os.path.join(self.place, name))
        return FileState(status.st_size, str(status.st_mtime_ns))

    def read(self, part: FilePart) -> bytes:
        file = self._take(part.name)
        try:
            data = os.pread(file.descriptor, part.count, part.first)
        finally:
            self._give_back(file)
        if len(data) < part.count:
            said = f"{len(data)} of {part.count} bytes from {part.first} on came"
            raise OSError(errno.EIO, said, os.path.join(self.place, part.name))
        return data

    def ahead(self, parts: Sequence[FilePart]) -> None:
        """A disk is near."""

    def windowed(self, num_files: int) -> None:
        with self._lock:
            self._most_open = num_files
            self._close_oldest()

    def files_ahead(self, names: Sequence[str]) -> None:
        """A disk is near."""

    def close(self) -> None:
        with self._lock:
            files, self._open = self._open.values(), OrderedDict()
            for file in files:
                self._drop(file)

    def _take(self, name: str) -> "_OpenFile":
        with self._lock:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
                file.num_readers += 1
                return file
        path = os.path.join(self.place, name)  # may hang: not under the lock
        file = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        with self._lock:
            other = self._open.get(name)
            if other is not None:  # another thread was faster
                os.close(file.descriptor)
                file = other
            self._open[name] = file
            file.num_readers += 1
            self._close_oldest()
        return file

    def _give_back(self, file: "_OpenFile") -> None:
        with self._lock:
            file.num_readers -= 1
            if file.is_dropped and not file.num_readers:
                os.close(file.descriptor)

    def _close_oldest(self) -> None:
        while len(self._open) > self._most_open:
            self._drop(self._open.popitem(last=False)[1])

    def _drop(self, file: "_OpenFile") -> None:
        """Closed when nobody reads it any more."""
        file.is_dropped = True
        if not file.num_readers:
            os.close(file.descriptor)


def _is_file_or_lost(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError as error:
        if error.errno != errno.ELOOP:  # links in a circle lead to nothing too
            raise
        return True


def _most_open() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if limit == resource.RLIM_INFINITY else min(MOST_OPEN, limit // 4)


class _OpenFile:
    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.num_readers, self.is_dropped = descriptor, 0, False


def open_storage(root: str, reads: ReadConfig = READS) -> Storage:
    """The storage of a folder, or of the prefix that a URL names."""
    if is_url(root):
        from beit_fast.data.sources.shard_cache import CachedStorage  # which needs this file

        return CachedStorage(root, reads=reads)
    return LocalStorage(root)
