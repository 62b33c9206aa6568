"""Shards on disk: each is there whole and checked, or not at all.

    NAME-0000.tar             shards
    classes.json              the names of the classes, in the order of their numbers
    _info.json                as timm reads it, with the SHA-256 of every shard; written at the end
    .pack/made_from.json      what the shards are made from
    .pack/NAME-0000.json      of a shard that was written and read again: its SHA-256 and so on

A shard is written under another name, read again, then gets its record, and its name last: a shard
without a record is somebody else's, and a record without a shard of a process that was killed.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beit_fast.files import damage, drop, file_digest, flush_folder, naming, replace_text
from beit_fast.train.log import FULL

RECORDS, MADE_FROM, INFO, CLASSES = ".pack", "made_from.json", "_info.json", "classes.json"
_END = 10240  # bytes that the size of a tar is a multiple of, as everybody pads them
_LEFT = re.compile(r"\..*\.[0-9a-f]{8}\.tmp")  # of a process that was killed


class PackError(ValueError):
    """The folder to write holds something else, or images cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A shard that was written and read again."""

    sha256: str
    num_bytes: int
    num_images: int
    num_resized: int
    left_out: dict[str, str]  # place in the order -> reason


@dataclass(frozen=True)
class Plan:
    """Which images lie in which shard, by their places in the order."""

    name: str
    num_images: int
    per_shard: int

    @property
    def names(self) -> list[str]:
        count = -(-self.num_images // self.per_shard)
        width = max(4, len(str(count - 1)))
        return [f"{self.name}-{number:0{width}d}.tar" for number in range(count)]

    def places(self, number: int) -> range:
        first = number * self.per_shard
        return range(first, min(self.num_images, first + self.per_shard))


class Folder:
    """The folder of the shards of `plan`, for whoever holds its lock."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan

    def begin(self, made_from: Mapping[str, Any]) -> dict[str, Record]:
        """Records of the shards that are there, unchecked. What a killed process left is removed.

        Raises PackError where the folder holds shards of other images or settings, or anything
        else; then nothing in it was changed.
        """
        records, path = self.path / RECORDS, self.path / RECORDS / MADE_FROM
        made_from = json.loads(json.dumps(made_from))
        if records.is_symlink():
            raise PackError(
                f"{records} is a link, and what it points at would be written to: remove it"
            )
        if not path.exists():
            refuse_used(self.path)
            records.mkdir(exist_ok=True)
            replace_text(path, json.dumps(made_from, indent=1))
            flush_folder(self.path)
        self._compare(path, made_from)
        done = self._records()
        for folder in (self.path, records):
            for name in os.listdir(folder):
                if _LEFT.fullmatch(name):
                    drop(folder / name)
        return done

    def is_whole(self, name: str, record: Record) -> bool:
        """Whether the shard is as it was written. Reads all of it."""
        path = self.path / name
        if path.stat().st_size != record.num_bytes:
            return False
        return file_digest(path) == record.sha256

    def finish(
        self,
        records: Mapping[str, Record],
        classes: list[str] | None,
        more: Mapping[str, Any],
    ) -> None:
        """Write what describes the shards, and `more`. A record without images is of no shard."""
        names = [name for name in self.plan.names if records[name].num_images]
        if classes is not None:
            replace_text(self.path / CLASSES, json.dumps(classes, indent=0))
        split = {
            "name": self.plan.name,
            "num_samples": sum(records[name].num_images for name in names),
            "filenames": names,
            "shard_lengths": [records[name].num_images for name in names],
            "num_bytes": [records[name].num_bytes for name in names],
            "sha256": [records[name].sha256 for name in names],
        }
        info = {"splits": {self.plan.name: split}, **more}
        replace_text(self.path / INFO, json.dumps(info, indent=1))
        flush_folder(self.path)

    def _compare(self, path: Path, ours: Mapping[str, Any]) -> None:
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(theirs, dict):
                raise ValueError(f"it holds a {type(theirs).__name__}, not an object")
        except (ValueError, OSError, RecursionError) as error:
            raise PackError(
                f"{path} cannot be read ({damage(error)}), so what lies beside it is not known: "
                "give another SHARDS, or remove the folder"
            ) from error
        if different := [
            f"{key} was {_shown(theirs.get(key))}, is {_shown(ours.get(key))}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]:
            raise PackError(
                f"the shards in {self.path} are made from something else ({'; '.join(different)}): "
                "give another SHARDS, or remove the folder"
            )

    def _records(self) -> dict[str, Record]:
        ours, found = set(self.plan.names), {}
        for name in sorted(os.listdir(self.path)):
            if not name.lower().endswith(".tar") or name.startswith("."):
                continue
            record = self._record(name) if name in ours else None
            if record is None:
                raise _foreign(self.path / name)
            found[name] = record
        return found

    def record_path(self, name: str) -> Path:
        return self.path / RECORDS / f"{name.removesuffix('.tar')}.json"

    def _record(self, name: str) -> Record | None:
        path = self.record_path(name)
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, OSError, RecursionError) as error:
            raise PackError(
                f"{path} is damaged ({damage(error)}), so {name} cannot be checked: remove both, "
                "and the same command makes them anew"
            ) from error


