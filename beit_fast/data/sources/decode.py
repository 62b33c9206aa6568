"""Bytes of an image file -> RGB pixels, by two decoders that agree.

`decode_pillow` is the reference; `decode_fast` gives JPEGs to simplejpeg where that is installed,
else to torchcodec (the same libjpeg-turbo, and no PIL image on the way), and everything else to
Pillow. All three give the same bits, so which are there changes nothing but the time: two views of
a photograph take a tenth less by simplejpeg than by torchcodec.

What is decided here, the same for both:
- formats   JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, recognised by their first bytes, never by name
- colour    as Pillow's `convert("RGB")`, which is what the official pipeline calls: grey is
            repeated, palettes looked up, CMYK converted, alpha dropped (not composed)
- 16 bits   a grey image keeps its high byte, as Pillow does for RGB (its own conversion of grey
            clips at 255 and would give white); 32-bit pixels have no agreed range and are refused
- frames    the first of an animation, the first page of a TIFF
- EXIF      orientation is not applied, as in the official pipeline: torchcodec would rotate, so
            the segment is cut out of JPEGs (which also spares Pillow damaged ones); a TIFF's
            orientation is part of its format, and Pillow applies it
- bombs     an image of more than `max_pixels` is refused from its header, before decoding, and so
            is a JPEG of more scans than anything writes: 31 bytes a scan, 35 ms at 16 megapixels
"""

import functools
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from beit_fast.data.sources.limits import MAX_PIXELS
from beit_fast.files import is_archive

