"""What lies in a tar: its members by their headers, and nothing of it is taken for granted.

A tar is a row of members: a header of 512 bytes with name, kind, size and checksum, then the data,
filled up to whole blocks. A long name comes in a member before, of GNU's kind or of POSIX's (pax).
A block of zeros ends it. Nothing is ever extracted: a member is a place within the file.

Source: POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format".
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from beit_fast.files import is_archive

BLOCK = 512
_ZEROS = bytes(BLOCK)
_FILE, _OLD_FILE, _FOLDER = b"0", b"\0", b"5"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes, whatever size they say
_GNU_NAME, _GNU_LINK, _PAX, _PAX_ALL = b"L", b"K", b"x", b"g"
_MOST_EXTRA = 2**20  # bytes of a member that says something of the next one
_AFTER_END = 2**20  # bytes at most that fill up a tar: a block of tapes is 10 KiB
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")

Read = Callable[[int, int], bytes]  # (first, count) -> those bytes, all of them


class DamagedTarError(ValueError):
    """From here on it cannot be read. The message says why."""


class Member(NamedTuple):
    name: bytes  # as it is written
    first: int  # of its data
    size: int
    is_file: bool  # else a folder, a link, a device or of another kind
    is_folder: bool
    check: int  # CRC-32 of its header, the 512 bytes before the data


def members(read: Read, size: int) -> Iterator[Member]:
    """The members of a tar of `size` bytes, those that lie in it whole.

    Raises DamagedTarError where that ends before the tar does, and what `read` raises. A tar that
    ends behind a member, without the zeros, is whole: some programs leave them out.
    """
    if size < BLOCK:
        raise DamagedTarError(f"it has {size} bytes and is no tar" if size else "it is empty")
    place, name, length = 0, None, None
    while place < size:
        if place + BLOCK > size:
            raise DamagedTarError(f"it is cut within a header, at byte {place}")
        header = read(place, BLOCK)
        if header == _ZEROS:
            _check_end(read, place, size)
            return
        _check_sum(header, place)
        kind, first = header[156:157], place + BLOCK
        count = _number(header[124:136], place) if length is None else length
        place = first if kind in _WITHOUT_DATA else first + -(-count // BLOCK) * BLOCK
        if kind in (_GNU_NAME, _GNU_LINK, _PAX, _PAX_ALL):
            if count > _MOST_EXTRA:
                raise DamagedTarError(f"{count} bytes describe the member at byte {place}")
            if first + count > size:
                raise DamagedTarError(f"it is cut within the name of a member, at byte {first}")
            if kind == _GNU_NAME:
                name = read(first, count).split(b"\0", 1)[0]
            elif kind == _PAX:
                said = _pax(read(first, count), first)
                name = said.get(b"path", name)
                if b"size" in said:
                    length = int(said[b"size"])
            continue
        if name is None:
            name = _name(header)
        is_file = kind in (_FILE, _OLD_FILE) and not name.endswith(b"/")
        if is_file and first + count > size:
            raise DamagedTarError(
                f"it is cut: {_shown(name)} has {count} bytes from byte {first} on, and the file "
                f"ends at {size}"
            )
        is_folder = kind == _FOLDER or name.endswith(b"/")
        yield Member(name, first, count, is_file, is_folder, zlib.crc32(header))
        name = length = None
    if place > size:  # what fills up the last block is missing
        raise DamagedTarError(f"it is cut: it ends at byte {size}, within a block")


def _check_sum(header: bytes, place: int) -> None:
    """Of all bytes, the eight of the sum itself as spaces; old programs took bytes as signed."""
    said = _octal(header[148:156])
    # Adler-32 has the sum of the bytes plus one in its lower half, modulo 65521: in 0.1 us, where
    # adding them up takes 3.
    own = sum(header[148:156]) - 8 * 0x20
    if said is not None and ((zlib.adler32(header) & 0xFFFF) - 1 - own - said) % 65521 == 0:
        return
    unsigned = sum(header) - own
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if said is None or said not in (unsigned, signed):
        if place:
            raise DamagedTarError(f"the header at byte {place} is damaged")
        is_packed = is_archive(header) and header[257:262] != b"ustar"
        raise DamagedTarError(f"it is {'a compressed file and ' if is_packed else ''}no tar")


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:  # an 8 or a 9
        return None


def _number(field: bytes, place: int) -> int:
    """Octal digits, or where the first bit is set a number of 95 bits, as GNU writes large ones."""
    number = int.from_bytes(field[1:]) if field[0] == 0x80 else _octal(field)
    if number is None:
        if field.strip(b"\0 "):
            raise DamagedTarError(f"the header at byte {place} has no size")
        return 0
    return number


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's, "ustar ", has times there
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax(data: bytes, first: int) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n"."""
    said, place = {}, 0
    while place < len(data) and data[place]:
        record = _PAX_RECORD.match(data, place)
        end = place + int(record[1]) if record else 0
        if not record or not record.end() < end <= len(data) or data[end - 1] != 0x0A:
            raise DamagedTarError(f"the names at byte {first} are damaged")
        key, value = record[2], data[record.end() : end - 1]
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            raise DamagedTarError(f"the size at byte {first} is no number")
        said[key], place = value, end
    return said


def _check_end(read: Read, place: int, size: int) -> None:
    """A hole of zeros in the middle looks like the end."""
    left = size - place
    parts = (place, min(left, _AFTER_END)), (size - min(left, BLOCK), min(left, BLOCK))
    if left > _AFTER_END or any(any(read(*part)) for part in parts):
        raise DamagedTarError(
            f"it seems to end at byte {place}, and {left} bytes follow: there is a hole in it, or "
            "it is several tars in a row"
        )


def _shown(name: bytes) -> str:
    return name[:80].decode(errors="backslashreplace")
