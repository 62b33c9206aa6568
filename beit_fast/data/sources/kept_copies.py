"""Copies of whole files on a local disk, bounded in size, for several processes at once.

    CACHE/copies/<name>        a copy, followed by its SHA-256
    CACHE/copies/.<name>.tmp   one in the making, held locked by who makes it
    CACHE/copies/.lock         held while space is given out

A copy is checked against its digest when a process takes it, once, and locked (shared) as long as
it is in use: what is in use is not evicted, and a lock ends with its process. What a killed process
left in the making is begun anew or, where space is wanted, removed.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from beit_fast.data.sources.storage import FileState

logger = logging.getLogger("beit_fast.data")

_DIGEST_BYTES = 32
_BLOCK = 2**22


class BusyError(Exception):
    """Another process makes this copy."""


class NoRoomError(Exception):
    """The rest of the cache is in use, or the file larger than all of it."""


class Copy:
    """An open file whose first `num_there` bytes are there. Closed with the last reference, so
    nobody who reads loses it."""

    def __init__(self, descriptor: int, num_there: int = 0) -> None:
        self._descriptor, self.num_there = descriptor, num_there

    def read(self, first: int, count: int) -> bytes:
        """Those bytes; none if they are not there yet."""
        if first + count > self.num_there:
            return b""
        return os.pread(self._descriptor, count, first)

    def __del__(self) -> None:
        os.close(self._descriptor)


class KeptCopies:
    """Those in `folder` (made if it is not there), of at most `most_bytes` in all.

    All raise OSError where the disk fails.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder / "copies", most_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._space():  # that it can be written is known now
            pass

    def take(self, url: str, state: FileState) -> Copy | None:
        """The copy of a file in this state, if there is a whole one; a damaged one is removed."""
        path = self._path(url, state)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        copy = Copy(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # it is being evicted
            return None
        if not _is_whole(descriptor, state.size):
            logger.warning("the copy of %s at %s is damaged: it is made anew", url, path)
            path.unlink(missing_ok=True)
            return None
        os.utime(descriptor)  # the one taken longest ago is evicted first
        copy.num_there = state.size
        return copy

    def make(self, url: str, state: FileState, blocks: Iterable[bytes]) -> Iterator[Copy]:
        """The copy that `blocks` are, again and again as it grows, at last whole.

        Raises BusyError and NoRoomError before the first block is asked for.
        """
        path = self._path(url, state)
        making = path.with_name(f".{path.name}.tmp")
        descriptor = self._begin(making, path, state.size + _DIGEST_BYTES)
        copy, digest = Copy(descriptor), hashlib.sha256()
        try:
            yield copy
            for block in blocks:
                digest.update(block)
                _write(descriptor, block, copy.num_there)
                copy.num_there += len(block)
                yield copy
            if copy.num_there != state.size:
                raise OSError(errno.EIO, f"{copy.num_there} of {state.size} bytes came", url)
            _write(descriptor, digest.digest(), state.size)
            with self._space():  # who counts would miss what is renamed meanwhile
                os.replace(making, path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # others may take it
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                making.unlink()
            raise

    def _begin(self, making: Path, path: Path, size: int) -> int:
        """A file of that size, empty, locked. Its space counts from now on."""
        if size > self._most_bytes:
            raise NoRoomError
        with self._space():
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(making, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():  # whole since
                    making.unlink(missing_ok=True)
                    raise BusyError
                os.ftruncate(descriptor, 0)
                if not self._make_room(size):
                    making.unlink(missing_ok=True)
                    raise NoRoomError
                os.ftruncate(descriptor, size)
            except BlockingIOError:
                os.close(descriptor)
                raise BusyError from None
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes fit, oldest copies removed where they must be."""
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                # What is left in the making goes first: nobody will take it.
                found.append((entry.name[0] != ".", status.st_mtime_ns, status.st_size, entry.path))
        total = sum(taken for _, _, taken, _ in found)
        for _, _, taken, path in sorted(found):
            if total + size <= self._most_bytes:
                break
            if taken and self._remove(path):
                total -= taken
        return total + size <= self._most_bytes

    @staticmethod
    def _remove(path: str) -> bool:
        """Unless somebody uses it."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    @contextlib.contextmanager
    def _space(self) -> Iterator[None]:
        """Alone among processes and threads."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._folder / ".lock", flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, url: str, state: FileState) -> Path:
        said = f"{url}\0{state.size}\0{state.tag}"
        return self._folder / hashlib.sha256(said.encode()).hexdigest()[:40]


def _is_whole(descriptor: int, size: int) -> bool:
    """Whether its digest, at its end, is that of the rest."""
    if os.fstat(descriptor).st_size != size + _DIGEST_BYTES:
        return False
    digest = hashlib.sha256()
    for first in range(0, size, _BLOCK):
        digest.update(os.pread(descriptor, min(_BLOCK, size - first), first))
    return os.pread(descriptor, _DIGEST_BYTES, size) == digest.digest()


def _write(descriptor: int, block: bytes, first: int) -> None:
    done = 0
    while done < len(block):
        done += os.pwrite(descriptor, memoryview(block)[done:], first + done)
