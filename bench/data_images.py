"""Images for the benches of data: the files of a folder in memory, many of them, and large ones."""

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

import beit_fast.data
from beit_fast.data.sources.decode import BadImageError, decode_pillow
from beit_fast.data.sources.folder import ImageFolder

MAX_FILES = 256  # of a folder: enough to be even, few enough to sit in memory
TILE = (500, 333)  # pixels of an image in a mosaic, width and height


class InMemory:
    """The files of a folder, held in memory: what is timed is work, not the disk.

    Those that cannot be decoded are left out, and named. Raises ValueError where none is left.
    """

    def __init__(self, folder: Path | None):
        photographs = Path(beit_fast.data.__file__).parent / "photographs"
        if folder is None and not photographs.is_dir():
            self.origin, self._files = "random gradients", [_gradient(i) for i in range(16)]
        else:
            files = ImageFolder(folder or photographs)
            self.origin = folder or "the photographs of the package"
            order = random.Random(0).sample(range(len(files)), min(MAX_FILES, len(files)))
            self._files = [data for i in order if _is_whole(data := files.read(i), files.name(i))]
            if not self._files:
                raise ValueError(f"none of {len(order)} images of {folder} can be decoded")
        self.kilobytes = sum(map(len, self._files)) / len(self._files) / 1000

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return self._files[index % len(self._files)]

    def name(self, index: int) -> str:
        return f"file {index}"


class ManyTimes:
    """As many files as ImageNet has, the same few again and again: Grain's shuffle takes 4 us per
    image of a data set of that size, and more than a millisecond per image of one of twenty."""

    def __init__(self, source: InMemory):
        self.read, self.name = source.read, source.name

    def __len__(self) -> int:
        return 1_281_167


def _is_whole(data: bytes, name: str) -> bool:
    try:
        decode_pillow(data)
    except BadImageError as error:
        print(f"left out: {name} ({error})")
        return False
    return True


def _gradient(number: int) -> bytes:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), np.int32)
    noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=95)
    return file.getvalue()


def mosaics(source: InMemory, side: int, count: int) -> list[bytes]:
    """JPEGs of side x side images each, not enlarged: as fine as photographs of that size can be.

    Of 500 side x 333 side pixels, at quality 92.
    """
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        mosaic = Image.new("RGB", (side * TILE[0], side * TILE[1]))
        for place in range(side * side):
            image = decode_pillow(source.read(int(rng.integers(len(source)))))
            image = image.crop((0, 0, min(TILE[0], image.width), min(TILE[1], image.height)))
            if image.size != TILE:
                image = image.resize(TILE, Image.Resampling.BICUBIC)
            mosaic.paste(image, (place % side * TILE[0], place // side * TILE[1]))
        file = io.BytesIO()
        mosaic.save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files
