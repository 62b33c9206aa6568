"""Where images come from: a protocol, and folders.

A source is random access to encoded files; it decodes nothing. Shards of tar files can join behind
the same four methods.
"""

import hashlib
import os
from pathlib import Path
from typing import Protocol

from beit_fast.data.decode import BadImageError

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
)
MAX_FILE_BYTES = 256 * 2**20  # no photograph is that large; the file would be read whole
_SIZES_IN_DIGEST = 1024


class ImageSource(Protocol):
    """Encoded images by number, the same numbers in every process and run."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises OSError or BadImageError if they cannot be had."""
        ...

    def name(self, index: int) -> str:
        """What to call it in a message: enough to find the file."""
        ...

    def digest(self) -> str:
        """Changes with the images or their order, and not where they lie."""
        ...


class ImageFolder:
    """All images under a folder, at any depth (classes or flat), in the order of their paths.

    Files are found by extension, in either case; names that begin with a dot are left out. Links
    inside the folder are left out too unless `follow_links`: then they may lead anywhere, and a
    folder reached twice is read once.

    Raises ValueError if the folder is missing, is no folder, or holds no image.
    """

    def __init__(self, path: str | Path, *, follow_links: bool = False):
        self.root = Path(path)
        if not self.root.exists():
            raise ValueError(f"the image folder {self.root} does not exist: check the path")
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder: give the folder the images are in")
        self._paths, num_links = _scan(self.root, follow_links)
        if not self._paths:
            links = f" ({num_links} links left out: set follow_links)" if num_links else ""
            raise ValueError(
                f"no images under {self.root}{links}: expected files ending in "
                f"{' '.join(sorted(EXTENSIONS))}"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        return read_image_file(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def digest(self) -> str:
        """SHA-256 of all paths below the folder, and of the sizes of 1,024 files spread evenly.

        Not of every size: asking a network disk for 14 million takes hours, for the names of
        14 million no time beyond the scan. Raises OSError for a file that is gone.
        """
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(os.fsencode(path.replace(os.sep, "/")) + b"\0")
        for number in range(min(_SIZES_IN_DIGEST, len(self))):
            index = number * len(self) // min(_SIZES_IN_DIGEST, len(self))
            digest.update(b"%d\0" % os.stat(self.name(index)).st_size)
        return digest.hexdigest()


def read_image_file(path: str | Path) -> bytes:
    """The bytes of one file. Raises OSError, and BadImageError for one too large for an image."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise BadImageError(f"the file has {size} bytes, more than {MAX_FILE_BYTES}")
        return file.read()


def _scan(root: Path, follow_links: bool) -> tuple[list[str], int]:
    """Sorted paths of images relative to `root`, and how many links were left out."""
    paths, num_links = [], 0
    entered = {os.path.realpath(root)}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and not follow_links:
                    num_links += 1
                elif entry.is_dir():
                    target = os.path.realpath(entry.path)
                    if not follow_links or target not in entered:
                        entered.add(target)
                        folders.append(path)
                elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    paths.append(path)
    return sorted(paths), num_links
