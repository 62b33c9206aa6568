"""Scenes to segment: scikit-learn's real digits, several on a canvas, before parts of photographs.

Every pixel is background or one of the digits 0 to 9. The digits are those of digits.py, of several
sizes, brighter than what is behind them; that is a crop of a photograph that ships with the
package, and scraps of others. No digit and no photograph is in two parts: the digits are split as
in digits.py. A scene is a function of its part and its number, the same in every process. Wherever
images are named by a folder, and images with masks too, so are these by

    digit-scenes:train  digit-scenes:valid  digit-scenes:test     a part: 2000, 200 and 400 scenes
    digit-scenes:train:20                                         20 scenes of it, drawn with seed 0
    digit-scenes:train:20:3                                       another 20, drawn with seed 3

`python -m beit_fast.data.sources.digit_scenes FOLDER` writes images and masks as PNG, one folder
for each, and classes.json with the names and colours of the classes.
"""

import argparse
import functools
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from beit_fast.data.sources.digits import NAME as DIGITS
from beit_fast.data.sources.digits import Digits
from beit_fast.data.sources.masks import Translation

if TYPE_CHECKING:  # segmentation.py opens these scenes
    from beit_fast.data.sources.segmentation import MaskedImage

NAME = "digit-scenes"
PARTS = {"train": 2000, "valid": 200, "test": 400}  # scenes
SIDE = 64  # pixels
CLASSES = ("background", *(str(digit) for digit in range(10)))
PALETTE = (
    (0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
    (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
)  # fmt: skip
PHOTOGRAPHS = {  # behind the digits of a part
    "train": ("astronaut", "blossom", "canyon", "cat", "coffee", "galaxies", "horses", "lemurs",
              "macaw", "shore", "tulips"),
    "valid": ("bee", "dandelions", "rocket"),
    "test": ("bridge", "castle", "citrus", "hedgehog", "moose"),
}  # fmt: skip
_FOLDER = Path(__file__).parents[1] / "photographs"
_SCRAPS = (1, 2)  # of photographs on a canvas, fewest and most
_SCRAP_SIDES = (8, 24)  # pixels
_CLUTTER = (0.15, 0.3)  # share of their contrast that photographs keep
_GREY = 0.6  # share of their colour that they lose
_BRIGHTNESS = (70, 110)  # mean grey level of the background
_DIGITS = (4, 6)  # on a canvas, fewest and most; those that find no place are left out
_DIGIT_SIDES = (24, 32, 32)  # pixels, drawn from
_STEP = 8  # pixels between places of digits: anywhere, they take a CPU longer than it should
_TRIES = 20  # places for a digit
_INK = (215, 245)  # grey level of a digit
_TINT = 6  # grey levels by which its channels differ from that
_COVERED = 0.4  # coverage from which on a pixel is the digit's
_SEED = 0


class DigitScenes:
    """An `ImageSource` of scenes, made as they are read. Named as on top of this file.

    Raises ValueError for a name that is none, more scenes than a part has, and without
    scikit-learn.
    """

    def __init__(self, name: str):
        self._part, self._numbers = _parse(name)
        self.path = name
        _digits(self._part)  # says now what is not installed

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> bytes:
        return _files(self._part, self._numbers[index])[0]

    def read_mask(self, index: int) -> bytes:
        """A PNG of class ids."""
        return _files(self._part, self._numbers[index])[1]

    def name(self, index: int) -> str:
        return f"{NAME}/{self._part}/{self._numbers[index]:04d}.png"

    def key(self, index: int) -> str:
        return self.name(index)

    def size(self, index: int) -> None:
        """They are made as they are read."""

    def digest(self) -> str:
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(f"{self.name(index)}\0".encode() + self.read(index))
        return digest.hexdigest()


class LabelledScenes:
    """The scenes of a name with their masks, a `SegmentationSource`. Raises as `DigitScenes`."""

    classes, palette = CLASSES, PALETTE

    def __init__(self, name: str):
        self._scenes, self.path = DigitScenes(name), name
        ids = range(len(CLASSES))
        self.labels = Translation(ids, (), "take a mask of these scenes").labels

    def __len__(self) -> int:
        return len(self._scenes)

    def read(self, index: int) -> "MaskedImage":
        from beit_fast.data.sources.segmentation import MaskedImage

        return MaskedImage(self._scenes.read(index), self._scenes.read_mask(index))

    def name(self, index: int) -> str:
        return self._scenes.name(index)

    def key(self, index: int) -> str:
        return self._scenes.key(index)

    def size(self, index: int) -> None:
        """They are made as they are read."""

    def digest(self) -> str:
        """Of images and masks."""
        digest = hashlib.sha256(self._scenes.digest().encode())
        for index in range(len(self)):
            digest.update(self._scenes.read_mask(index))
        return digest.hexdigest()


def is_digit_scenes(path: str | Path) -> bool:
    """Whether `path` names scenes and no folder."""
    return str(path).startswith(f"{NAME}:")


def labelled_scenes(name: str) -> LabelledScenes:
    """Images, masks and class names, as `open_segmentation` gives them. Raises as `DigitScenes`."""
    return LabelledScenes(name)


def scene(part: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (SIDE, SIDE, 3) and class ids uint8 (SIDE, SIDE) of one scene of a part."""
    rng = np.random.default_rng((_SEED, list(PARTS).index(part), number))
    pixels, ids = _background(part, rng), np.zeros((SIDE, SIDE), np.uint8)
    digits, taken = _digits(part), np.zeros((SIDE, SIDE), bool)
    for _ in range(_within(rng, _DIGITS)):
        side, index = int(rng.choice(_DIGIT_SIDES)), int(rng.integers(len(digits)))
        for _ in range(_TRIES):
            down, across = _STEP * rng.integers(0, (SIDE - side) // _STEP + 1, 2)
            place = slice(down, down + side), slice(across, across + side)
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        grey = Image.open(io.BytesIO(digits.read(index)))
        cover = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        colour = rng.uniform(*_INK) + rng.uniform(-_TINT, _TINT, 3)
        pixels[place] += cover[..., None] * (colour - pixels[place])
        ids[place][cover >= _COVERED] = digits.labels[index] + 1
    return pixels.round().clip(0, 255).astype(np.uint8), ids


def _background(part: str, rng: np.random.Generator) -> np.ndarray:
    """float64 (SIDE, SIDE, 3): a crop of a photograph of the part, and scraps of others on it."""
    pixels = _crop(part, (SIDE, SIDE), rng)
    for _ in range(_within(rng, _SCRAPS)):
        height, width = (_within(rng, _SCRAP_SIDES) for _ in "hw")
        down, across = rng.integers(0, SIDE - height + 1), rng.integers(0, SIDE - width + 1)
        scrap = _crop(part, (height, width), rng)
        pixels[down : down + height, across : across + width] = scrap
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = (pixels + _GREY * (grey - pixels) - grey.mean()) * rng.uniform(*_CLUTTER)
    return pixels + rng.uniform(*_BRIGHTNESS)


def _crop(part: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """float64 (height, width, 3) of a place of a photograph, at its scale or smaller."""
    photograph = _photograph(str(rng.choice(PHOTOGRAPHS[part])))
    height, width = size
    scale = rng.uniform(1, min(photograph.width / width, photograph.height / height))
    left = rng.uniform(0, photograph.width - width * scale)
    top = rng.uniform(0, photograph.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    crop = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(crop, np.float64)


def _within(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    """A whole number between two, both included."""
    return int(rng.integers(bounds[0], bounds[1] + 1))


@functools.cache
def _digits(part: str) -> Digits:
    return Digits(f"{DIGITS}:{part}")


@functools.cache
def _photograph(name: str) -> Image.Image:
    with Image.open(_FOLDER / f"{name}.jpg") as image:
        return image.convert("RGB")


@functools.cache  # 6 kB each
def _files(part: str, number: int) -> tuple[bytes, bytes]:
    """A scene and its mask as PNG."""
    pixels, ids = scene(part, number)
    return _png(pixels), _png(ids)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _parse(name: str) -> tuple[str, list[int]]:
    """The part, and the numbers of its scenes."""
    _, part, *rest = name.split(":")
    if part not in PARTS or len(rest) > 2 or not all(n.isdecimal() for n in rest):
        raise ValueError(
            f"{name!r} names no scenes: take digit-scenes:train, digit-scenes:valid or "
            "digit-scenes:test, and for some of them digit-scenes:train:20, or "
            "digit-scenes:train:20:3 for another draw"
        )
    if not rest:
        return part, list(range(PARTS[part]))
    count, seed = int(rest[0]), int(rest[1]) if len(rest) == 2 else 0
    if not 1 <= count <= PARTS[part]:
        raise ValueError(f"{name!r}: there are {PARTS[part]} scenes: ask for 1 to {PARTS[part]}")
    drawn = np.random.default_rng(seed).choice(PARTS[part], count, replace=False)
    return part, sorted(drawn.tolist())


def write_scenes(folder: Path) -> None:
    """PNG files `folder`/train/images/0017.png, its mask `folder`/train/masks/0017.png, and so on;
    and `folder`/classes.json."""
    for part in PARTS:
        source = DigitScenes(f"{NAME}:{part}")
        for index in range(len(source)):
            name = Path(source.name(index)).name
            for kind, data in (("images", source.read(index)), ("masks", source.read_mask(index))):
                path = folder / part / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    classes = [{"name": n, "color": c} for n, c in zip(CLASSES, PALETTE, strict=True)]
    (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the scenes and their masks as PNG.")
    parser.add_argument("folder", type=Path)
    write_scenes(parser.parse_args().folder)
