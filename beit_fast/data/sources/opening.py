"""The images that a path names, labelled or not, wherever they are kept."""

import errno
from pathlib import Path

from torch import Tensor

from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.sources.digits import Digits, is_digits, labelled_digits
from beit_fast.data.sources.folder import ImageFolder, ImageSource
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.object_folder import LIST, ObjectFolder
from beit_fast.data.sources.places import Kind, kind_of, kind_of_names
from beit_fast.data.sources.remote import RemoteStorage
from beit_fast.data.sources.tables import TableImages
from beit_fast.data.sources.tar_shards import TarShards

Labelled = tuple[ImageSource, Tensor, list[str]]  # images, labels int64 (n,), names of the classes

_STORED: dict[Kind, type] = {"shards": TarShards, "tables": TableImages, "objects": ObjectFolder}


def open_images(
    path: str | Path, *, follow_links: bool = True, reads: ReadConfig = READS
) -> ImageSource:
    """The images of a folder, of shards or tables on disk or behind a URL, or digits.

    Raises ValueError for what is missing or has none, each as its own class does.
    """
    if is_digits(path):
        return Digits(str(path))
    kind = kind_of(path)
    if kind == "folder":
        return ImageFolder(path, follow_links=follow_links)
    return _open_stored(str(path), kind, reads)


def labelled_images(
    path: str | Path, *, follow_links: bool = True, fewest: int = 2, reads: ReadConfig = READS
) -> Labelled:
    """The same with the class of each. Raises ValueError where there are none, or fewer classes
    than `fewest`."""
    if is_digits(path):
        return labelled_digits(str(path))
    kind = kind_of(path)
    if kind == "folder":
        return class_folders(path, follow_links=follow_links, fewest=fewest)
    source = _open_stored(str(path), kind, reads)
    return source, *source.labelled(fewest)


def _open_stored(path: str, kind: Kind, reads: ReadConfig) -> ImageSource:
    """What a store holds under a prefix decides what that is."""
    if kind != "objects" or path.endswith(LIST):
        return _STORED[kind](path, reads=reads)
    storage = RemoteStorage(path, reads=reads)
    try:
        listed = [one for page in storage.listed() for one in page]
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise ValueError(
                f"{path} cannot be listed ({error.strerror}): check the URL, and that it may be "
                "listed"
            ) from None
        raise ValueError(
            f"{path}: a web server does not list its files: give a pattern of shards, such as "
            f"{path.rstrip('/')}/train-{{0000..1023}}.tar, or the URL of a text file of names "
            f"({LIST})"
        ) from None
    found = kind_of_names([name for name, _, _ in listed])
    if found in ("shards", "tables"):
        storage.close()
        return _STORED[found](path, reads=reads)
    return ObjectFolder(path, storage=storage, listed=listed)
