"""What an index of a tar shard says: where its images lie, their names and labels.

As bytes, which are kept:

    {"format": 1, "shard": "train-0000.tar", "size": ..., "tag": ..., "count": n, ...}\\n
    first int64 (n,)  size int32 (n,)  check uint32 (n,)  label int32 (n,)  each name and a NUL
    SHA-256 of all before

The digest shows damage and no purpose: whoever changes an index can make it anew. So what it says
is checked too, and a read of an image sees that its header is the one that was indexed.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from beit_fast.data.sources.scan import EXTENSIONS
from beit_fast.data.sources.storage import FileState
from beit_fast.data.sources.tar_members import BLOCK, DamagedTarError, Member, Read, members

FORMAT = 1
MOST_IMAGE_BYTES = 64 * 2**20  # no photograph is that large; it would be read whole
MOST_MEMBERS = 4_000_000  # of a shard: 2 GiB of headers
NO_LABEL = -1
MOST_LABEL = 2**31 - 2
_MOST_LABEL_BYTES, _LONGEST_NAME = 2**16, 4096
_MOST_ENDINGS = 32  # that are counted by name
_KINDS = {"first": "<i8", "size": "<i4", "check": "<u4", "label": "<i4"}
_DIGEST = 32
_APART = re.compile(rb"[/\\]")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]|\xc2[\x80-\x9f]")  # what terminals obey
_LONGEST_ENDING = 16
LINKS, STRAY, HIDDEN, LARGE, TWICE = "links", "stray", "hidden", "large", "twice"
LEFT_OUT = {  # what they are called
    LINKS: ("link or device", "links or devices"),
    STRAY: ("name that leads elsewhere", "names that lead elsewhere"),  # or cannot be shown
    HIDDEN: ("hidden name", "hidden names"),
    LARGE: ("image of more than 64 MiB", "images of more than 64 MiB"),
    TWICE: ("name that was there before", "names that were there before"),
}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The images of one shard, n of them, in the order in which they lie there."""

    shard: str
    state: FileState  # of the shard that was indexed
    first: np.ndarray  # int64 (n,), of the data
    size: np.ndarray  # int32 (n,), bytes
    check: np.ndarray  # uint32 (n,), CRC-32 of the header that lies before
    label: np.ndarray  # int32 (n,), NO_LABEL where it has none
    names: bytes  # each and a NUL
    ends: np.ndarray  # int32 (n,), of the names in `names`
    damage: str  # why it was read up to there; "" where it is whole
    left: dict[str, int] = field(default_factory=dict)  # members left out, by kind
    endings: dict[str, int] = field(default_factory=dict)  # of the other files among them

    def __len__(self) -> int:
        return len(self.first)

    def name(self, number: int) -> bytes:
        return self.names[self.ends[number - 1] + 1 if number else 0 : self.ends[number]]

    def keys(self, first: int, last: int) -> list[str]:
        """SHARD/NAME of the images first ... last - 1, as far as there are any."""
        last = min(last, len(self))
        if first >= last:
            return []
        start = self.ends[first - 1] + 1 if first else 0
        names = os.fsdecode(self.names[start : self.ends[last - 1]])
        return [f"{self.shard}/{name}" for name in names.split("\0")]


def index_shard(shard: str, state: FileState, read: Read) -> ShardIndex:
    """Hop from header to header. Raises what `read` raises, and nothing for a damaged shard."""
    left, endings = Counter[str](), Counter[str]()
    images: dict[bytes, Member] = {}
    classes: dict[bytes, int] = {}  # of .cls, by the name without its ending
    described: dict[bytes, int] = {}  # of .json
    damage = ""
    try:
        for number, member in enumerate(members(read, state.size)):
            if number == MOST_MEMBERS:
                raise DamagedTarError(f"it has more than {MOST_MEMBERS} members")
            if member.is_folder:
                continue
            if not member.is_file:
                left[LINKS] += 1
            elif (name := _clean(member.name)) is None:
                left[STRAY] += 1
            elif _base(name).startswith(b"."):
                left[HIDDEN] += 1
            else:
                stem, ending = os.path.splitext(name)
                kind = ending.decode(errors="replace").lower()
                if kind in EXTENSIONS:
                    if member.size > MOST_IMAGE_BYTES:
                        left[LARGE] += 1
                    elif name in images:
                        left[TWICE] += 1
                    else:
                        images[name] = member
                elif kind == ".cls":
                    _keep_label(classes, stem, _class(_text(member, read)))
                elif kind == ".json":
                    if stem not in classes:  # a .cls is what counts
                        _keep_label(described, stem, _described(_text(member, read)))
                else:
                    endings[_kept_ending(kind, endings)] += 1
    except DamagedTarError as error:
        damage = str(error)
    labels = {name: _label(name, classes, described) for name in images}
    if damage and any(label != NO_LABEL for label in labels.values()):
        # Of the last key the image came before the damage, and its class did not.
        while labels[last := next(reversed(labels))] == NO_LABEL:
            del labels[last], images[last]
    names, found = b"".join(name + b"\0" for name in images), images.values()

    def column(name: str, values: Iterable[int]) -> np.ndarray:
        return np.fromiter(values, _KINDS[name], len(images))

    return ShardIndex(
        shard=shard,
        state=state,
        first=column("first", (member.first for member in found)),
        size=column("size", (member.size for member in found)),
        check=column("check", (member.check for member in found)),
        label=column("label", labels.values()),
        names=names,
        ends=_ends(names),
        damage=damage,
        left=dict(left),
        endings=dict(endings),
    )


