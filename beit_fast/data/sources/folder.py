"""Where images come from: a protocol, and folders.

A source is random access to encoded files; it decodes nothing.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.places import PACKED, TABLES, TAR, first_with, hint_of_path
from beit_fast.data.sources.scan import EXTENSIONS, scan

MAX_FILE_BYTES = 256 * 2**20  # no photograph is that large; the file would be read whole
SIZES_IN_DIGEST = 1024


Files = TypeVar("Files", covariant=True)  # of one image: bytes, or those of its mask too


class Source(Protocol[Files]):
    """Encoded images by number, the same numbers in every process and run."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Files:
        """The bytes of its files. Raises OSError or BadImageError if they cannot be had."""
        ...

    def name(self, index: int) -> str:
        """What to call it in a message: enough to find the file."""
        ...

    def key(self, index: int) -> str:
        """Its name within the source, wherever that lies."""
        ...

    def size(self, index: int) -> int | None:
        """Bytes of its files, None where it has none. Raises OSError if they cannot be had."""
        ...

    def digest(self) -> str:
        """Changes with the images or their order, and not where they lie."""
        ...


class ImageSource(Source[bytes], Protocol):
    """Of images alone."""


def read_ahead(source: Source, indices: Sequence[int]) -> None:
    """Say that these will be read soon to a source that can use it: it has `ahead(indices)`."""
    if ahead := getattr(source, "ahead", None):
        ahead(indices)


def keys_of(source: Source) -> Sequence[str]:
    """The key of each image. Of millions in shards none is held: a source that has `keys` makes
    them when they are asked for."""
    keys = getattr(source, "keys", None)
    return [*map(source.key, range(len(source)))] if keys is None else keys


def shard_sizes_of(source: Source) -> Sequence[int] | None:
    """Images of each shard of a source in the order of their numbers: it has `shard_sizes`. None
    for one without shards."""
    return getattr(source, "shard_sizes", None)


def read_windowed(source: Source, window: int) -> None:
    """Say that its shards are read a window of so many at a time: it may have `windowed`."""
    if windowed := getattr(source, "windowed", None):
        windowed(window)


def read_shards_ahead(source: Source, shards: Sequence[int]) -> None:
    """Say that shards with these numbers come next: it may have `shards_ahead`."""
    if ahead := getattr(source, "shards_ahead", None):
        ahead(shards)


def damage_of(source: Source) -> Mapping[str, str]:
    """What of a source is lost besides single images, name -> what is wrong: it has `damage`."""
    return getattr(source, "damage", {})


class ImageFolder:
    """All images under a folder, at any depth (classes or flat), in the order of their paths.

    Files are found by extension, in either case; names that begin with a dot are left out. Links to
    files and folders are followed wherever they lead, as timm and torchvision do, unless
    `follow_links` is false. A folder that links in several classes lead to is read for each class;
    reached again in the same one, or by a link from below itself, it is not. `paths` are relative
    to the folder, `found` tells what else lies there.

    Raises ValueError if the folder is missing, is no folder, cannot be read, or holds no image.
    """

    def __init__(self, path: str | Path, *, follow_links: bool = True):
        self.root = Path(path)
        if not self.root.exists():
            hint = hint_of_path(self.root)
            raise ValueError(f"the image folder {self.root} does not exist: check the path{hint}")
        if not self.root.is_dir():
            raise ValueError(
                f"{self.root} is not a folder: give the folder the images are in, or tar shards, "
                "whose names end in .tar; any other archive has to be unpacked first"
            )
        self.paths, self.found = scan(self.root, follow_links)
        if not self.paths:
            said = f" ({left})" if (left := self.found.left_out()) else ""
            remedy = ""
            if self.found.links_left_out:
                remedy = (
                    "; to follow links pass --data.follow_links true, or --follow_links true where "
                    "that is the flag"
                )
            for what, endings in (("tar shards", TAR), ("tables", TABLES)):
                if any(ending in self.found.other_files for ending in endings):
                    folder, name = first_with(self.root, endings)
                    remedy += (
                        f"; of {what} give the folder that they lie in, where nothing else lies, "
                        f"or a pattern like {os.path.join(folder, '*' + os.path.splitext(name)[1])}"
                    )
            if any(ending in self.found.other_files for ending in PACKED):
                remedy += "; archives have to be unpacked first, shards to files ending in .tar"
            raise ValueError(
                f"no images under {self.root}{said}: expected files ending in "
                f"{' '.join(sorted(EXTENSIONS))}{remedy}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return read_image_file(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def key(self, index: int) -> str:
        path = self.paths[index]  # itself, where it can be: of millions, no copies
        return path if os.sep == "/" else path.replace(os.sep, "/")

    def size(self, index: int) -> int:
        return os.stat(self.name(index)).st_size

    def digest(self) -> str:
        return digest_of_files(self.root, self.paths)


class ImageFiles:
    """Files by their paths, wherever they lie."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return read_image_file(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]


def digest_of_files(root: Path, paths: Sequence[str]) -> str:
    """SHA-256 of the paths below `root` and of the sizes of 1,024 files spread evenly.

    Not of every size: asking a network disk for 14 million takes hours, for the names of
    14 million no time beyond the scan. Raises OSError for a file that is gone.
    """
    sizes = (
        os.stat(os.path.join(root, paths[number])).st_size
        for number in numbers_in_digest(len(paths))
    )
    return digest_of_sizes(paths, sizes)


def digest_of_sizes(paths: Sequence[str], sizes: Iterable[int]) -> str:
    """SHA-256 of paths, and of the sizes of those whose numbers `numbers_in_digest` gives."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.replace(os.sep, "/")) + b"\0")
    for size in sizes:
        digest.update(b"%d\0" % size)
    return digest.hexdigest()


def numbers_in_digest(num_files: int) -> list[int]:
    """Of the files whose sizes count, spread evenly."""
    num_sizes = min(SIZES_IN_DIGEST, num_files)
    return [number * num_files // num_sizes for number in range(num_sizes)]


def read_image_file(path: str | Path) -> bytes:
    """The bytes of one file.

    Raises OSError, also where fewer come than the file has, and BadImageError for one too large for
    an image and for a pipe or device, which might never end.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError(
                "it is a pipe or a device and no file: write the image into a file and pass that"
            )
        if status.st_size > MAX_FILE_BYTES:
            raise BadImageError(f"the file has {status.st_size} bytes, more than {MAX_FILE_BYTES}")
        data = file.read()
    if len(data) < status.st_size:  # a network disk that fails, or somebody who cuts it
        raise OSError(errno.EIO, f"{len(data)} of {status.st_size} bytes came", str(path))
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write into a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)
