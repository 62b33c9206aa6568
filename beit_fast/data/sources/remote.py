"""Storage behind a URL: the objects below a prefix, or the files of a web server."""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from beit_fast.data.sources.folder import MAX_FILE_BYTES
from beit_fast.data.sources.in_flight import InFlight
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.reading import PASSING
from beit_fast.data.sources.storage import FilePart, FileState
from beit_fast.data.sources.store_clients import Client, Listed, open_client

Result = TypeVar("Result")
WHOLE = -1  # the count of a part that is all of a file, however large
_STATES = 64  # asked for at once
_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds before a request is tried again


class RemoteStorage:
    """`Storage` of a URL that has no credentials in it: the client finds them in its environment.

    Nothing is kept on disk. Reads that fail are left to who reads; all else is tried again as
    often as `reads` says.

    Raises ValueError as `open_client` does.
    """

    def __init__(self, url: str, *, reads: ReadConfig = READS, client: Client | None = None):
        self.place, self._reads = url.rstrip("/"), reads
        self._client = client or open_client(self.place, reads)
        self._in_flight = InFlight(self._fetch, reads.read_timeout)

    def names(self) -> list[str]:
        return sorted(listed.name for page in self.listed() for listed in page)

    def listed(self) -> Iterator[list[Listed]]:
        """What there is, with sizes. Raises OSError (EOPNOTSUPP) for a web server."""
        return iter(self.patiently(lambda: list(self._client.listed())))

    def state(self, name: str) -> FileState:
        listed = self.patiently(lambda: self._client.state(name))
        return FileState(listed.size, listed.tag)

    def states(self, names: Sequence[str]) -> list[FileState]:
        """Asked for together."""
        with ThreadPoolExecutor(_STATES, thread_name_prefix="beit_fast state") as pool:
            return list(pool.map(self.state, names))

    def read(self, part: FilePart) -> bytes:
        data = self._in_flight.take(part)
        if part.count not in (WHOLE, len(data)):
            said = f"{len(data)} of {part.count} bytes from {part.first} on came"
            raise OSError(errno.EIO, said, os.path.join(self.place, part.name))
        return data

    def read_whole(self, name: str, most: int) -> bytes:
        """All of a file of at most so many bytes; OSError (EFBIG) for a larger one."""
        return self.patiently(lambda: self._client.read(name, 0, WHOLE, most))

    def ahead(self, parts: Sequence[FilePart]) -> None:
        self._in_flight.ask(parts)

    def windowed(self, num_files: int) -> None:
        """Nothing is kept here."""

    def files_ahead(self, names: Sequence[str]) -> None:
        """Nothing is kept here."""

    def close(self) -> None:
        self._in_flight.close()

    def patiently(self, call: Callable[[], Result]) -> Result:
        """What it gives, tried again after failures that may pass."""
        pause = _PAUSE
        for _ in range(self._reads.read_retries):
            try:
                return call()
            except OSError as error:
                if error.errno not in PASSING:
                    raise
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(10 * pause, _LONGEST_PAUSE)
        return call()

    def _fetch(self, part: FilePart) -> bytes:
        return self._client.read(part.name, part.first, part.count, MAX_FILE_BYTES)
