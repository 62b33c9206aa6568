"""Small files that ask for much memory or time."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import bombed
from beit_fast.data.sources.decode import BadImageError

MEBIBYTE = 2**20
EXTRA = 400 * MEBIBYTE  # address space that the child may take
SECONDS = 20  # for one file by one decoder; what does not end, ends never


def zeros(mebibytes: int) -> bytes:
    """A zlib stream of so many, a thousandth of that long; its checksum is missing."""
    packer, block = zlib.compressobj(), bytes(16 * MEBIBYTE)
    first, again = (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * (mebibytes // 16 - 1) + packer.flush()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 2) -> bytes:
    def packed(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed(*part) for part in parts)


def rows(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IDAT", zlib.compress(bytes((3 * width + 1) * height))


def tiff(width: int, height: int, *, length: int = 3, next_page: int = 0) -> bytes:
    """A page of one strip of RGB."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 2), (273, 8), (277, 3)]
    tags += [(278, height), (279, length)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    page = struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_page)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + page


def bmp(width: int, height: int, *, packed: int = 0, colours: int = 0) -> bytes:
    bits = 8 if packed or colours else 24
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, packed, 0, 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header + bytes(1024)


def gif(screen: int, frame: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\0;"


def webp(width: int, height: int) -> bytes:
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(*segments: tuple[int, bytes], size: tuple[int, int] | None = None) -> bytes:
    """A small one with segments before its frame, whose header may claim another size."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 40, 200)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    if size:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", *size)
    added = b"".join(
        bytes((0xFF, kind)) + (len(body) + 2).to_bytes(2) + body for kind, body in segments
    )
    return bytes(data[:2]) + added + bytes(data[2:])


def scans(count: int) -> bytes:
    """A progressive JPEG of 16 megapixels whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (4_000, 4_000), 90).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + count * last + data[-2:]


REFUSED: dict[str, Callable[[], bytes]] = {
    "png-60000": lambda: png(60_000, 60_000, rows(8, 8)),
    "png-2147483647": lambda: png(2**31 - 1, 2**31 - 1, rows(8, 8)),
    "png-text": lambda: png(8, 8, (b"zTXt", b"a\0\0" + zeros(1024)), rows(8, 8)),
    "png-international-text": lambda: png(
        8, 8, (b"iTXt", b"a\0\1\0\0\0" + zeros(1024)), rows(8, 8)
    ),
    "png-profile": lambda: png(8, 8, (b"iCCP", b"a\0\0" + zeros(1024)), rows(8, 8)),
    "jpeg-65500": lambda: jpeg(size=(65_500, 65_500)),
    "jpeg-100000-scans": lambda: scans(100_000),
    "gif-screen": lambda: gif(65_535, 4),
    "webp-16384": lambda: webp(2**24, 2**8),
    "tiff-60000": lambda: tiff(60_000, 60_000),
    "tiff-strip-of-4-gigabytes": lambda: tiff(4_000, 4_000, length=2**32 - 1),
    "bmp-60000": lambda: bmp(60_000, 60_000),
    "bmp-runs": lambda: bmp(60_000, 60_000, packed=1),
    "ppm-99999": lambda: b"P6 99999 99999 255\n",
    "ppm-a-million-digits": lambda: b"P6 " + b"9" * 1_000_000 + b" 1 255\n",
    "ppm-plain": lambda: b"P3 7000 7000 255\n1 2 3",
}
# Within the limits: these become images, or are damaged, and cost little.
BORNE: dict[str, Callable[[], bytes]] = {
    "png-pixels-beyond-the-image": lambda: png(8, 8, (b"IDAT", zeros(1024))),
    "png-200000-chunks": lambda: png(8, 8, *[(b"tEXt", b"a\0b")] * 200_000, rows(8, 8)),
    "png-frames": lambda: png(8, 8, (b"acTL", struct.pack(">II", 2**31 - 1, 0)), rows(8, 8)),
    "png-16-megapixels": lambda: png(4_000, 4_000, rows(4_000, 4_000)),
    "jpeg-20000-segments": lambda: jpeg(*[(0xE1, b"Exif\0\0")] * 10_000, *[(0xFE, b"")] * 10_000),
    "gif-frame-beyond-the-screen": lambda: gif(4, 65_535),
    "tiff-pages-in-a-circle": lambda: tiff(1, 1, next_page=16),
    "bmp-colours": lambda: bmp(8, 8, colours=2**31 - 1),
}


def outcomes(folder: Path, files: dict[str, bytes], extra: int = EXTRA) -> dict[str, list]:
    """By name and decoder what became of each file, and the seconds, in a process whose memory ends
    after `extra` bytes more than it has. It is a new one: what a fork has freed it could fill.

    One that dies has told of those before.
    """
    for name, data in (files | {"small.jpeg": jpeg()}).items():
        (folder / name).write_bytes(data)
    command = [sys.executable, bombed.__file__, str(folder), str(extra), str(4 * SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"it died after {found[-1:]}: {done.stderr[-500:]}"
    return {name: rest for name, *rest in found}


@pytest.mark.promise("S5")
def test_bombs_neither_end_the_process_nor_take_its_memory(tmp_path):
    made = {name: make() for name, make in (REFUSED | BORNE).items()}
    assert max(map(len, made.values())) < 4 * MEBIBYTE
    found = outcomes(tmp_path, made)
    small = [found.pop(name)[0] for name in list(found) if name.startswith("small")]
    assert small == ["image", "image"]
    assert len(found) == 2 * len(made) == 48
    for name, (became, seconds) in found.items():
        if name.split()[0] in REFUSED:
            assert became == BadImageError.__name__, name
        assert became in (BadImageError.__name__, "image"), name
        assert seconds < SECONDS, name
    assert found["png-16-megapixels decode_fast"][0] == "image"
    assert found["jpeg-20000-segments decode_fast"][0] == "image"


@pytest.mark.promise("S5")
def test_the_process_whose_memory_ends_notices_what_takes_more(tmp_path):
    """Else the test above would pass whatever a decoder takes."""
    large = {"png": png(6_000, 6_000, rows(6_000, 6_000))}
    found = outcomes(tmp_path, large, extra=64 * MEBIBYTE)
    assert found["png decode_fast"][0] == "MemoryError"
