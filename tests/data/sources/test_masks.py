"""Ids and labels of mask files, and masks beside their images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from beit_fast.data.sources.decode import BadImageError, exif_orientation
from beit_fast.data.sources.masks import Translation, decode_pair, mask_ids
from beit_fast.labels import IGNORE
from masked_images import encoded, picture

IDS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def png(depth: int, rows: list[bytes], width: int, colour_type: int = 0) -> bytes:
    """A PNG of packed rows, without Pillow, which writes some depths differently."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_grey_masks_of_every_depth_have_the_numbers_that_the_file_has():
    assert mask_ids(png(1, [b"\xa0", b"\x40"], 3)).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert mask_ids(png(2, [bytes([0b00_01_10_11])], 4)).tolist() == [[0, 1, 2, 3]]
    assert mask_ids(png(4, [b"\x0f\x91"], 4)).tolist() == [[0, 15, 9, 1]]
    assert mask_ids(png(8, [bytes([0, 7, 255])], 3)).tolist() == [[0, 7, 255]]
    assert mask_ids(png(16, [struct.pack(">3H", 0, 300, 65535)], 3)).tolist() == [[0, 300, 65535]]
    assert mask_ids(encoded(np.array([[True, False]]))).tolist() == [[1, 0]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_ids_of_a_palette_mask_are_its_indices(bits):
    ids = np.minimum(IDS, 2**bits - 1)
    image = Image.fromarray(ids).convert("P")
    image.putpalette([level for colour in range(256) for level in (255 - colour, 9, colour)])
    file = io.BytesIO()
    image.save(file, "PNG", bits=bits)
    assert file.getvalue()[25] == 3
    assert np.array_equal(mask_ids(file.getvalue()), ids)


def test_a_mask_coded_in_colours_is_refused():
    with pytest.raises(BadImageError, match=r"coded in colours, not in class ids: write the id"):
        mask_ids(encoded(picture(3, 4)))
    with pytest.raises(BadImageError, match="coded in colours"):
        mask_ids(encoded(np.concatenate([picture(3, 4), picture(3, 4)[..., :1]], axis=-1)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_grey_mask_saved_with_more_channels_is_refused_and_its_first_one_is_not(mode):
    image = Image.fromarray(IDS).convert(mode)
    with pytest.raises(BadImageError, match=r"has \d channels .* image.getchannel\(0\).save"):
        mask_ids(encoded(np.asarray(image)))
    assert np.array_equal(mask_ids(encoded(np.asarray(image.getchannel(0)))), IDS)


def test_masks_of_other_formats_and_damaged_ones_are_refused():
    with pytest.raises(BadImageError, match="not a PNG image: save it as one"):
        mask_ids(encoded(IDS, "JPEG"))
    with pytest.raises(BadImageError, match="empty"):
        mask_ids(b"")
    with pytest.raises(BadImageError):
        mask_ids(encoded(picture(90, 90)[..., 0])[:400])
    with pytest.raises(BadImageError, match="4x3 pixels are more than max_pixels=11"):
        mask_ids(encoded(IDS), max_pixels=11)


def test_ids_are_translated_in_the_order_of_the_classes():
    translation = Translation([3, 0, 9, 2], [7, 255], "repair it")
    labels = translation.labels(encoded(np.array([[0, 2, 3], [9, 7, 255]], np.uint8)))
    assert labels.dtype == np.int16
    assert labels.tolist() == [[1, 3, 0], [2, IGNORE, IGNORE]]
    many = Translation(range(1000), [65535], "repair it")
    labels = many.labels(png(16, [struct.pack(">3H", 0, 999, 65535)], 3))
    assert labels.tolist() == [[0, 999, IGNORE]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (range(3), "has the ids 3, 4, 5, 6, 7, ... and the classes have 0 to 2: repair it"),
        (range(1, 12), "has the id 0 and the classes have 1 to 11: repair it"),
        ([*range(5), *range(6, 12)], "has the id 5 and the classes have 11 ids: repair it"),
    ],
)
def test_ids_outside_the_classes_are_named(classes, message):
    with pytest.raises(BadImageError) as error:
        Translation(classes, [], "repair it").labels(encoded(IDS))
    assert str(error.value) == f"the mask {message}"


def labels_of(mask: bytes) -> np.ndarray:
    return mask_ids(mask).astype(np.int16)


def test_a_mask_of_another_size_than_its_image_is_refused():
    pixels, labels = decode_pair(encoded(picture(3, 4)), encoded(IDS), labels_of)
    assert np.array_equal(pixels, picture(3, 4))
    assert np.array_equal(labels, IDS)
    with pytest.raises(BadImageError, match="has 4x3 pixels and the image 5x3: make the mask anew"):
        decode_pair(encoded(picture(3, 5)), encoded(IDS), labels_of)


@pytest.mark.parametrize("endian", ["<", ">"])
def test_a_turned_image_is_told_from_one_of_another_size(endian):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F], exif[0x0112] = "maker", 6
    turned = encoded(picture(4, 3), "JPEG", exif=exif)
    with pytest.raises(BadImageError, match=r"3x4: the image has EXIF orientation 6, .*transpose"):
        decode_pair(turned, encoded(IDS), labels_of)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    saved = encoded(np.asarray(upright), "JPEG")
    assert decode_pair(saved, encoded(IDS), labels_of)[0].shape == (3, 4, 3)


def test_exif_that_is_damaged_or_says_nothing_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(picture(4, 3), "JPEG", exif=exif)
    start = whole.index(b"Exif")
    for end in range(start, start + 40):
        exif_orientation(whole[:end])
    exif[0x0112] = 9
    assert exif_orientation(encoded(picture(4, 3), "JPEG", exif=exif)) == 1
    assert exif_orientation(encoded(picture(4, 3), "JPEG", exif=b"Exif\0\0MM\0*junk")) == 1
    assert exif_orientation(encoded(picture(4, 3), "JPEG")) == 1
