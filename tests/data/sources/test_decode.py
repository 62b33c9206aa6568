import importlib.abc
import io
import random
import re
import struct
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.sources import decode as decoding
from beit_fast.data.sources.decode import (
    BadImageError,
    decode_fast,
    decode_pillow,
    import_decode_jpeg,
)
from beit_fast.data.sources.limits import MAX_PIXELS
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import two_views

ORIENTATION = 0x0112


@pytest.fixture(autouse=True, params=["simplejpeg", "torchcodec"])
def decoder(request, monkeypatch):
    """With the extra `jpeg`, and without: all that is said of `decode_fast` holds of both."""
    if request.param == "torchcodec":
        monkeypatch.setattr(decoding, "import_simplejpeg", lambda: None)
        return None
    used = []
    decode_jpeg = decoding.import_simplejpeg()

    def counted(data, **options):
        pixels = decode_jpeg(data, **options)
        used.append(len(data))
        return pixels

    monkeypatch.setattr(decoding, "import_simplejpeg", lambda: counted)
    return used


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends after its header: whoever decodes it fails."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def jpeg_header(make_file, make_image, width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    data = bytearray(make_file(make_image(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def both(data: bytes, **options) -> np.ndarray:
    """Decoded by both, which must agree."""
    reference = np.asarray(decode_pillow(data, **options))
    fast = decode_fast(data, **options)
    assert fast.dtype == np.uint8
    assert fast.flags.c_contiguous
    assert np.array_equal(fast, reference)
    return fast


def test_photographs_decode_to_the_same_pixels_by_both_and_by_pillow_itself(photographs):
    for data in photographs:
        assert np.array_equal(both(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_simplejpeg_decodes_what_it_gives_the_same_bits_of_and_no_cmyk(
    decoder, photographs, make_file, make_image
):
    """Of CMYK it differs by a level from torchcodec, whose bits those images had before."""
    decode_fast(photographs[0])
    decode_fast(make_file(make_image(40, 32).convert("L"), "JPEG"))
    assert decoder is None or len(decoder) == 2
    cmyk = make_file(make_image(40, 32).convert("CMYK"), "JPEG")
    assert np.abs(decode_fast(cmyk).astype(int) - np.asarray(decode_pillow(cmyk))).max() <= 1
    zeroed = bytearray(photographs[0])
    zeroed[20_000:20_500] = bytes(500)  # it gives up, the others decode it
    assert np.array_equal(decode_fast(bytes(zeroed)), np.asarray(decode_pillow(bytes(zeroed))))
    assert decoder is None or len(decoder) == 2


@pytest.mark.promise("R15")
@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 90}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": 0}),
        ("JPEG", "L", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "P", {"transparency": bytes(range(256))}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
        ("PPM", "L", {}),
    ],
    ids=str,
)
def test_every_kind_of_image_becomes_what_pillow_converts_to_rgb(
    format, mode, options, make_image, make_file
):
    image = make_image(33, 47).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.arange(33 * 47, dtype=np.uint8).reshape(33, 47)))
    data = make_file(image, format, **options)
    with warnings.catch_warnings():  # Pillow's, where a palette loses its transparency
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(both(data), np.asarray(expected))


@pytest.mark.promise("R15")
def test_a_cmyk_jpeg_decodes_within_one_level(make_image, make_file):
    data = make_file(make_image(40, 60).convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int32)
    assert np.array_equal(np.asarray(decode_pillow(data)), expected)
    assert np.abs(decode_fast(data) - expected).max() <= 1


