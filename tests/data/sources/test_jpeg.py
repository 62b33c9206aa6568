"""Which JPEGs a device's decoder is given: plain ones, whole, without what it would rotate by."""

import io

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.sources.decode import decode_fast
from beit_fast.data.sources.jpeg import Jpeg, plain_jpeg

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def segment(data: bytes, marker: int) -> tuple[int, int]:
    """Where the first of its kind begins and ends."""
    start = data.index(bytes((0xFF, marker)))
    return start, start + 2 + int.from_bytes(data[start + 2 : start + 4])


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes((value,)) + data[at + 1 :]


@pytest.fixture
def jpeg(make_image, make_file):
    return lambda **options: make_file(make_image(40, 50), "JPEG", **options)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS.values(), ids=SUBSAMPLINGS)
def test_baseline_files_are_plain_with_their_size(jpeg, subsampling):
    data = jpeg(subsampling=subsampling)
    assert plain_jpeg(data) == Jpeg(40, 50, data)


def test_grey_and_restart_markers_are_plain(make_image, make_file, jpeg):
    data = make_file(make_image(33, 20).convert("L"), "JPEG")
    assert plain_jpeg(data) == Jpeg(33, 20, data)
    data = jpeg(restart_marker_blocks=2)
    assert b"\xff\xdd" in data
    assert plain_jpeg(data) == Jpeg(40, 50, data)


def test_the_photographs_of_the_package_are_plain(photographs):
    for data in photographs:
        found = plain_jpeg(data)
        assert (found.height, found.width) == decode_fast(data).shape[:2]


def test_what_a_decoder_would_rotate_by_is_cut_out(make_image, make_file):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = make_file(make_image(40, 50), "JPEG", exif=exif)
    found = plain_jpeg(data)
    assert (found.height, found.width) == (40, 50)
    assert b"Exif" in data
    assert b"Exif" not in found.data
    assert np.array_equal(decode_fast(found.data), decode_fast(data))
    assert Image.open(io.BytesIO(found.data)).getexif() == {}


def odd_files(make_image, make_file) -> dict[str, tuple[str, bytes]]:
    image = make_image(40, 50)
    data = make_file(image, "JPEG")
    frame, _ = segment(data, 0xC0)
    scan, _ = segment(data, 0xDA)
    return {
        "progressive": ("progressive", make_file(image, "JPEG", progressive=True)),
        "cmyk": ("CMYK", make_file(image.convert("CMYK"), "JPEG")),
        "rgb": ("colours other than YCbCr", make_file(image, "JPEG", keep_rgb=True)),
        "png": ("not JPEG", make_file(image, "PNG")),
        "empty": ("not JPEG", b""),
        "cut": ("no end marker", data[:-200]),
        "more behind": ("no end marker", data + b"\n"),
        "extended": ("not baseline", changed(data, frame + 1, 0xC1)),
        "12 bits": ("not 8 bits or without a size", changed(data, frame + 4, 12)),
        "no height": (
            "not 8 bits or without a size",
            changed(changed(data, frame + 5, 0), frame + 6, 0),
        ),
        "sampling": ("unusual sampling of colours", changed(data, frame + 11, 0x41)),
        "scans": ("several scans", changed(data, scan + 4, 1)),
        "components": ("damaged header", changed(data, frame + 9, 2)),
        "header cut": ("damaged header", data[:frame] + b"\xff"),
        "no frame": ("damaged header", data[:frame] + data[scan:]),
        "two frames": ("damaged header", data[:frame] + data[frame:scan] + data[frame:]),
        "rubbish": ("damaged header", data[:frame] + b"\0\0" + data[frame:]),
        "ends early": ("damaged header", data[:frame] + b"\xff\xd9"),
    }


CASES = (
    *("progressive", "cmyk", "rgb", "png", "empty", "cut", "more behind", "extended", "12 bits"),
    *("no height", "sampling", "scans", "components", "header cut", "no frame", "two frames"),
    *("rubbish", "ends early"),
)


@pytest.mark.parametrize("case", CASES)
def test_everything_else_is_not_plain_and_it_is_said_why(make_image, make_file, case):
    files = odd_files(make_image, make_file)
    assert files.keys() == set(CASES)
    why, data = files[case]
    assert plain_jpeg(data) == why


def test_no_bytes_make_the_header_be_read_for_ever_or_fail(jpeg):
    """Flipped, cut and random headers give an answer."""
    rng = np.random.default_rng(0)
    data = jpeg()
    for _ in range(3000):
        spoiled = bytearray(data[: rng.integers(3, 700)] if rng.random() < 0.5 else data)
        for at in rng.integers(2, len(spoiled), 3):
            spoiled[at] = rng.integers(0, 256)
        found = plain_jpeg(bytes(spoiled))
        assert isinstance(found, str | Jpeg)
        assert found
