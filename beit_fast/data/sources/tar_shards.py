"""Images in tar shards, as webdataset lays them out: one ranged read an image.

    n01440764_10026.jpg    the image; several may have one key: 7.left.jpg and 7.right.jpg
    n01440764_10026.cls    its class, a number
    n01440764_10026.json   what there is to say of it; its "label" where there is no .cls

Nothing is extracted. Of other members none is opened, whatever they are called.
"""

import bisect
import hashlib
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import ImageSource
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.places import PACKED, TABLES, split_place
from beit_fast.data.sources.scan import counted
from beit_fast.data.sources.storage import FilePart, open_storage
from beit_fast.data.sources.tar_index import LEFT_OUT, NO_LABEL, ShardIndex
from beit_fast.data.sources.tar_indices import Progress, forget_index, shard_indices
from beit_fast.data.sources.tar_members import BLOCK
from beit_fast.data.sources.tar_sets import (
    list_files,
    list_shards,
    parts_of,
    pattern_of,
    read_class_names,
    read_splits,
)

_BESIDE = "archive or table beside the shards", "archives or tables beside the shards"
_MOST_CLASSES = 1_000_000  # that have numbers for names


class TarShards(ImageSource):
    """All images of the shards that `path` names, in the order of the shards' names and as they lie
    there. `path` is a folder of shards, one shard, or a pattern of names, also behind a URL.

    A shard that is cut or damaged is used up to there, and is in `damage`. The indices are made
    the first time (tar_indices.py); `progress` is told.

    Raises ValueError for a place that is not there or has no shards, a shard that is missing or
    cannot be read, and where no image is left.
    """

    damage: dict[str, str]  # shard -> what is wrong with it
    shard_sizes: Sequence[int]  # images of each shard, in the order of their numbers
    path: str  # to show

    def __init__(
        self, path: str, *, reads: ReadConfig = READS, progress: Progress | None = None
    ) -> None:
        place = split_place(path)
        self._storage, self._reads = open_storage(place.root, reads), reads
        self._changed: dict[str, str] = {}  # shard -> the index of it that cannot be removed, or ""
        self._files = list_files(self._storage, place)
        shards = list_shards(self._storage, place, self._files)
        where = self._storage.place
        self.path = os.path.join(where, place.pattern) if place.pattern else where
        self._beside = Counter[str]()  # endings of what was not named, and may be meant as well
        if not place.pattern:
            endings = (os.path.splitext(name)[1].lower() for name in self._files)
            self._beside.update(ending for ending in endings if ending in PACKED + TABLES)
        self._splits = read_splits(self._storage, self._files)
        self._is_listed = "{" in place.pattern or place.pattern in shards  # one by one
        self._indices = shard_indices(self._storage, shards, reads, progress)
        self.shard_sizes = [len(index) for index in self._indices]
        self._starts = [0, *itertools.accumulate(self.shard_sizes)]
        self.damage = dict(self._damaged())
        if not len(self):
            said = f" ({left})" if (left := self.left_out()) else ""
            raise ValueError(
                f"no images in {self.path}{said}: give shards with members like KEY.jpg; one that "
                "is compressed has to be unpacked to a .tar first"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> bytes:
        """Raises BadImageError also where a shard is no more what it was when it was indexed."""
        shard, number = self._find(index)
        data = self._storage.read(_part(shard, number))
        if zlib.crc32(memoryview(data)[:BLOCK]) != shard.check[number]:
            kept = self._changed.get(shard.shard)
            if kept is None:
                kept = self._changed[shard.shard] = forget_index(self._storage, shard, self._reads)
            raise BadImageError(
                "its shard was changed since it was indexed: "
                f"{f'remove {kept} and ' if kept else ''}start the command again, and it is "
                "indexed anew"
            )
        return data[BLOCK:]

    def name(self, index: int) -> str:
        return os.path.join(self._storage.place, self.key(index))

    def key(self, index: int) -> str:
        shard, number = self._find(index)
        return shard.keys(number, number + 1)[0]

    @property
    def keys(self) -> Sequence[str]:
        """Of all images, made when they are asked for."""
        return _Keys(self._indices, self._starts)

    def size(self, index: int) -> int:
        shard, number = self._find(index)
        return int(shard.size[number])

    def digest(self) -> str:
        """SHA-256 of all names and sizes."""
        digest = hashlib.sha256()
        for shard in self._indices:
            digest.update(os.fsencode(shard.shard) + b"\0" + shard.names + b"\0")
            digest.update(shard.size.tobytes())
        return digest.hexdigest()

    def ahead(self, indices: Sequence[int]) -> None:
        self._storage.ahead([_part(*self._find(index)) for index in indices])

    def windowed(self, window: int) -> None:
        """From now on only so many shards are read at a time."""
        self._storage.windowed(window)

    def shards_ahead(self, shards: Sequence[int]) -> None:
        """These will be read next."""
        self._storage.files_ahead([self._indices[shard].shard for shard in shards])

    def labelled(self, fewest: int) -> tuple[Tensor, list[str]]:
        """Class of each image int64 (n,), and the names of the classes: those of classes.txt or
        classes.json beside the shards, else their numbers.

        Raises ValueError for an image without a class, a class without a name, shards of several
        parts of a data set, and fewer classes than `fewest`.
        """
        shards = [index.shard for index in self._indices]
        if parts := parts_of(shards, self._splits):
            patterns = [
                os.path.join(self._storage.place, pattern_of(part, group, shards))
                for part, group in parts.items()
            ]
            raise ValueError(
                f"{self.path} has shards of {', '.join(filter(None, parts))}, which are parts of a "
                f"data set: pass one of them, {' or '.join(patterns)}"
            )
        labels = np.concatenate([index.label for index in self._indices]).astype(np.int64)
        without = np.flatnonzero(labels == NO_LABEL)
        if len(without):
            raise ValueError(
                f"{len(without)} of the {len(self)} images of {self.path} have no class, the first "
                f"is {self.key(int(without[0]))}: give each a KEY.cls with the number of its class "
                'beside it, from 0 on and nothing else, or a KEY.json with its "label"'
            )
        file, names = read_class_names(self._storage, self._files)
        found = np.unique(labels)
        if names and found[-1] >= len(names):
            raise ValueError(
                f"{file} names {len(names)} classes, and {self.path} has images of class "
                f"{found[-1]}: name all classes, from 0 on"
            )
        if not names:
            names = _numbers(self.path, found)
        if len(found) < fewest:
            raise ValueError(
                f"{self.path} has images of class {found[0]} alone, and one class teaches nothing: "
                f"give shards with images of {fewest} classes or more"
            )
        return torch.from_numpy(labels), names

    def left_out(self) -> str:
        """All that was not read, by kind; often ""."""
        left, endings = Counter[str](), Counter[str]()
        for index in self._indices:
            left.update(index.left)
            endings.update(index.endings)
        commonest = [f"{count} {ending}" for ending, count in endings.most_common()]
        parts = [counted(sum(endings.values()), "other file", "other files", commonest)]
        parts += [counted(left[kind], *called) for kind, called in LEFT_OUT.items()]
        parts.append(counted(sum(self._beside.values()), *_BESIDE, self._endings_beside()))
        said = [f"{text} left out"] if (text := ", ".join(filter(None, parts))) else []
        damaged = [f"{name}: {why}" for name, why in self.damage.items()]
        said.append(counted(len(damaged), "damaged shard", "damaged shards", damaged))
        said += [self._not_there(), self._parts_said()]
        return ", ".join(filter(None, said))

    def _endings_beside(self) -> list[str]:
        return [f"{count} {ending}" for ending, count in self._beside.most_common()]

    def _find(self, index: int) -> tuple[ShardIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._indices[shard], index - self._starts[shard]

    def _damaged(self) -> Iterator[tuple[str, str]]:
        lengths = {shard: n for split in self._splits for shard, n in split.lengths.items()}
        for index in self._indices:
            path = os.path.join(self._storage.place, index.shard)
            said = lengths.get(index.shard) or 0
            if index.damage:
                yield path, f"{index.damage}; {_images(len(index))} before that"
            elif len(index) < said:
                yield path, f"it has {_images(len(index))} of the {said} that it should"

    def _parts_said(self) -> str:
        parts = filter(None, parts_of([index.shard for index in self._indices], self._splits))
        said = ", ".join(parts)
        return f"all of {said} (pass the shards of one to read those alone)" if said else ""

    def _not_there(self) -> str:
        """Shards that `_info.json` names besides those of a folder, or of a pattern with stars."""
        if self._is_listed:
            return ""
        shards = {index.shard for index in self._indices}
        splits = (split.lengths.keys() for split in self._splits)
        missing = sorted(set().union(*(all_ for all_ in splits if all_ & shards)) - shards)
        return counted(len(missing), "shard is not there", "shards are not there", missing)


class _Keys(Sequence[str]):
    def __init__(self, indices: Sequence[ShardIndex], starts: Sequence[int]) -> None:
        self._indices, self._starts = indices, starts

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[str]:
        for index in self._indices:
            yield from index.keys(0, len(index))

    def __getitem__(self, wanted: int | slice) -> str | list[str]:
        if not isinstance(wanted, slice):
            number = range(len(self))[wanted]
            return self[number : number + 1][0]
        first, last, step = wanted.indices(len(self))
        if step != 1:
            return [self[number] for number in range(first, last, step)]
        keys: list[str] = []
        shard = bisect.bisect_right(self._starts, first) - 1
        while len(keys) < last - first:
            start = self._starts[shard]
            keys += self._indices[shard].keys(max(first - start, 0), last - start)
            shard += 1
        return keys


def _part(shard: ShardIndex, number: int) -> FilePart:
    """An image with the header before it."""
    first, size = int(shard.first[number]), int(shard.size[number])
    return FilePart(shard.shard, first - BLOCK, size + BLOCK)


def _numbers(path: str, found: np.ndarray) -> list[str]:
    count = int(found[-1]) + 1
    if count > _MOST_CLASSES:
        raise ValueError(
            f"{path} has an image of class {count - 1}, and at most {_MOST_CLASSES} are numbered "
            "from 0 on: number the classes anew"
        )
    return [str(number) for number in range(count)]


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
