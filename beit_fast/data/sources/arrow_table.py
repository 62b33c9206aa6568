"""A file of Arrow record batches: where in it the bytes of each image lie, so each is one read."""

import itertools
import os
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import MAX_FILE_BYTES
from beit_fast.data.sources.storage import FilePart, Storage
from beit_fast.data.sources.table_columns import (
    NO_CLASS,
    Columns,
    columns_of,
    import_pyarrow,
    refuse,
)
from beit_fast.files import damage

if TYPE_CHECKING:
    import pyarrow

_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream


class ArrowTable:
    """The images of one file, a stream or an IPC file, each batch being a shard.

    It is used up to where it is damaged, see `damage`. Raises DamagedTableError where it has no
    whole batch, ValueError where it is compressed, has no images, or the disk does not give it.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.name, self._storage = name, storage
        self.damage, self.shard_sizes = "", []
        self._firsts, self._sizes, self._labels = [], [], []
        path = os.path.join(storage.place, name)
        pa = import_pyarrow()
        try:
            # Mapped only here: a file that shrinks while it is mapped kills who reads it.
            with pa.memory_map(path) as file:
                whole = file.read_buffer(file.size())
                self.columns = self._index(pa, whole, path)
        except (OSError, pa.ArrowException) as error:
            refuse(path, error)
        self.first, self.length = _joined(self._firsts), _joined(self._sizes)
        self.starts = [0, *itertools.accumulate(self.shard_sizes)]

    def read(self, shard: int, row: int) -> bytes:
        number = self.starts[shard] + row
        length = int(self.length[number])
        if length < 0:
            raise BadImageError("its row has no bytes: only tables that hold the images are read")
        if length > MAX_FILE_BYTES:
            raise BadImageError(f"it has {length} bytes, more than {MAX_FILE_BYTES}")
        if not length:
            return b""
        return self._storage.read(FilePart(self.name, int(self.first[number]), length))

    def size(self, shard: int, row: int) -> int:
        return max(0, int(self.length[self.starts[shard] + row]))

    def sizes(self) -> np.ndarray:
        """Of all images, int64."""
        return self.length.astype("<i8")

    def labels(self) -> np.ndarray:
        """Classes int64 (n,)."""
        return _joined(self._labels)

    def _index(self, pa: ModuleType, whole: "pyarrow.Buffer", path: str) -> Columns:
        source = pa.BufferReader(whole)
        if whole[:6].to_pybytes() == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = batches = pa.ipc.open_stream(source)
            if whole[-len(_END) :].to_pybytes() != _END:
                self.damage = "it has no end"
        columns = columns_of(reader.schema, path)
        try:
            for batch in batches:
                self._add(batch, columns, whole, path)
        except (OSError, pa.ArrowException) as error:
            if not self.shard_sizes:
                raise
            self.damage = damage(error)
        return columns

    def _add(
        self, batch: "pyarrow.RecordBatch", columns: Columns, whole: "pyarrow.Buffer", path: str
    ) -> None:
        batch.validate()
        content = batch.column(columns.image).flatten()[_place_of_bytes(batch, columns)]
        _, offsets, data = content.buffers()
        wide = np.int64 if str(content.type).startswith("large") else np.int32
        offsets = np.frombuffer(offsets, wide) if offsets is not None else np.zeros(1, wide)
        offsets = offsets[content.offset : content.offset + len(content) + 1].astype(np.int64)
        at = data.address - whole.address if data else 0  # one of no bytes lies anywhere
        num_bytes = 0 if data is None else data.size
        if not 0 <= at <= whole.size - num_bytes:
            raise ValueError(
                f"{path} is compressed, and every image would be unpacked with all of its batch: "
                "write it without compression, or as Parquet"
            )
        sizes = np.diff(offsets)
        if len(sizes) and (sizes.min() < 0 or offsets[0] < 0 or offsets[-1] > num_bytes):
            raise OSError("a batch of it has images outside of itself")
        self._firsts.append(offsets[:-1] + at)
        self._sizes.append(np.where(content.is_null(), -1, sizes))
        self.shard_sizes.append(len(content))
        if columns.label:
            labels = batch.column(columns.label).fill_null(NO_CLASS)
            self._labels.append(np.asarray(labels).astype(np.int64))


def _place_of_bytes(batch: "pyarrow.RecordBatch", columns: Columns) -> int:
    kind = batch.schema.field(columns.image).type
    return next(i for i, field in enumerate(kind) if field.name == "bytes")


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