class ShardFile:
    """A shard that is being written. Close it in any case: a shard that is not finished goes."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._path = folder.path / f".{name}.{os.urandom(4).hex()}.tmp"
        with naming(self._path):
            self._file = open(self._path, "x+b")  # noqa: SIM115  until `close`
        self._digest, self._num_bytes = hashlib.sha256(), 0

    def add(self, blocks: bytes) -> None:
        """Raises OSError that names the file, and says the free space where the disk is full."""
        with self._told():
            self._file.write(blocks)
        self._digest.update(blocks)
        self._num_bytes += len(blocks)

    def finish(self, num_images: int, num_resized: int, left_out: dict[str, str]) -> Record:
        """Force it to the disk, read it again from there, and give it record and name; of one
        without images nothing is kept. Raises OSError, also where other bytes come back."""
        if not num_images:
            return Record(sha256="", num_bytes=0, num_images=0, num_resized=0, left_out=left_out)
        end = 2 * 512
        self.add(bytes(end + -(self._num_bytes + end) % _END))
        with self._told():
            self._file.flush()
            os.fsync(self._file.fileno())
        # So that the disk is read, and not the memory that holds what was written.
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.seek(0)
        wanted = self._digest.hexdigest()
        if hashlib.file_digest(self._file, "sha256").hexdigest() != wanted:
            raise OSError(
                errno.EIO,
                "other bytes came back than were written: check the disk",
                str(self._path),
            )
        record = Record(
            sha256=wanted,
            num_bytes=self._num_bytes,
            num_images=num_images,
            num_resized=num_resized,
            left_out=left_out,
        )
        path, target = self._folder.record_path(self._name), self._folder.path / self._name
        if os.path.lexists(target):
            raise _foreign(target)
        with self._told():
            replace_text(path, json.dumps(asdict(record), indent=1))
            flush_folder(path.parent)
            os.replace(self._path, target)
            flush_folder(self._folder.path)
        return record

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it still held has no room: that was told
            self._file.close()
        drop(self._path)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with naming(self._folder.path / self._name):
                yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            free = shutil.disk_usage(self._folder.path).free
            raise OSError(
                f"{self._folder.path / self._name} was not written ({error.strerror}; "
                f"{free >> 20} MiB free): make room, and the same command goes on; the shards "
                "before it are whole"
            ) from error


def refuse_used(path: Path) -> None:
    """Raise PackError for a folder with anything in it but hidden names."""
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if names and not (path / RECORDS / MADE_FROM).exists():
        more = ", ..." if len(names) > 1 else ""
        raise PackError(
            f"{path} is not empty ({names[0]}{more}), and nothing is written over it or between: "
            "give another SHARDS"
        )


def _foreign(path: Path) -> PackError:
    return PackError(
        f"{path} was not written by this command, and nothing is written over it: move it away, or "
        "give another SHARDS"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
