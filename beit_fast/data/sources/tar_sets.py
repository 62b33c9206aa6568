"""What lies beside tar shards and says what they are: `_info.json`, the names of the classes.

_info.json    {"splits": {"train": {"filenames": [...], "shard_lengths": [...]}}}, as public
              sets have it, or info.json
classes.txt   names of the classes, a line each, or classes.json (class_names.py)
"""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from beit_fast.data.sources.class_folders import called_as_parts
from beit_fast.data.sources.class_names import parse_classes
from beit_fast.data.sources.places import TAR, Place, hint_of_path, is_url, matching
from beit_fast.data.sources.scan import counted
from beit_fast.data.sources.storage import FilePart, Storage
from beit_fast.files import damage, describe

INFO, CLASSES = ("_info.json", "info.json"), ("classes.txt", "classes.json")
_MOST_BYTES = 2**26  # of such a file
_WORDS = re.compile(r"[^A-Za-z]+")
_NUMBERS, _LAST_NUMBER = re.compile(r"\d+"), re.compile(r"\d+(?=\D*$)")


class Split(NamedTuple):
    """A part of a data set, as `_info.json` says it."""

    name: str
    lengths: dict[str, int | None]  # shard -> its samples


def list_files(storage: Storage, place: Place) -> list[str]:
    """Of the files in the place; of a store that need not be listed, those that are looked for.
    Raises ValueError for a place that is not there or cannot be read."""
    if is_url(place.root) and place.pattern and not _is_wild(place.pattern):
        return [name for name in INFO + CLASSES if _is_there(storage, name)]
    try:
        names = storage.names()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{place.root}, where the shards are to lie, is no folder: check the path; only the "
            f"last part of it can be a pattern{hint_of_path(place.root)}"
        ) from error
    except OSError as error:
        remedy = ""
        if error.errno == errno.EOPNOTSUPP:
            remedy = (
                f": give a pattern without stars, such as {place.root}/train-{{0000..1023}}.tar"
            )
        raise ValueError(f"{place.root} cannot be read ({describe(error)}){remedy}") from error
    return [name for name in names if not os.path.basename(name).startswith(".")]


def list_shards(storage: Storage, place: Place, files: Sequence[str]) -> list[str]:
    """The shards that a place names, those of braces whether they are there or not. Raises
    ValueError where there are none."""
    tars = [name for name in files if name.lower().endswith(TAR)]
    if not place.pattern:
        shards = tars
    elif place.pattern in files:  # even if it has brackets
        shards = [place.pattern]
    else:
        shards = matching(tars, place.pattern)
    if not shards:
        is_or_are = "is" if len(tars) == 1 else "are"
        there = f": there {is_or_are} {counted(len(tars), 'shard', 'shards', tars)}" if tars else ""
        raise ValueError(
            f"no shards like {os.path.join(storage.place, place.pattern or '*.tar')}{there}: check "
            "the path"
        )
    if twice := [name for name, count in Counter(shards).items() if count > 1]:
        raise ValueError(f"{place.pattern} names {twice[0]} twice: name each shard once")
    return shards


def read_splits(storage: Storage, names: Sequence[str]) -> list[Split]:
    """The parts of the set; none where no file says them. Raises ValueError for a damaged one."""
    name = next((name for name in INFO if name in names), None)
    if name is None:
        return []
    path = os.path.join(storage.place, name)
    try:
        said = json.loads(_content(storage, name))
        splits = said.get("splits", {}) if isinstance(said, dict) else {}
        return [_split(name, split) for name, split in splits.items()]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({describe(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say the parts of the set ({damage(error)}): download it anew, or "
            "remove it"
        ) from error


def read_class_names(storage: Storage, names: Sequence[str]) -> tuple[str, list[str]]:
    """The file that names the classes and what it says; "" and none where there is no such file.
    Raises ValueError as `read_classes` does."""
    name = next((name for name in CLASSES if name in names), None)
    if name is None:
        return "", []
    path = os.path.join(storage.place, name)
    return path, list(parse_classes(path, _content(storage, name)).names)


def parts_of(shards: Sequence[str], splits: Sequence[Split]) -> dict[str, list[str]]:
    """Part of the set (train, validation) -> its shards, where these are of several; else {}."""
    of_split = {shard: split.name for split in splits for shard in split.lengths}
    parts: dict[str, list[str]] = {}
    for shard in shards:
        words = filter(None, _WORDS.split(shard.removesuffix(".tar")))
        word = next((word for word in words if called_as_parts([word])), "")
        parts.setdefault(of_split.get(shard, word), []).append(shard)
    return parts if len(parts.keys() - {""}) > 1 else {}


def pattern_of(part: str, shards: Sequence[str], others: Sequence[str]) -> str:
    """A pattern that fits the shards of a part, and if there is one, no others."""
    patterns = [
        _LAST_NUMBER.sub("*", shards[0]),
        _NUMBERS.sub("*", shards[0]),
        f"*{part}*{TAR[0]}",
    ]
    fits = (pattern for pattern in patterns if matching([*others], pattern) == list(shards))
    return next(fits, patterns[0])


def _split(name: str, said: dict) -> Split:
    files = said["filenames"]
    lengths = said.get("shard_lengths") or [None] * len(files)
    if not all(isinstance(text, str) and text.isprintable() for text in [name, *files]):
        raise ValueError("a name is no text that can be shown")
    if not all(length is None or (type(length) is int and length >= 0) for length in lengths):
        raise ValueError("a number of samples is no number")
    return Split(name, dict(zip(files, lengths, strict=True)))


def _content(storage: Storage, name: str) -> bytes:
    path, size = os.path.join(storage.place, name), storage.state(name).size
    if size > _MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {_MOST_BYTES}")
    return storage.read(FilePart(name, 0, size)) if size else b""


def _is_wild(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")


def _is_there(storage: Storage, name: str) -> bool:
    try:
        storage.state(name)
    except (FileNotFoundError, PermissionError):  # who may not list is told of either by 403
        return False
    except OSError as error:
        path = os.path.join(storage.place, name)
        raise ValueError(f"{path} cannot be read ({describe(error)})") from error
    return True
