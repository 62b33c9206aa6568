"""Loose images in an object store or behind a web server: a request an image."""

import errno
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.sources.class_folders import check_classes
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import MAX_FILE_BYTES, digest_of_sizes, numbers_in_digest
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.remote import WHOLE, RemoteStorage
from beit_fast.data.sources.scan import EXTENSIONS, Found
from beit_fast.data.sources.storage import FilePart
from beit_fast.data.sources.store_clients import Listed

LIST = ".txt"  # of a file of names in the place of a list
_MAX_LIST_BYTES = 2**30
_UNKNOWN = -1
_NO_PARTS = {"", ".", ".."}  # of a name
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class ObjectFolder:
    """The images below the prefix that a URL names, in the order of their names.

    A URL that ends in .txt names a text file, which lists names relative to where it lies, one a
    line: so also a web server has them, which cannot tell what it has. Objects count by their
    ending, as files do; names that begin with a dot are left out. Of what a batch will read, all
    is asked for at once (`ahead`).

    listed: what the store said it has, where it was asked already.

    Raises ValueError where there is no image, for a list that is none, and as `RemoteStorage` does;
    OSError where the store gives no list.
    """

    def __init__(
        self,
        path: str,
        *,
        reads: ReadConfig = READS,
        storage: RemoteStorage | None = None,
        listed: Iterable[Listed] | None = None,
    ) -> None:
        self.path, self._found = path, Found()
        place, _, name = path.rpartition("/")
        self._is_list = name.endswith(LIST)
        self._storage = storage or RemoteStorage(place if self._is_list else path, reads=reads)
        if self._is_list:
            listed = self._read_list(name)
        elif listed is None:
            listed = chain.from_iterable(self._storage.listed())
        images = sorted((name, size) for name, size, _ in listed if self._is_image(name))
        if not images:
            raise ValueError(
                f"no images at {path}{f' ({left})' if (left := self.left_out()) else ''}: expected "
                f"objects whose names end in {' '.join(sorted(EXTENSIONS))}, or in .tar"
            )
        self._names = [name for name, _ in images]
        self._sizes = np.array([size for _, size in images], np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        size = int(self._sizes[index])
        if size > MAX_FILE_BYTES:
            raise BadImageError(f"the object has {size} bytes, more than {MAX_FILE_BYTES}")
        data = self._storage.read(self._part(index))
        if size not in (_UNKNOWN, len(data)):
            raise OSError(errno.EIO, f"{len(data)} of {size} bytes came", self.name(index))
        return data

    def name(self, index: int) -> str:
        return f"{self._storage.place}/{self._names[index]}"

    def key(self, index: int) -> str:
        return self._names[index]

    def size(self, index: int) -> int:
        size = int(self._sizes[index])
        return self._storage.state(self._names[index]).size if size == _UNKNOWN else size

    def digest(self) -> str:
        """That of a folder with the same files."""
        numbers = numbers_in_digest(len(self))
        unknown = [number for number in numbers if self._sizes[number] == _UNKNOWN]
        states = self._storage.states([self._names[n] for n in unknown]) if unknown else []
        self._sizes[unknown] = [state.size for state in states]
        return digest_of_sizes(self._names, (int(self._sizes[number]) for number in numbers))

    def ahead(self, indices: Sequence[int]) -> None:
        self._storage.ahead(
            [self._part(index) for index in indices if self._sizes[index] <= MAX_FILE_BYTES]
        )

    def left_out(self) -> str:
        return self._found.left_out()

    def labelled(self, fewest: int) -> tuple[Tensor, list[str]]:
        """Labels int64 (n,) and classes: the folders that the first parts of the names are.

        Raises ValueError as `class_folders` does.
        """
        if stray := next((name for name in self._names if "/" not in name), None):
            raise ValueError(
                f"{stray} lies in {self.path} and in no class folder: give images one folder a "
                "class"
            )
        folders = [name.split("/", 1)[0] for name in self._names]
        classes = sorted(set(folders))
        try:
            check_classes(self._storage.place, classes, self._names, fewest)
        except ValueError as error:
            if not self._is_list:
                raise
            raise ValueError(f"{error}, by a list ({LIST}) of names that lies there") from None
        number = {name: label for label, name in enumerate(classes)}
        return torch.tensor([number[name] for name in folders]), classes

    def _part(self, index: int) -> FilePart:
        return FilePart(self._names[index], 0, WHOLE)

    def _is_image(self, name: str) -> bool:
        """Whether it counts; what does not is noted."""
        if name.startswith(".") or "/." in name:
            self._found.num_hidden += 1
            return False
        ending = os.path.splitext(name)[1].lower()
        if ending not in EXTENSIONS:
            if not name.endswith("/"):  # which stands for a folder
                self._found.other_files[ending or "without ending"] += 1
            return False
        return True

    def _read_list(self, name: str) -> list[Listed]:
        try:
            text = self._storage.read_whole(name, _MAX_LIST_BYTES).decode("utf-8-sig")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            said = f"{self.path} is no text in UTF-8 ({error}): save it as that"
            raise ValueError(said) from error
        names: dict[str, int] = {}  # with the numbers of their lines
        for number, line in enumerate(text.splitlines(), 1):
            if not (name := line.strip()):
                continue
            where = f"{self.path}, line {number}: {name!r:.80}"
            if _SCHEME.match(name) or not name.isprintable() or _NO_PARTS & {*name.split("/")}:
                raise ValueError(
                    f"{where} is no name of a file beside or below the list: write one such as "
                    "photos/a.jpg"
                )
            if first := names.get(name):
                raise ValueError(f"{where} stands in line {first} already: name each file once")
            names[name] = number
        return [Listed(name, _UNKNOWN, "") for name in names]