_SCAN, _MAX_SCANS = b"\xff\xda", 100  # a marker; libjpeg's own tools write at most that many
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_EXIF, _EXIF_WITHIN = b"Exif\0\0", 2**17  # bytes; a segment has at most half of that
_STRIP_PIXELS = 2**20
_ORIENTATION = 0x0112  # of EXIF's tags
# The format's own class instead of Image.open: that one looks up every plugin Pillow has, tries
# them on hostile bytes, and warns of large images by a process-wide limit that is not ours.
_FORMATS = (
    (_JPEG, JpegImagePlugin.JpegImageFile),
    (_PNG, PngImagePlugin.PngImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
    *((b"P%d" % digit, PpmImagePlugin.PpmImageFile) for digit in range(1, 7)),
)


class BadImageError(ValueError):
    """This file cannot be used; the message says why. The loader puts another in its place."""


def decode_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in mode RGB.

    Raises BadImageError if the bytes are no complete image of a known format, or too large a one.
    """
    return _decode_pillow(data, max_pixels, 1)


def _decode_pillow(data: bytes, max_pixels: int, shrink: int) -> Image.Image:
    if data.startswith(_JPEG):
        data, _, many_scans, _ = _without_app1(data)
        if many_scans:
            _check_scans(data)
    return _decode(data, max_pixels, _to_rgb, shrink)


def decode_png(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, int, int]:
    """A PNG as it is stored, in Pillow's mode for it, its bits per channel and its colour type.

    Raises as `decode_pillow` does, and for every other format.
    """
    if data and not data.startswith(_PNG):
        raise BadImageError("not a PNG image: save it as one, which loses nothing")
    image = _decode(data, max_pixels, lambda image: image.copy())
    depth, colour_type = data[24:26]  # of its header, which comes first
    return image, depth, colour_type


class Header(NamedTuple):
    """What a file says of its image; its pixels may be damaged."""

    format: str  # JPEG, PNG, WEBP, GIF, BMP, TIFF or PPM
    mode: str  # Pillow's, of the pixels as they are stored: RGB, L, CMYK, P ...
    width: int
    height: int


def read_header(data: bytes) -> Header:
    """Without decoding: 20 us for a JPEG. Raises BadImageError, but for size and scans."""
    if data.startswith(_JPEG):
        data, *_ = _without_app1(data)
    try:
        with _open(data) as image:
            return Header(image.format, image.mode, *image.size)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # as in `_decode`
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def exif_orientation(data: bytes) -> int:
    """What the EXIF of a JPEG says of how to turn it, 1 to 8; 1, upright, where it says nothing.

    Read here, because Pillow warns of damaged EXIF, of which nothing else takes notice.
    """
    start = data.find(_EXIF, 0, _EXIF_WITHIN)
    if not data.startswith(_JPEG) or start < 0:
        return 1
    exif = data[start + len(_EXIF) :]
    order = "little" if exif.startswith(b"II") else "big"

    def number(position: int, size: int) -> int:
        return int.from_bytes(exif[position : position + size], order)

    first = number(4, 4)
    for entry in range(first + 2, first + 2 + 12 * number(first, 2), 12):
        if number(entry, 2) == _ORIENTATION:
            turned = number(entry + 8, 2)
            return turned if turned in range(1, 9) else 1
    return 1


def _decode(
    data: bytes, max_pixels: int, made: Callable[[Image.Image], Image.Image], shrink: int = 1
) -> Image.Image:
    try:
        with _open(data) as image:
            check_size(*image.size, max_pixels)
            if shrink > 1:  # Pillow takes the largest of 8, 4 and 2 that leaves so many pixels
                image.draft("RGB", (image.width // shrink, image.height // shrink))
            image.load()
            return made(image)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # damaged files make Pillow raise nearly every builtin exception
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def decode_fast(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image as uint8 (height, width, 3), contiguous. Raises as `decode_pillow` does, and
    ImportError for a JPEG where torchcodec is not installed.

    Equal to `decode_pillow` for everything but CMYK JPEGs, which may differ by one level.
    """
    if data.startswith(_JPEG):
        data, size, many_scans, components = _without_app1(data)
        if size is not None:
            check_size(*size, max_pixels)
            if many_scans:
                _check_scans(data)
            # Of CMYK they differ by a level, and torchcodec's is what it was before.
            image = _simplejpeg(data) if components < 4 else None
            if image is None:
                image = _torchcodec_jpeg(data)
            if image is not None:
                return image
    return pixels_of(decode_pillow(data, max_pixels))


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from the frame header of a JPEG; None of anything else, and of a damaged
    header."""
    if not data.startswith(_JPEG):
        return None
    _, size, *_ = _without_app1(data)
    return size[::-1] if size is not None and min(size) > 0 else None


def decode_shrunk(data: bytes, shrink: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A JPEG at one part in `shrink` of its height and width, 2, 4 or 8, rounded up; neither may
    have fewer pixels than that.

    uint8 (ceil(height / shrink), ceil(width / shrink), 3). Raises as `decode_pillow` does; the
    limits are those of the whole image.

    Each block of 8 x 8 pixels gives its lowest frequencies alone, near the mean of the pixels that
    a new one stands for. By simplejpeg where it is installed, else by Pillow, to the same bits:
    torchcodec decodes at full size only.
    """
    if data.startswith(_JPEG):
        coded, size, many_scans, components = _without_app1(data)
        # simplejpeg chooses among eighths by their pixels, which below eight may be the same.
        if size is not None and min(size) >= 8 and components < 4:
            check_size(*size, max_pixels)
            if many_scans:
                _check_scans(coded)
            width, height = (-(-side // shrink) for side in size)
            image = _simplejpeg(coded, min_height=height, min_width=width, min_factor=shrink)
            if image is not None:
                return image
    return pixels_of(_decode_pillow(data, max_pixels, shrink))


def pixels_of(image: Image.Image) -> np.ndarray:
    """As np.array, which makes bytes of the whole image on the way: of 64 megapixels another
    183 MiB. So in strips."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(height, top + rows)))
        pixels[top : top + rows] = strip
    return pixels


def _simplejpeg(data: bytes, **least: int) -> np.ndarray | None:
    """Pixels, or None where it is not installed, or gives up, which it does of all that is damaged:
    torchcodec and Pillow say then whether it can be used."""
    decode_jpeg = import_simplejpeg()
    if decode_jpeg is None:
        return None
    try:
        return decode_jpeg(data, colorspace="RGB", **least)
    except ValueError:
        return None


@functools.cache
def import_simplejpeg() -> Callable[..., np.ndarray] | None:
    """Its decoder, or None where it is not installed: the extra `jpeg`."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg


def _torchcodec_jpeg(data: bytes) -> np.ndarray | None:
    """Pixels, or None where torchcodec gives up: then Pillow says what is wrong, or copes, and
    both decoders agree on which files are bad. Raises ImportError where there is no torchcodec."""
    decode_jpeg = import_decode_jpeg()
    # A bytearray is writable: torch would warn of a read-only buffer.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image = decode_jpeg(encoded, mode="RGB")
    except RuntimeError:
        return None
    return image.permute(1, 2, 0).contiguous().numpy()


@functools.cache
def import_decode_jpeg() -> Callable[..., torch.Tensor]:
    """Imported by the first JPEG: masks, models and benches run where it is not installed."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:  # it raises all three for its libraries
        raise ImportError(
            f"JPEGs are decoded by torchcodec, which cannot be imported ({error}): pip install "
            "'torchcodec>=0.17', or decode with decode_pillow, as views of kind 'reference' do"
        ) from error
    return decode_jpeg


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImageError("the file is empty")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    for signature, image_file in _FORMATS:
        if data.startswith(signature):
            return image_file(io.BytesIO(data))
    if is_archive(data):
        raise BadImageError("an archive: unpack it, and give the folder that comes of it")
    raise BadImageError("not a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise BadImageError for an image that is too large, as its header says."""
    if width * height > max_pixels:
        raise BadImageError(
            f"{width}x{height} pixels are more than max_pixels={max_pixels}: shrink the image or "
            "raise the limit"
        )


def _check_scans(data: bytes) -> None:
    """Each is a pass over all coefficients. Its marker stands nowhere in what is coded."""
    coded = np.frombuffer(data, np.uint8)  # 45 us for 110 kB; data.count takes 215
    count = np.count_nonzero(coded[np.flatnonzero(coded[:-1] == _SCAN[0]) + 1] == _SCAN[1])
    if count > _MAX_SCANS:
        raise BadImageError(f"it has {count} scans, more than {_MAX_SCANS}: save the image anew")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError("its pixels have 32 bits and no agreed range: convert it to 8 or 16")
    # Pillow warns when a palette with an alpha value per entry loses it; the colours are the same.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _without_app1(data: bytes) -> tuple[bytes, tuple[int, int] | None, bool, int]:
    """A JPEG without its APP1 segments (EXIF, XMP), (width, height) from its frame header, whether
    it may have many scans (it is progressive, or its first has not all components), and how many
    components it has.

    Size is None if the header is damaged; the bytes are then as they came.
    """
    size, sequential, components = None, False, 0
    segments = []
    position = 2
    try:
        while True:
            # Between segments decoders skip to the next marker, and over fill bytes.
            if data[position] != 0xFF:
                position = data.index(b"\xff", position)
            while (marker := data[position + 1]) == 0xFF:
                position += 1
            if marker in (0xD9, 0xDA):  # end of image, start of scan: no segments after it
                break
            if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # these stand alone
                position += 2
                continue
            end = position + 2 + (data[position + 2] << 8 | data[position + 3])
            if marker == 0xE1:
                segments.append((position, end))
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # frame header
                height = int.from_bytes(data[position + 5 : position + 7])
                width = int.from_bytes(data[position + 7 : position + 9])
                size = (width, height)
                sequential, components = marker in (0xC0, 0xC1), data[position + 9]
            position = end
    except (ValueError, IndexError):
        return data, None, True, 0
    many_scans = not sequential or data[position + 4 : position + 5] < bytes((components,))
    if segments:
        kept = bytearray(data)
        for start, end in reversed(segments):
            del kept[start:end]
        data = bytes(kept)
    return data, size, many_scans, components
