"""One image -> the members of a shard that it is: KEY.jpg, KEY.cls, KEY.json, as blocks of a tar.

KEY is the place in the order, eight digits, and the file's name in letters that any reader takes:
no two images have the same. KEY.json has the name as it was, with the bytes of one that is no UTF-8
as \\udc80 to \\udcff (`os.fsencode` gives them back).

Headers are ustar's without times and owners, so the same images are the same bytes.
"""

import io
import json
import re
from collections.abc import Sequence

from PIL import Image

from beit_fast.data.sources.decode import BadImageError, decode_fast, decode_pillow, read_header
from beit_fast.data.sources.tar_index import MOST_IMAGE_BYTES
from beit_fast.tasks.pack.config import QUALITY, PackConfig

BLOCK = 512
ENDING = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
_LONGEST_STEM = 80  # letters: with number and ending a name has 100 at most, as ustar's
_OURS = re.compile(r"^\d{8,}_")


class Packer:
    """Members of images of `keys` with `labels`, None where there are none."""

    def __init__(self, config: PackConfig, labels: Sequence[int] | None) -> None:
        self._config, self._labels = config, labels

    def members(self, place: int, index: int, key: str, data: bytes) -> tuple[bytes, bool]:
        """The blocks of image `index`, which lies at `place` of the order, and whether it was made
        smaller. Raises BadImageError for an image that training could not use either."""
        header = read_header(data)
        told = {"filename": key}
        label = None if self._labels is None else int(self._labels[index])
        if label is not None:
            told["label"] = label
        ending, short = ENDING[header.format], self._config.short_side
        is_resized = short is not None and min(header.width, header.height) > short
        if is_resized:
            image = decode_pillow(data, self._config.max_pixels)
            told |= {"original_width": image.width, "original_height": image.height}
            data, image = _smaller(image, short, self._config.quality or QUALITY)
            ending = "jpg"
        else:
            image = decode_fast(data, self._config.max_pixels)  # of a TIFF's turned pages the size
            height, width, _ = image.shape
        if is_resized:
            width, height = image.size
        if len(data) > MOST_IMAGE_BYTES:
            raise BadImageError(
                f"the file has {len(data)} bytes, and of shards {MOST_IMAGE_BYTES} are read: pass "
                "--short_side, or shrink it"
            )
        told |= {"width": width, "height": height}
        name = f"{place:08d}_{stem(key)}"
        blocks = member(f"{name}.{ending}", data)
        if label is not None:
            blocks += member(f"{name}.cls", str(label).encode())
        return blocks + member(f"{name}.json", json.dumps(told).encode()), is_resized


def stem(key: str) -> str:
    """The name of a file without folder, ending, the number that `pack` gave, and odd letters."""
    name = key.rsplit("/", 1)[-1]
    name = _OURS.sub("", name.rpartition(".")[0] or name, count=1)
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_LONGEST_STEM]


def member(name: str, data: bytes) -> bytes:
    """A file of a tar: header, data, zeros up to a whole block."""
    header = bytearray(BLOCK)
    header[: len(name)] = name.encode("ascii")
    header[100:157] = (
        b"0000644\0" + b"0000000\0" * 2 + b"%011o\0%011o\0" % (len(data), 0) + b" " * 8 + b"0"
    )
    header[257:265] = b"ustar\0" + b"00"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % BLOCK)


def _smaller(image: Image.Image, short: int, quality: int) -> tuple[bytes, Image.Image]:
    """Its short side has `short` pixels, the other keeps the proportion to a pixel."""
    scale = short / min(image.size)
    size = tuple(max(short, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS)
    image.info.clear()  # comments and profiles, which nothing here reads
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue(), image