def to_bytes(index: ShardIndex) -> bytes:
    header = {
        "format": FORMAT,
        "shard": index.shard,
        "size": index.state.size,
        "tag": index.state.tag,
        "count": len(index),
        "damage": index.damage,
        "left": index.left,
        "endings": index.endings,
    }
    parts = [json.dumps(header).encode(), b"\n"]
    parts += [getattr(index, name).astype(kind).tobytes() for name, kind in _KINDS.items()]
    content = b"".join([*parts, index.names])
    return content + hashlib.sha256(content).digest()


def from_bytes(data: bytes, shard: str, state: FileState) -> ShardIndex | None:
    """The index of that shard; None where it is damaged, of another state of the shard or another
    format, or says what cannot be."""
    content = memoryview(data)[:-_DIGEST]
    if hashlib.sha256(content).digest() != data[-_DIGEST:]:
        return None
    try:
        place = data.index(b"\n") + 1
        said = json.loads(data[:place])
        expected = {"format": FORMAT, "shard": shard, "size": state.size, "tag": state.tag}
        if any(said[key] != value for key, value in expected.items()):
            return None
        count, columns = said["count"], {}
        for name, kind in _KINDS.items():
            columns[name] = np.frombuffer(content, kind, count, place)
            place += columns[name].nbytes
        names = bytes(content[place:])
        index = ShardIndex(
            shard=shard,
            state=state,
            **columns,
            names=names,
            ends=_ends(names),
            damage=said["damage"],
            left=said["left"],
            endings=said["endings"],
        )
        return index if _can_be(index, count) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _can_be(index: ShardIndex, count: int) -> bool:
    """Whether all lies within the shard, one behind the other, and has a name that can be shown."""
    first, size, label = index.first, index.size, index.label
    octets = np.frombuffer(index.names, np.uint8)
    ends, counts = index.ends, [*index.left.values(), *index.endings.values()]
    return bool(
        type(index.damage) is str
        and all(map(str.isprintable, [index.damage, *index.endings]))
        and not (octets[octets > 0] < 0x20).any()
        and index.left.keys() <= LEFT_OUT.keys()
        and all(type(number) is int and number > 0 for number in counts)
        and len(ends) == count
        and (not index.names or index.names.endswith(b"\0"))
        and (np.diff(ends, prepend=-1) > 1).all()
        and (not count or first[0] >= BLOCK)
        and ((size >= 0) & (size <= MOST_IMAGE_BYTES)).all()
        and (first <= index.state.size).all()  # so no sum below is beyond 64 bits
        and (first[1:] >= first[:-1] + size[:-1] + BLOCK).all()
        and (not count or int(first[-1]) + int(size[-1]) <= index.state.size)
        and ((label >= NO_LABEL) & (label <= MOST_LABEL)).all()
    )


def _kept_ending(kind: str, endings: Mapping[str, int]) -> str:
    """What it is counted as: there may be any number, of any length."""
    if not kind:
        return "without ending"
    few = len(endings) < _MOST_ENDINGS and len(kind) <= _LONGEST_ENDING and kind.isprintable()
    return kind if few or kind in endings else "others"


def _clean(name: bytes) -> bytes | None:
    """Without "./" before it; None for one that leads out of the folder it would be taken out to,
    or that cannot be shown."""
    while name.startswith(b"./"):
        name = name[2:].lstrip(b"/")
    if not 0 < len(name) <= _LONGEST_NAME or name[0] in b"/\\" or _CONTROL.search(name):
        return None
    return None if b".." in name and b".." in _APART.split(name) else name


def _base(name: bytes) -> bytes:
    return name[name.rfind(b"/") + 1 :]


def _text(member: Member, read: Read) -> bytes:
    return read(member.first, member.size) if member.size <= _MOST_LABEL_BYTES else b""


def _class(text: bytes) -> int | None:
    text = text.strip()
    return _checked(int(text)) if text.isdigit() and len(text) < 11 else None


def _described(text: bytes) -> int | None:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _checked(said.get("label")) if isinstance(said, dict) else None


def _checked(label: object) -> int | None:
    return label if type(label) is int and 0 <= label <= MOST_LABEL else None


def _keep_label(labels: dict[bytes, int], stem: bytes, label: int | None) -> None:
    if label is not None:
        labels.setdefault(stem, label)


def _label(name: bytes, classes: dict[bytes, int], described: dict[bytes, int]) -> int:
    """Of the files called as the image is, or as it is up to the first dot: a key may have several
    images, "7.left.jpg" and "7.right.jpg" with "7.cls"."""
    stem = os.path.splitext(name)[0]
    base = len(name) - len(_base(name))
    for key in (stem, name[: name.index(b".", base)]):
        label = classes.get(key, described.get(key))
        if label is not None:
            return label
    return NO_LABEL


def _ends(names: bytes) -> np.ndarray:
    ends = np.flatnonzero(np.frombuffer(names, np.uint8) == 0)
    return ends.astype(np.int32) if len(names) < 2**31 else ends
