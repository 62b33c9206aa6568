"""Images in Parquet and Arrow tables, as Hugging Face datasets keep them on disk.

    data/train-00000-of-00002.parquet    row groups: each is read whole, parquet_table.py
    data-00000-of-00002.arrow            record batches: an image is one read, arrow_table.py

Row groups and batches are the shards. Paths that rows have beside the bytes, or instead of them,
are never opened.
"""

import bisect
import hashlib
import itertools
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.sources.arrow_table import ArrowTable
from beit_fast.data.sources.folder import ImageSource
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.parquet_table import ParquetTable, RowGroups
from beit_fast.data.sources.places import TABLES, is_url, matching, split_place
from beit_fast.data.sources.scan import counted
from beit_fast.data.sources.storage import LocalStorage
from beit_fast.data.sources.table_columns import NO_CLASS, DamagedTableError
from beit_fast.data.sources.tar_sets import parts_of, pattern_of
from beit_fast.files import describe


class TableImages(ImageSource):
    """All images of the tables that `path` names, in the order of the files' names and of their
    rows. `path` is a folder of tables, a file, or a pattern of names.

    A file that cannot be read, or not to its end, is in `damage`, and the rest is used.

    Raises ValueError for a place that is not there or has no tables, a URL, tables without images,
    and where no image is left.
    """

    shard_sizes: Sequence[int]  # images of each row group or batch, in the order of their numbers
    damage: dict[str, str]  # file -> what is wrong with it
    path: str  # to show

    def __init__(self, path: str, *, reads: ReadConfig = READS) -> None:
        if is_url(path):
            raise ValueError(
                f"{path} names tables in a store, and tables are read from disk alone: copy them "
                "to a disk and pass the folder there"
            )
        place = split_place(path)
        self.path, self._root = str(path), place.root
        self._storage, self._groups = LocalStorage(place.root), RowGroups()
        self.damage = {}
        files = _list_tables(place.root, place.pattern)
        self._tables = [table for name in files if (table := self._open(name)) is not None]
        self._check_alike()
        sizes = [table.shard_sizes for table in self._tables]
        self.shard_sizes = [*itertools.chain.from_iterable(sizes)]
        self._starts = [0, *itertools.accumulate(self.shard_sizes)]
        # Of a table the number of its first shard, by which a shard is found.
        self._first_shards = [0, *itertools.accumulate(map(len, sizes))][:-1]
        if not len(self):
            said = f" ({left})" if (left := self.left_out()) else ""
            raise ValueError(f"no images in {self.path}{said}: give tables that have rows")

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> bytes:
        table, shard, row = self._find(index)
        return table.read(shard, row)

    def name(self, index: int) -> str:
        return os.path.join(self._root, self.key(index))

    def key(self, index: int) -> str:
        table, shard, row = self._find(index)
        return f"{table.name}/{table.starts[shard] + row}"

    def size(self, index: int) -> int:
        """Of Parquet all bytes of the image's row group: those of one are not known."""
        table, shard, row = self._find(index)
        return table.size(shard, row)

    def digest(self) -> str:
        """SHA-256 of the names of the files, and the sizes of shards and of what `size` says."""
        digest = hashlib.sha256()
        for table in self._tables:
            shape = np.array(table.shard_sizes, "<i8").tobytes()
            digest.update(os.fsencode(table.name) + b"\0" + shape + table.sizes().tobytes())
        return digest.hexdigest()

    def windowed(self, window: int) -> None:
        """From now on only so many shards are read at a time."""
        self._groups.windowed(window)
        self._storage.windowed(window)

    def labelled(self, fewest: int) -> tuple[Tensor, list[str]]:
        """Class of each image int64 (n,), and the names of the classes, as the tables have them.

        Raises ValueError for tables without, an image that has none, tables of several parts of a
        data set, and fewer classes than `fewest`.
        """
        if parts := parts_of([table.name for table in self._tables], []):
            names = [table.name for table in self._tables]
            patterns = [
                os.path.join(self._root, pattern_of(part, group, names))
                for part, group in parts.items()
            ]
            raise ValueError(
                f"{self.path} has tables of {', '.join(filter(None, parts))}, which are parts of a "
                f"data set: pass one of them, {' or '.join(patterns)}"
            )
        columns = self._tables[0].columns
        if not columns.classes:
            raise ValueError(
                f"{self.path} does not say the classes of its images: give tables with one column "
                "of type ClassLabel, as Hugging Face datasets write them, with the names of all "
                "classes, and if there are several called label"
            )
        labels = np.concatenate([table.labels() for table in self._tables])
        if len(labels) != len(self):
            raise ValueError(f"{self.path} has {len(labels)} classes for {len(self)} images")
        wrong = np.flatnonzero((labels < 0) | (labels >= len(columns.classes)))
        if len(wrong):
            first = labels[wrong[0]]
            is_none = "no class" if first == NO_CLASS else f"class {first}"
            raise ValueError(
                f"{len(wrong)} of the {len(self)} images of {self.path} have none of its "
                f"{len(columns.classes)} classes, the first is {self.key(int(wrong[0]))} with "
                f"{is_none}: leave them out of the tables"
            )
        if len(found := np.unique(labels)) < fewest:
            raise ValueError(
                f"{self.path} has images of class {columns.classes[found[0]]} alone, and one class "
                f"teaches nothing: give tables with images of {fewest} classes or more"
            )
        return torch.from_numpy(labels), list(columns.classes)

    def left_out(self) -> str:
        damaged = [f"{name}: {why}" for name, why in self.damage.items()]
        return counted(len(damaged), "damaged table", "damaged tables", damaged)

    def _open(self, name: str) -> ArrowTable | ParquetTable | None:
        try:
            if name.lower().endswith(".arrow"):
                table = ArrowTable(self._storage, name)
            else:
                table = ParquetTable(self._root, name, self._groups)
        except DamagedTableError as error:
            self.damage[os.path.join(self._root, name)] = str(error)
            return None
        if table.damage:
            used = f"{sum(table.shard_sizes)} images before that are used"
            self.damage[os.path.join(self._root, name)] = f"{table.damage}; {used}"
        return table

    def _check_alike(self) -> None:
        """Raise ValueError where tables have other classes than the first."""
        for table in self._tables:
            if table.columns.classes != self._tables[0].columns.classes:
                names = f"{self._tables[0].name} and {table.name}"
                raise ValueError(
                    f"{names} in {self._root} have not the same classes: pass a pattern that "
                    "names tables of one data set alone"
                )

    def _find(self, index: int) -> tuple[ArrowTable | ParquetTable, int, int]:
        """(table, shard within it, row of the shard)."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        number = bisect.bisect_right(self._first_shards, shard) - 1
        return self._tables[number], shard - self._first_shards[number], index - self._starts[shard]


def _list_tables(root: str, pattern: str) -> list[str]:
    """Names of the tables in a folder that fit. Raises ValueError where there are none, or a name
    that braces stand for is not there."""
    try:
        names = [name for name in LocalStorage(root).names() if not name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{root} cannot be read ({describe(error)}): check the path") from error
    tables = [name for name in names if name.lower().endswith(TABLES)]
    if not pattern:
        found = tables
    elif pattern in tables:  # even if it has brackets
        found = [pattern]
    else:
        found = matching(tables, pattern)
    if missing := sorted({*found} - {*tables}):
        raise ValueError(
            f"{counted(len(missing), 'table is', 'tables are', missing)} not in {root}: check the "
            "numbers in braces"
        )
    if not found:
        there = f": there are {counted(len(tables), 'table', 'tables', tables)}" if tables else ""
        raise ValueError(
            f"no tables like {os.path.join(root, pattern or '*.parquet')}{there}: check the path"
        )
    return found
