"""A Parquet file of images. A row can only be had with its row group, so groups are kept a while.

Where a window of shards is read at a time, twice as many groups are kept as there are in one: the
threads that read ahead are in two at the border. Else as many are as threads need that read batches
in order, but no more than a gigabyte of them; read at random, an image then costs a whole group.
"""

import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import MAX_FILE_BYTES
from beit_fast.data.sources.reading import PASSING
from beit_fast.data.sources.table_columns import (
    NO_CLASS,
    DamagedTableError,
    columns_of,
    import_pyarrow,
    refuse,
)
from beit_fast.files import damage

if TYPE_CHECKING:
    import pyarrow

MAX_GROUP_BYTES = 2**31  # of the images of a row group: all are in memory
_KEPT, _KEPT_BYTES = 16, 2**30  # groups, and their images unpacked


class RowGroups:
    """The groups read last, for several threads: who wants one that another reads waits for it."""

    def __init__(self) -> None:
        self._most, self._most_bytes = _KEPT, float(_KEPT_BYTES)
        self._kept: OrderedDict[tuple[str, int], tuple[Future, int]] = OrderedDict()
        self._lock = threading.Lock()

    def windowed(self, window: int) -> None:
        self._most, self._most_bytes = 2 * window, math.inf

    def get(self, key: tuple[str, int], num_bytes: int, read: Callable[[], Any]) -> Any:
        """What `read` gives, of so many bytes, or raises; of what may pass it is asked again the
        next time."""
        with self._lock:
            is_mine = key not in self._kept
            found, _ = self._kept.setdefault(key, (Future(), num_bytes))
            self._kept.move_to_end(key)
            while is_mine and self._is_too_much():
                self._kept.popitem(last=False)
        if is_mine:
            try:
                found.set_result(read())
            except BaseException as error:
                if not isinstance(error, BadImageError):
                    with self._lock:
                        self._kept.pop(key, None)
                found.set_exception(error)
        return found.result()

    def _is_too_much(self) -> bool:
        """Of one group alone never."""
        num_bytes = sum(num_bytes for _, num_bytes in self._kept.values())
        most = len(self._kept) > self._most or num_bytes > self._most_bytes
        return most and len(self._kept) > 1


class ParquetTable:
    """The images of one file, each row group being a shard. Raises DamagedTableError where it is
    none, ValueError where it has no images or the disk does not give it."""

    damage = ""  # only the end of a file says what is in it

    def __init__(self, place: str, name: str, groups: RowGroups) -> None:
        self.name, self._path, self._groups = name, os.path.join(place, name), groups
        pa = import_pyarrow()
        try:
            with pa.parquet.ParquetFile(self._path) as file:
                self._metadata = file.metadata
                self.columns = columns_of(file.schema_arrow, self._path)
            num_bytes = os.path.getsize(self._path)
        except (OSError, pa.ArrowException) as error:
            refuse(self._path, error)
        numbers = range(self._metadata.num_row_groups)
        self.shard_sizes = [self._metadata.row_group(number).num_rows for number in numbers]
        if any(not 0 <= size <= num_bytes for size in self.shard_sizes):
            raise DamagedTableError("it says that it has more rows than bytes")
        self.starts = [0, *itertools.accumulate(self.shard_sizes)]
        # What is said of a column is not asked for: of a damaged one that would end the process.
        self._num_bytes = [self._metadata.row_group(number).total_byte_size for number in numbers]

    def read(self, shard: int, row: int) -> bytes:
        key, num_bytes = (self.name, shard), self._num_bytes[shard]
        images = self._groups.get(key, num_bytes, lambda: self._read_group(shard, num_bytes))
        if not row < len(images):
            raise BadImageError(f"its row group has {len(images)} rows and not the number it says")
        image = images[row]
        if not image.is_valid:
            raise BadImageError("its row has no bytes: only tables that hold the images are read")
        content = image.as_buffer()
        if content.size > MAX_FILE_BYTES:
            raise BadImageError(f"it has {content.size} bytes, more than {MAX_FILE_BYTES}")
        return content.to_pybytes()

    def size(self, shard: int, row: int) -> int:
        """Of the whole row group, before it was compressed."""
        return self._num_bytes[shard]

    def sizes(self) -> np.ndarray:
        """Of all row groups, int64."""
        return np.array([self.size(shard, 0) for shard in range(len(self.shard_sizes))], "<i8")

    def labels(self) -> np.ndarray:
        """Classes int64 (n,). Raises ValueError where they cannot be read."""
        pa = import_pyarrow()
        try:
            with pa.parquet.ParquetFile(self._path, metadata=self._metadata) as file:
                column = file.read([self.columns.label], use_threads=False).column(0)
            return column.fill_null(NO_CLASS).to_numpy().astype(np.int64)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{self._path}: its classes cannot be read ({damage(error)})"
            ) from error

    def _read_group(self, shard: int, num_bytes: int) -> "pyarrow.Array":
        if num_bytes > MAX_GROUP_BYTES:
            raise BadImageError(
                f"its row group has {num_bytes} bytes, more than {MAX_GROUP_BYTES}: write the "
                "table with smaller ones"
            )
        pa = import_pyarrow()
        wanted = f"{self.columns.image}.bytes"
        try:
            with pa.parquet.ParquetFile(
                self._path, metadata=self._metadata, page_checksum_verification=True
            ) as file:
                column = file.read_row_group(shard, [wanted], use_threads=False).column(0)
            return column.combine_chunks().flatten()[0]
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            raise BadImageError(f"its row group cannot be read ({damage(error)})") from error