@pytest.mark.promise("R15")
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(format, make_file):
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    data = make_file(Image.fromarray(ramp), format)
    assert np.array_equal(both(data), np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_thirty_two_bit_pixels_are_refused_with_the_reason(make_file):
    data = make_file(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    for decode in (decode_pillow, decode_fast):
        with pytest.raises(BadImageError, match="32 bits"):
            decode(data)


@pytest.mark.promise("R15")
@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(format, make_image, make_file):
    frames = [make_image(20, 30, seed) for seed in range(3)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = make_file(frames[0], format, save_all=True, append_images=frames[1:], **options)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(both(data), np.asarray(expected))
    # GIF has 256 colours; the others keep every pixel
    assert np.abs(both(data) - np.asarray(frames[0], np.int32)).mean() < (
        20 if format == "GIF" else 1
    )


@pytest.mark.promise("R15")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_not_applied(format, orientation, make_image, make_file):
    image = make_image(24, 40)
    options = {"lossless": True} if format == "WEBP" else {}
    rotated = make_file(image, format, exif=exif(orientation), **options)
    assert np.array_equal(both(rotated), both(make_file(image, format, **options)))


def test_a_damaged_exif_segment_neither_warns_nor_spoils_the_image(make_image, make_file):
    image = make_image(24, 40)
    damaged = make_file(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12" * 30)
    assert np.array_equal(both(damaged), both(make_file(image, "JPEG")))


def test_a_jpeg_named_or_padded_oddly_is_a_jpeg(make_image, make_file):
    data = make_file(make_image(24, 40), "JPEG")
    segment = b"\xff\xff\xff\xfe\x00\x04ab"  # fill bytes before a comment
    assert np.array_equal(both(data[:2] + segment + data[2:]), both(data))
    assert np.array_equal(both(data + b"trailing bytes"), both(data))


@pytest.mark.promise("R15")
def test_sizes_from_one_pixel_to_long_strips_decode(make_image, make_file):
    for height, width in ((1, 1), (1, 4000), (4000, 1), (7, 3)):
        for format in ("PNG", "JPEG"):
            assert both(make_file(make_image(height, width), format)).shape == (height, width, 3)


@pytest.mark.promise("S5")
def test_a_jpeg_of_as_many_scans_as_anything_writes_is_an_image(make_image, make_file):
    data = make_file(make_image(40, 30), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    most = 100 - data.count(b"\xff\xda")
    assert decode_fast(data[:-2] + most * last + data[-2:]).shape == (40, 30, 3)
    for decode in (decode_pillow, decode_fast):
        with pytest.raises(BadImageError, match="it has 101 scans, more than 100: save the image"):
            decode(data[:-2] + (most + 1) * last + data[-2:])


def test_a_large_image_is_the_same_and_is_not_made_twice(make_image, make_file):
    data = make_file(make_image(2100, 1003), "PNG", compress_level=0)
    pixels = both(data)
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))
    tracemalloc.start()
    try:
        decode_fast(data)
        peak = tracemalloc.get_traced_memory()[1]  # NumPy's and Python's, without Pillow's own
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * pixels.nbytes  # of which one is the file, uncompressed


@pytest.mark.promise("R14")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"This is not an image, whatever its name says.\n" * 20, "not a JPEG"),
        (b"\xff\xd8\xff", "."),
        (b"\xff\xd8\xff\xe0\x00", "."),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "."),
        (b"GIF89a", "."),
        (b"BM", "."),
        (b"II*\0\x08\0\0\0", "."),
        (b"P6\n3 -1\n255\n", "."),
    ],
    ids=["empty", "text", "jpeg", "jpeg2", "png", "webp", "gif", "bmp", "tiff", "ppm"],
)
def test_a_file_that_is_no_image_is_bad_with_a_reason(data, reason):
    for decode in (decode_pillow, decode_fast):
        with pytest.raises(BadImageError, match=reason):
            decode(data)


@pytest.mark.promise("R14")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_bad_for_both(format, share, make_image, make_file):
    data = make_file(make_image(200, 300), format)
    for decode in (decode_pillow, decode_fast):
        with pytest.raises(BadImageError):
            decode(data[: int(share * len(data))])


def test_both_agree_on_every_cut_and_on_flipped_bytes(make_image, make_file):
    data = make_file(make_image(64, 48), "JPEG", quality=80)
    rng = np.random.default_rng(0)
    cuts = [data[:end] for end in range(0, len(data), 13)] + [data[:-1], data[:-2]]
    flips = []
    for _ in range(150):
        flipped = bytearray(data)
        flipped[rng.integers(2, len(data))] ^= 1 << rng.integers(8)
        flips.append(bytes(flipped))
    outcomes = set()
    for broken in cuts + flips:
        results = []
        for decode in (decode_pillow, decode_fast):
            try:
                results.append(np.asarray(decode(broken)))
            except BadImageError:
                results.append(None)
        ours, theirs = results
        assert (ours is None) == (theirs is None)
        assert ours is None or np.array_equal(ours, theirs)
        outcomes.add(ours is None)
    assert outcomes == {True, False}


@pytest.mark.promise("S5")
def test_a_bomb_is_refused_from_its_header(make_image, make_file):
    for data in (
        png_header(20_000, 20_000),
        png_header(12_000, 12_000),  # where Pillow only warns
        jpeg_header(make_file, make_image, 65_000, 65_000),
        jpeg_header(make_file, make_image, 8_001, 8_000),
    ):
        for decode in (decode_pillow, decode_fast):
            with pytest.raises(BadImageError, match=f"more than max_pixels={MAX_PIXELS}"):
                decode(data)


def test_the_limit_of_pixels_is_settable(make_image, make_file):
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = make_file(make_image(10, 20), format)
        assert both(data, max_pixels=200).shape == (10, 20, 3)
        for decode in (decode_pillow, decode_fast):
            with pytest.raises(BadImageError, match="20x10 pixels are more than max_pixels=199"):
                decode(data, max_pixels=199)


@pytest.mark.parametrize("error", [ModuleNotFoundError, OSError, RuntimeError])
def test_a_jpeg_without_torchcodec_says_what_to_do_and_that_works(
    make_file, make_image, monkeypatch, error
):
    """Not installed, or its libraries do not load. Nothing else needs it."""

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchcodec"):
                raise error("cannot be loaded")

    monkeypatch.setattr(decoding, "import_simplejpeg", lambda: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    import_decode_jpeg.cache_clear()
    jpeg = make_file(make_image(40, 32), "JPEG")
    try:
        with pytest.raises(ImportError, match="cannot be loaded") as raised:
            decode_fast(jpeg)
        message = str(raised.value)
        requirement = re.search(r"pip install '([^']+)'", message)[1]
        setup = Path(__file__).resolve().parents[3] / "setup.py"
        assert f'"{requirement}"' in setup.read_text(encoding="utf-8")
        assert "decode_pillow" in message
        assert decode_pillow(jpeg).size == (32, 40)
        assert "views of kind 'reference'" in message
        config = ViewConfig(kind="reference", size=16, token_size=8)
        assert two_views(jpeg, config, random.Random(0))["images"].shape == (16, 16, 3)
        assert decode_fast(make_file(make_image(40, 32), "PNG")).shape == (40, 32, 3)
    finally:
        import_decode_jpeg.cache_clear()
