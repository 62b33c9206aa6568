"""What a path of images names: a folder, shards, objects of a store, tables; on disk or by URL.

IMAGES                                     a folder of images
SHARDS  DIR/train-{0000..1023}.tar  a.tar  tar shards: a folder that has nothing else, a pattern
TABLES  DIR/data/train-*.parquet           the same of Parquet and Arrow files
s3://bucket/prefix  gs:// az:// https://   a store; what it holds decides
"""

import fnmatch
import itertools
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from beit_fast.data.sources.scan import EXTENSIONS

Kind = Literal["folder", "shards", "tables", "objects"]
TAR, TABLES = (".tar",), (".parquet", ".arrow")
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")  # and not read as they are
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST_NAMES = 1_000_000  # that braces may stand for


class Place(NamedTuple):
    """A folder or the URL of a prefix, and the pattern of names in it, "" for all."""

    root: str
    pattern: str


def is_url(path: str | Path) -> bool:
    """Whether a path begins with a scheme: Path would have taken one of its slashes."""
    return bool(_URL.match(str(path)))


def scheme_of(path: str) -> str:
    """ "s3" of "s3://bucket"; "" for a path on disk."""
    match = _URL.match(path)
    return match[1].lower() if match else ""


def split_place(path: str | Path) -> Place:
    """A path whose last part is a pattern, or a file of shards or tables, is cut before it. Raises
    ValueError for a URL of nothing."""
    path = str(path)
    root, name = os.path.split(path)
    if is_url(path) and not is_url(root):  # the first part is a bucket or a host
        if not name:
            raise ValueError(f"{path} names no bucket and no host: write one behind ://")
        return Place(path, "")
    is_pattern = any(letter in name for letter in "*?{[")
    is_file = name.lower().endswith(TAR + TABLES)
    if name and (is_pattern or is_file) and (is_url(path) or not os.path.isdir(path)):
        return Place(root or ".", name)
    return Place(path, "")


def expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" -> a-00.tar, a-01.tar, a-02.tar; "{train,val}.tar" -> both.

    Raises ValueError for a range that runs backwards, and for more than a million names.
    """
    names = [pattern]
    while any(_BRACES.search(name) for name in names):
        expanded = (new for name in names for new in _expand_one(name, pattern))
        names = list(itertools.islice(expanded, _MOST_NAMES + 1))
        if len(names) > _MOST_NAMES:
            raise ValueError(f"{pattern} stands for more than {_MOST_NAMES} names: give fewer")
    return names


def matching(names: list[str], pattern: str) -> list[str]:
    """Those of the names that fit, in order; of braces each name, there or not."""
    if "{" in pattern and not any(letter in pattern for letter in "*?["):
        return expand_braces(pattern)
    fits = expand_braces(pattern)
    return [name for name in names if any(fnmatch.fnmatchcase(name, one) for one in fits)]


def kind_of_names(names: list[str]) -> Kind | None:
    """What the names of files say they are; images count before archives of them. None: nothing
    that is known."""
    endings = {os.path.splitext(name)[1].lower() for name in names}
    if endings & EXTENSIONS:
        return "objects"
    if endings & set(TAR):
        return "shards"
    return "tables" if endings & set(TABLES) else None


def kind_of(path: str | Path) -> Kind:
    """What a path on disk, or the name of a URL, says. Lists one folder and asks no store: a URL
    that names neither shards nor tables is "objects" until its store is listed."""
    place = split_place(path)
    if place.pattern:
        lower = place.pattern.lower()
        if lower.endswith(TAR):
            return "shards"
        if lower.endswith(TABLES):
            return "tables"
    if is_url(path):
        return "objects"
    try:
        names = _names_until_it_is_a_folder(path)
    except OSError:  # no folder, or one that cannot be read: who opens it says so
        return "folder"
    return "folder" if names is None else kind_of_names(names) or "folder"


def hint_of_path(path: str | Path) -> str:
    """What else to say of a path where nothing is; often ""."""
    path = str(path)
    if path.startswith("~"):
        return "; a shell knows the folder ~ outside of quotes alone: write it in full"
    if any(letter in os.path.basename(path) for letter in "*?{["):
        return f"; a pattern names shards or tables and ends in {', '.join(TAR + TABLES)}"
    return ""


def first_with(root: str | Path, endings: tuple[str, ...]) -> tuple[str, str]:
    """The first file below a folder with one of the endings: the folder that it lies in, and its
    name. The folder itself with such a name where only links lead to one."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(endings) and not name.startswith("."):
                return folder, name
    return str(root), f"*{endings[0]}"


def _names_until_it_is_a_folder(path: str | Path) -> list[str] | None:
    """Of the files in it that are not hidden; None from the first image or folder on: there may be
    millions behind it."""
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry) or kind_of_names([entry.name]) == "objects":
                return None
            names.append(entry.name)
    return names


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _expand_one(name: str, pattern: str) -> list[str]:
    match = _BRACES.search(name)
    if match is None:
        return [name]
    before, after = name[: match.start()], name[match.end() :]
    numbers = _RANGE.fullmatch(match[0])
    if numbers is None:
        return [f"{before}{part}{after}" for part in match[1].split(",")]
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first >= _MOST_NAMES:
        raise ValueError(
            f"{match[0]} in {pattern} is no range: write the first number and then the last"
        )
    width = len(numbers[1])
    return [f"{before}{number:0{width}d}{after}" for number in range(first, last + 1)]
