"""What lies in a folder of images: the images, and an account of all that is left out."""

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

EXTENSIONS = frozenset(  # of the formats that decode.py reads
    (
        *(".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi"),
        *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".pbm", ".pgm", ".ppm", ".pnm"),
    )
)
_EXAMPLES = 6  # of endings or names that `left_out` shows


@dataclass
class Found:
    """What a scan met. Names are relative to the folder."""

    folders: list[str] = field(default_factory=list)  # directly in it, sorted
    num_linked: int = 0  # images that are links, or lie in a folder that is reached by one
    other_files: Counter[str] = field(default_factory=Counter)  # by ending, of no known format
    num_hidden: int = 0  # files and folders whose names begin with a dot
    num_special: int = 0  # pipes, sockets, devices
    links_left_out: int = 0  # all, where links are not followed
    broken_links: list[str] = field(default_factory=list)
    read_before: list[str] = field(default_factory=list)  # folders that links led to again
    unreadable: dict[str, str] = field(default_factory=dict)  # folders, and why

    def left_out(self) -> str:
        """All that was not read, by kind: "2 links left out, 1 broken link (a/b)"; often ""."""
        parts = [
            counted(sum(self.other_files.values()), "other file", "other files", self._endings()),
            counted(self.num_hidden, "hidden name", "hidden names"),
            counted(self.num_special, "pipe or device", "pipes or devices"),
            counted(self.links_left_out, "link", "links"),
        ]
        left_out = ", ".join(filter(None, parts))
        parts = [
            f"{left_out} left out" if left_out else "",
            counted(len(self.broken_links), "broken link", "broken links", self.broken_links),
            counted(
                len(self.read_before),
                "link to a folder that is read already",
                "links to folders that are read already",
                self.read_before,
            ),
            counted(
                len(self.unreadable),
                "folder that cannot be read",
                "folders that cannot be read",
                [f"{name}: {why}" for name, why in sorted(self.unreadable.items())],
            ),
        ]
        return ", ".join(filter(None, parts))

    def _endings(self) -> list[str]:
        commonest = sorted(self.other_files.items(), key=lambda item: (-item[1], item[0]))
        return [f"{count} {ending}" for ending, count in commonest]


class _Folder(NamedTuple):
    """One to be read: `above` are the real paths of it and of the folders it was reached by."""

    path: str
    above: tuple[str, ...]
    is_linked: bool

    @property
    def identity(self) -> tuple[str, str]:
        """Read once: the folder below the root that it was reached in, and where it really is."""
        return self.path.split(os.sep, 1)[0], self.above[-1]


def scan(root: Path, follow_links: bool) -> tuple[list[str], Found]:
    """Sorted paths of the images relative to `root`, and an account of the rest.

    Links are followed when all else is read, so they change no path of it. A folder that was read
    under the same folder of the root, which may be a class, is not read there again; so however
    links lead to each other, there is an end. A folder below that cannot be read is noted, and ends
    nothing. Raises ValueError where `root` itself cannot be read.
    """
    paths, found = [], Found()
    read: set[tuple[str, str]] = set()
    waiting, links = [_Folder("", (os.path.realpath(root),), False)], deque[_Folder]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        if folder.identity in read:
            found.read_before.append(folder.path)
            continue
        read.add(folder.identity)
        try:
            with os.scandir(os.path.join(root, folder.path)) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not folder.path:
                raise ValueError(
                    f"{root} cannot be read ({error}): check its permissions"
                ) from error
            found.unreadable[folder.path] = error.strerror or str(error)
            continue
        for entry in entries:
            path = os.path.join(folder.path, entry.name)
            is_link = _is(entry.is_symlink)
            is_linked = folder.is_linked or is_link
            if entry.name.startswith("."):
                found.num_hidden += 1
            elif is_link and not follow_links:
                found.links_left_out += 1
            elif _is(entry.is_dir):
                if is_link:
                    real = os.path.realpath(entry.path)
                else:
                    real = os.path.join(folder.above[-1], entry.name)
                if real in folder.above:
                    found.read_before.append(path)
                    continue
                (links if is_link else waiting).append(
                    _Folder(path, (*folder.above, real), is_linked)
                )
                if not folder.path:
                    found.folders.append(entry.name)
            elif _is(entry.is_file):
                ending = os.path.splitext(entry.name)[1].lower()
                if ending in EXTENSIONS:
                    paths.append(path)
                    found.num_linked += is_linked
                else:
                    found.other_files[ending or "without ending"] += 1
            elif is_link and not os.path.exists(entry.path):
                found.broken_links.append(path)
            else:
                found.num_special += 1
    for names in (found.broken_links, found.read_before):
        names.sort()
    return sorted(paths), found


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry says it is; False where that cannot be known, as of links in a circle."""
    try:
        return kind()
    except OSError:
        return False


def counted(number: int, one: str, many: str, examples: Sequence[str] = ()) -> str:
    """The number with its noun and some examples, as in "2 links (a, b)"; nothing for none."""
    if not number:
        return ""
    shown = ", ".join([*examples[:_EXAMPLES], *(["..."] if len(examples) > _EXAMPLES else [])])
    return f"{number} {one if number == 1 else many}" + (f" ({shown})" if shown else "")
