"""The images that a path names, labelled or not, wherever they are kept."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.sources.digits import Digits, is_digits, labelled_digits
from beit_fast.data.sources.folder import ImageFolder, ImageSource
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.object_folder import ObjectFolder
from beit_fast.data.sources.places import Kind, kind_of
from beit_fast.data.sources.tables import TableImages
from beit_fast.data.sources.tar_shards import TarShards

Labelled = tuple[ImageSource, Tensor, list[str]]  # images, labels int64 (n,), names of the classes

Progress = Callable[[int, int], None]  # shards that are indexed, of how many; it may raise

_STORED: dict[Kind, type] = {"tables": TableImages, "objects": ObjectFolder}


def open_images(
    path: str | Path,
    *,
    follow_links: bool = True,
    reads: ReadConfig = READS,
    progress: Progress | None = None,
) -> ImageSource:
    """The images of a folder, of shards or tables on disk or behind a URL, or digits.

    progress: is told of shards that are indexed, every tenth of a second. Raises ValueError for
    what is missing or has none, each as its own class does.
    """
    if is_digits(path):
        return Digits(str(path))
    kind = kind_of(path)
    if kind == "folder":
        return ImageFolder(path, follow_links=follow_links)
    return _open_stored(kind, str(path), reads, progress)


def labelled_images(
    path: str | Path,
    *,
    follow_links: bool = True,
    fewest: int = 2,
    reads: ReadConfig = READS,
    progress: Progress | None = None,
) -> Labelled:
    """The same with the class of each. Raises ValueError where there are none, or fewer classes
    than `fewest`."""
    if is_digits(path):
        return labelled_digits(str(path))
    kind = kind_of(path)
    if kind == "folder":
        return class_folders(path, follow_links=follow_links, fewest=fewest)
    source = _open_stored(kind, str(path), reads, progress)
    return source, *source.labelled(fewest)


def _open_stored(
    kind: Kind, path: str, reads: ReadConfig, progress: Progress | None
) -> TarShards | TableImages | ObjectFolder:
    if kind == "shards":
        return TarShards(path, reads=reads, progress=progress)
    return _STORED[kind](path, reads=reads)
