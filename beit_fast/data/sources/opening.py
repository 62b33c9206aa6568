"""The images that a path names, labelled or not, wherever they are kept."""

import errno
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.sources.digits import Digits, is_digits, labelled_digits
from beit_fast.data.sources.folder import ImageFolder, ImageSource
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.object_folder import LIST, ObjectFolder
from beit_fast.data.sources.places import Kind, kind_of, kind_of_names
from beit_fast.data.sources.remote import RemoteStorage
from beit_fast.data.sources.store_clients import Listed
from beit_fast.data.sources.tables import TableImages
from beit_fast.data.sources.tar_shards import TarShards

Labelled = tuple[ImageSource, Tensor, list[str]]  # images, labels int64 (n,), names of the classes

Progress = Callable[[int, int], None]  # shards that are indexed, of how many; it may raise


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
    return _open_stored(str(path), kind, reads, progress)


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
    source = _open_stored(str(path), kind, reads, progress)
    return source, *source.labelled(fewest)


def _open_stored(
    path: str, kind: Kind, reads: ReadConfig, progress: Progress | None
) -> TarShards | TableImages | ObjectFolder:
    """What a store holds under a prefix decides what that is."""
    storage, listed = None, None
    if kind == "objects" and not path.endswith(LIST):
        storage = RemoteStorage(path, reads=reads)
        listed = _list(storage)
        kind = kind_of_names([name for name, _, _ in listed]) or "objects"
    if kind == "objects":
        return ObjectFolder(path, reads=reads, storage=storage, listed=listed)
    if storage is not None:
        storage.close()
    if kind == "shards":
        return TarShards(path, reads=reads, progress=progress)
    return TableImages(path, reads=reads)


def _list(storage: RemoteStorage) -> list[Listed]:
    place = storage.place
    try:
        return [one for page in storage.listed() for one in page]
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise ValueError(
                f"{place} cannot be listed ({error.strerror}): check the URL"
            ) from None
        raise ValueError(
            f"{place}: a web server does not list its files: give a pattern of shards, such as "
            f"{place}/train-{{0000..1023}}.tar, or the URL of a text file of names ({LIST})"
        ) from None
