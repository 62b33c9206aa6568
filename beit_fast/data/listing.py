"""Which images a data set has: a list of their names, and of some sizes, that a run keeps.

    <digest>.txt.gz    {"count": 3, "sizes": [[0, 71234], [1, null], [2, 80021]]}\\n
                       a/x.jpg\\0a/y.jpg\\0b/x.jpg

Where a source has shards, "shards" says how many images each has: an order may depend on it.

Names are relative to the source, so a folder may lie elsewhere; in the order of the data set. Sizes
are those of 1,024 images spread evenly, null where one cannot be had: asking a network disk for 14
million takes hours. The digest is the SHA-256 of the content, so a list is found and checked by it.
"""

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from beit_fast.data.sources.folder import SIZES_IN_DIGEST, Source, keys_of, shard_sizes_of
from beit_fast.files import damage, flush_folder, replace_file

SHOWN = 3  # names in a message
_AT_ONCE = 4096  # names in one piece of the content
_PIECE = 1 << 20  # bytes of the content that are read at once
_LONGEST_NAME = 4096  # bytes, as file systems allow: a list that unfolds to more is none


class ListingError(ValueError):
    """A list of images that is gone or damaged."""


@dataclass(frozen=True)
class Difference:
    """From one list to another: all by number, some by name."""

    was: int  # images
    now: int
    num_added: int
    added: Sequence[str]
    num_gone: int
    gone: Sequence[str]
    changed: Sequence[str]  # of another size
    num_compared: int  # sizes
    numbers: np.ndarray  # int64 (was,): in the list of now, -1 for what is gone
    shards_were: list[int] | None = None  # images of each
    are_shards_others: bool = False

    def __bool__(self) -> bool:
        others = self.is_reordered or self.are_shards_others
        return bool(self.num_added or self.num_gone or self.changed or others)

    @property
    def is_reordered(self) -> bool:
        return bool((np.diff(self.numbers[self.numbers >= 0]) < 0).any())

    @property
    def is_repair(self) -> bool:
        """Whether unusable images may have been removed or repaired, and no more was done: at most
        ten, or one in a hundred."""
        few = (self.num_gone <= max(10, self.was // 100)) and (
            len(self.changed) <= max(10, self.num_compared // 100)
        )
        return few and not self.num_added and not self.is_reordered

    def __str__(self) -> str:
        """ "3 images were added (a, b, c), 2 are gone (d, e)"."""
        said = [
            _counted(self.num_added, "was added", "were added", self.added),
            _counted(self.num_gone, "is gone", "are gone", self.gone),
            _counted(len(self.changed), "has another size", "have another size", self.changed),
        ]
        others = "other shards" if self.are_shards_others else "another order"
        return ", ".join(filter(None, said)) or f"they are in {others}"


@dataclass(frozen=True)
class Listing:
    """names: in the order of the data set. sizes: number of the image -> bytes. shards: images of
    each, where there are any."""

    names: Sequence[str]
    sizes: dict[int, int | None]
    shards: list[int] | None = None

    @classmethod
    def of(cls, source: Source) -> "Listing":
        count = len(source)
        some = min(SIZES_IN_DIGEST, count)
        numbers = [number * count // some for number in range(some)]
        shards = shard_sizes_of(source)
        return cls(
            keys_of(source),
            {n: _size(source, n) for n in numbers},
            None if shards is None else [int(size) for size in shards],
        )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for piece in self._content():
            digest.update(piece)
        return digest.hexdigest()

    def keep(self, folder: Path) -> None:
        """Write the list into `folder`, unless it is there. Raises OSError with the path."""
        path = path_of(folder, self.digest)
        if path.exists():
            return

        def write(file: BinaryIO) -> None:
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
                for piece in self._content():
                    packed.write(piece)

        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
        flush_folder(folder)

    @classmethod
    def kept(cls, folder: Path, digest: str, count: int) -> "Listing":
        """The list of `count` images that was kept. Raises ListingError where it is no more."""
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ListingError(f"{digest[:80]!r} is no digest of a list")
        path = path_of(folder, digest)
        try:
            with gzip.open(path, "rb") as file:
                content = _read(file, limit := (count + 1) * (_LONGEST_NAME + 1))
            if hashlib.sha256(content).hexdigest() != digest or len(content) == limit:
                raise ListingError(f"{path} is damaged: its SHA-256 is not the one it is named by")
            header, _, names = content.partition(b"\n")
            said = json.loads(header)
            listing = cls(
                os.fsdecode(names).split("\0"),
                {int(number): size for number, size in said["sizes"]},
                said.get("shards"),
            )
            shards = [count] if listing.shards is None else listing.shards
            if sum(shards) != count or min(shards, default=0) < 0:
                raise ListingError(f"{path} is damaged: its shards are not of {count} images")
            if len(listing) != count or not all(0 <= number < count for number in listing.sizes):
                raise ListingError(f"{path} has {len(listing)} images, and {count} were wanted")
            return listing
        except FileNotFoundError as error:
            raise ListingError(f"{path} is missing") from error
        except ListingError:
            raise
        except (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ListingError(f"{path} is damaged: {damage(error)}") from error

    def difference(self, source: Source, now: "Listing") -> Difference:
        """From this list to that of the source, `now`; sizes are looked at anew."""
        number = {name: place for place, name in enumerate(now.names)}
        found = (number.get(name, -1) for name in self.names)
        numbers = np.fromiter(found, np.int64, len(self))
        gone = np.flatnonzero(numbers < 0)
        added = np.ones(len(now), bool)
        added[numbers[numbers >= 0]] = False
        added = np.flatnonzero(added)
        pairs = [
            (place, was, _size(source, int(numbers[place])))
            for place, was in self.sizes.items()
            if was is not None and numbers[place] >= 0
        ]
        known = [(place, was, size) for place, was, size in pairs if size is not None]
        return Difference(
            was=len(self),
            now=len(now),
            num_added=len(added),
            added=[now.names[number] for number in added[: SHOWN + 1]],
            num_gone=len(gone),
            gone=[self.names[place] for place in gone[: SHOWN + 1]],
            changed=[self.names[place] for place, was, size in known if was != size],
            num_compared=len(known),
            numbers=numbers,
            shards_were=self.shards,
            are_shards_others=self.shards != now.shards,
        )

    def _content(self) -> Iterator[bytes]:
        header = {"count": len(self), "sizes": [list(pair) for pair in self.sizes.items()]}
        if self.shards is not None:
            header["shards"] = self.shards
        yield json.dumps(header).encode() + b"\n"
        for first in range(0, len(self), _AT_ONCE):
            piece = "\0".join(self.names[first : first + _AT_ONCE])
            yield os.fsencode(f"\0{piece}" if first else piece)


def path_of(folder: Path, digest: str) -> Path:
    """Where the list of that digest is kept."""
    return folder / f"{digest}.txt.gz"


def _read(file: BinaryIO, limit: int) -> bytes:
    """At most so many bytes. In pieces: a read takes memory for all that it is asked for, here
    for millions of names as long as names can be."""
    content = bytearray()
    while len(content) < limit and (piece := file.read(min(_PIECE, limit - len(content)))):
        content += piece
    return bytes(content)


def _size(source: Source, number: int) -> int | None:
    try:
        return source.size(number)
    except OSError:
        return None


def _counted(count: int, one: str, many: str, names: Sequence[str]) -> str:
    if not count:
        return ""
    shown = ", ".join([*names[:SHOWN], *(["..."] if count > SHOWN else [])])
    # Names may be of any bytes, and are said on one line.
    shown = shown.encode(errors="backslashreplace").decode().replace("\n", "\\n")
    return f"{count} image{'s' * (count != 1)} {one if count == 1 else many} ({shown})"
