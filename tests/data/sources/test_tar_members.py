"""Members of tars as Python's tarfile finds them, and damaged ones."""

import io
import random
import tarfile
import zlib
from functools import partial

import pytest

from beit_fast.data.sources.tar_members import BLOCK, DamagedTarError, members
from shards import TAR_FORMATS, entry, write_tar

LONG = "folder/" * 20 + "name" * 30 + ".jpg"


def part(data, first, count):
    assert first >= 0
    assert first + count <= len(data)
    return data[first : first + count]


def found(data):
    return list(members(partial(part, data), len(data)))


def damage(data):
    """Names found before it, and the damage."""
    names = []
    try:
        for member in members(partial(part, data), len(data)):
            names.append(member.name.decode())
    except DamagedTarError as error:
        return names, str(error)
    raise AssertionError("no damage was found")


@pytest.mark.parametrize("kind", TAR_FORMATS)
def test_names_places_and_sizes_are_those_that_tarfile_finds(kind):
    content = [
        ("a.jpg", b"x" * 700),
        ("empty.jpg", b""),
        ("\u00e4\u00f6.jpg", b"y" * 512),
        (entry("folder", tarfile.DIRTYPE), b""),
        (entry("link", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (entry("hard", tarfile.LNKTYPE, "a.jpg"), b""),
        (entry("device", tarfile.CHRTYPE), b""),
        ("d/" * 45 + "prefix/" + "n" * 60 + ".png", b"z"),
        ("last.cls", b"7"),
    ]
    if kind != "ustar":
        content[4:4] = [(LONG, b"long"), (entry("l", tarfile.SYMTYPE, "t/" * 90), b"")]
    data = write_tar(content, kind=kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [(m.name, m.offset_data, m.size, m.isreg(), m.isdir()) for m in tar]
    ours = found(data)
    assert [(m.name.decode().rstrip("/"), *m[1:5]) for m in ours] == theirs
    assert all(zlib.crc32(data[m.first - BLOCK : m.first]) == m.check for m in ours)


def test_numbers_of_old_tars_and_of_large_members_are_read():
    data = bytearray(write_tar([("a.jpg", b"x" * 9)]))
    with_binary = data.copy()
    with_binary[124:136] = b"\x80" + (9).to_bytes(11)
    _sum_up(with_binary)
    signed = bytearray(write_tar([("\u00e4.jpg", b"x" * 9)]))
    total = sum(signed[:148] + b" " * 8 + signed[156:512])
    high = sum(byte > 127 for byte in signed[:512])
    signed[148:156] = b"%06o\0 " % (total - 256 * high)
    for one in (data, with_binary, signed):
        assert [member.size for member in found(bytes(one))] == [9]


def test_a_tar_without_an_end_is_whole_and_one_of_zeros_is_empty():
    data = write_tar([("a", b"x"), ("b", b"y")], end=False)
    assert [member.name for member in found(data)] == [b"a", b"b"]
    assert found(bytes(10240)) == []


WHOLE = write_tar([("a.jpg", b"x" * 600), ("b.jpg", b"y" * 600), ("c.jpg", b"z" * 600)])
STARTS = [member.first - BLOCK for member in found(WHOLE)]


def _sum_up(data, first=0):
    data[first + 148 : first + 156] = b" " * 8
    data[first + 148 : first + 156] = b"%06o\0 " % sum(data[first : first + BLOCK])


def _with(start, stop, data, summed=None):
    new = bytearray(WHOLE)
    new[start:stop] = data
    if summed is not None:
        _sum_up(new, summed)
    return bytes(new)


HUGE = _with(STARTS[2] + 124, STARTS[2] + 136, b"\x80" + b"\0" * 4 + b"\xff" * 7, STARTS[2])
DAMAGED = {
    "cut in data": (WHOLE[: STARTS[2] + 700], ["a.jpg", "b.jpg"], "it is cut: c.jpg has 600 bytes"),
    "cut behind data": (WHOLE[: STARTS[2] - 100], ["a.jpg", "b.jpg"], "within a block"),
    "cut in a header": (WHOLE[: STARTS[2] + 100], ["a.jpg", "b.jpg"], "cut within a header"),
    "flipped in a header": (_with(STARTS[1], STARTS[1] + 1, b"B"), ["a.jpg"], "header at byte"),
    "a hole": (_with(STARTS[1], STARTS[2], bytes(1536)), ["a.jpg"], "there is a hole in it"),
    "two in a row": (WHOLE + WHOLE, ["a.jpg", "b.jpg", "c.jpg"], "several tars in a row"),
    "a size without end": (HUGE, ["a.jpg", "b.jpg"], "it is cut: c.jpg has 72057594037927935 b"),
    "a negative size": (
        _with(STARTS[1] + 124, STARTS[1] + 136, b"\xff" * 12, STARTS[1]),
        ["a.jpg"],
        "no size",
    ),
    "empty": (b"", [], "it is empty"),
    "short": (b"version https://git-lfs", [], "it has 23 bytes and is no tar"),
    "no tar": (b"<!doctype html>" * 99, [], "it is no tar"),
    "compressed": (b"\x1f\x8b" + bytes(range(256)) * 9, [], "it is a compressed file and no tar"),
    "zeros without end": (bytes(2**21), [], "seems to end at byte 0"),
}


@pytest.mark.promise("R16")
@pytest.mark.parametrize("case", DAMAGED)
def test_what_lies_before_the_damage_is_found_and_the_damage_told(case):
    data, names, said = DAMAGED[case]
    before, why = damage(data)
    assert before == names
    assert said in why


@pytest.mark.promise("S4")
def test_what_describes_a_member_is_bounded_and_damaged_names_are_told():
    name = tarfile.TarInfo("././@LongLink")
    name.type = tarfile.GNUTYPE_LONGNAME
    data = write_tar([(name, b"n" * (2**20 + 1)), ("a", b"")])
    assert "bytes describe the member" in damage(data)[1]
    for record in (b"12 path=a", b"99 path=a\n", b"10 size=x\n", b"-3 path=a\n", b"0 path=a\n"):
        pax = entry("p", tarfile.XHDTYPE)
        data = write_tar([(pax, record), ("a", b"")])
        assert "at byte 512" in damage(data)[1], record


@pytest.mark.promise("S4")
def test_whatever_is_flipped_or_cut_what_is_found_lies_within_the_file():
    chance, damaged = random.Random(0), 0
    whole = write_tar([("a.jpg", b"x" * 600), (LONG, b"y" * 600), ("c.jpg", b"z" * 5)], kind="pax")
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(0, 4)):
            first = chance.randrange(len(data))
            data[first : first + chance.choice((1, 8, 512))] = chance.randbytes(
                chance.choice((1, 8, 512))
            )
        data = bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        try:
            for member in members(partial(part, data), len(data)):
                if member.is_file:
                    assert BLOCK <= member.first <= member.first + member.size <= len(data)
        except DamagedTarError:
            damaged += 1
    assert 100 < damaged < 400
