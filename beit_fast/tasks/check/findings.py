"""What is noted of every image, and the report that comes of it. A million images take 45 MB."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from beit_fast.data.bad_samples import num_bad_borne
from beit_fast.data.sources.decode import decode_fast, exif_orientation, read_header
from beit_fast.data.sources.folder import ImageSource, damage_of
from beit_fast.tasks.check.complaints import Complaints
from beit_fast.tasks.check.config import CheckConfig

_DIGEST = 16  # bytes of SHA-256 that are kept: no two of 2^40 images agree by chance
_QUANTILES = {"min": 0.0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "max": 1.0}
# What endings promise; of the formats that decode.py reads.
_PROMISED = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".pbm", ".pgm", ".ppm", ".pnm"), "PPM"),
    ".webp": "WEBP",
    ".gif": "GIF",
}


class Look(NamedTuple):
    """What one image is, decoded."""

    format: str
    mode: str  # Pillow's, of the stored pixels
    width: int
    height: int
    num_bytes: int
    digest: bytes
    is_turned: bool  # by EXIF, which is not applied
    is_blank: bool  # all pixels are equal
    is_suspect: bool  # the library may have complained of it, see complaints.py


def look_at(data: bytes, max_pixels: int, complaints: Complaints) -> Look:
    """Decodes it as training does. Raises BadImageError where that would."""
    header = read_header(data)
    before = complaints.place()
    pixels = decode_fast(data, max_pixels)
    height, width, _ = pixels.shape
    return Look(
        *(header.format, header.mode, width, height, len(data)),
        hashlib.sha256(data).digest()[:_DIGEST],
        exif_orientation(data) > 1,
        _is_blank(pixels),
        complaints.place() > before,
    )


def _is_blank(pixels: np.ndarray) -> bool:
    height, width, _ = pixels.shape
    some = pixels[:: max(1, height // 8), :: max(1, width // 8)]  # says no of nearly all others
    return bool((some == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all())


class Findings:
    """Collects looks at the images of a source, one `add` each, and makes the report."""

    def __init__(
        self, source: ImageSource, labels: Sequence[int] | None, classes: Sequence[str] | None
    ) -> None:
        self._source, self._labels, self._classes = source, labels, classes
        count = len(source)
        self._usable = np.zeros(count, bool)
        self._sides = np.zeros((count, 2), np.int32)  # width, height
        self._bytes = np.zeros(count, np.int64)
        self._digests = np.zeros((count, _DIGEST), np.uint8)
        self._turned: list[int] = []
        self._blank: list[int] = []
        self._misnamed: list[int] = []
        self._formats: Counter[str] = Counter()
        self._modes: Counter[str] = Counter()
        self.suspects: list[int] = []
        self.complaints: dict[int, str] = {}
        self.unusable: dict[int, str] = {}
        self.num_unread = 0  # of these: it could not be read, so nobody knows whether it is whole

    def add(self, index: int, look: Look | Exception) -> None:
        if isinstance(look, Exception):
            self.unusable[index] = " ".join(str(look).split())
            self.num_unread += isinstance(look, OSError)
            return
        self._usable[index] = True
        self._sides[index] = look.width, look.height
        self._bytes[index] = look.num_bytes
        self._digests[index] = np.frombuffer(look.digest, np.uint8)
        self._formats[look.format] += 1
        self._modes[look.mode] += 1
        if look.is_suspect:
            self.suspects.append(index)
        if look.is_turned:
            self._turned.append(index)
        if look.is_blank:
            self._blank.append(index)
        ending = os.path.splitext(self._source.key(index))[1].lower()
        if _PROMISED.get(ending, look.format) != look.format:
            self._misnamed.append(index)

    def report(self, config: CheckConfig) -> dict[str, Any]:
        """All that was found, in JSON's types; images by their names."""
        source, usable = self._source, np.flatnonzero(self._usable)
        sides = self._sides[usable]
        short = sides.min(axis=1)
        small = usable[short < config.img_size]
        return {
            "images": len(source),
            "usable": len(usable),
            "unread": self.num_unread,
            "cannot_be_used": self._by_name(self.unusable),
            "decoded_with_a_warning": self._by_name(self.complaints),
            "damage": dict(damage_of(source)),
            "borne_by_training": num_bad_borne(len(source), config.max_bad_share),
            "bytes": int(self._bytes.sum()),
            "formats": dict(self._formats.most_common()),
            "modes": dict(self._modes.most_common()),
            "width": _quantiles(sides[:, 0]),
            "height": _quantiles(sides[:, 1]),
            "short_side": _quantiles(short),
            "file_bytes": _quantiles(self._bytes[usable]),
            "small": {"below": config.img_size, "images": self._names(small.tolist())},
            "blank": self._names(self._blank),
            "turned_by_exif": self._names(self._turned),
            "named_as_another_format": self._names(self._misnamed),
            "duplicates": self._duplicates(usable) if len(usable) else [],
            "classes": self._of_classes(),
        }

    def _names(self, indices: Sequence[int]) -> list[str]:
        return [self._source.name(index) for index in indices]

    def _by_name(self, reasons: Mapping[int, str]) -> list[dict[str, str]]:
        """A list: two images of a source may have one name."""
        return [{"image": self._source.name(n), "why": why} for n, why in sorted(reasons.items())]

    def _duplicates(self, usable: np.ndarray) -> list[dict[str, Any]]:
        """Images whose files are equal to the last byte, in the order of the first of each."""
        keys = self._digests[usable].view(np.uint64)
        order = np.lexsort(keys.T)  # stable: equal ones stay in the order of the source
        differs = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
        groups = (
            np.split(order, np.flatnonzero(differs) + 1) if differs.sum() < len(order) - 1 else []
        )
        found = [usable[group].tolist() for group in groups if len(group) > 1]
        return [
            {
                "images": self._names(group),
                "in_several_classes": self._labels is not None
                and len({int(self._labels[index]) for index in group}) > 1,
            }
            for group in sorted(found)
        ]

    def _of_classes(self) -> dict[str, Any] | None:
        """None where there are none."""
        if self._labels is None or self._classes is None:
            return None
        labels, count = np.asarray(self._labels), len(self._classes)
        images = np.bincount(labels, minlength=count).tolist()
        usable = np.bincount(labels[self._usable], minlength=count).tolist()
        return {
            "count": count,
            "images": dict(zip(self._classes, images, strict=True)),
            "without_a_usable_image": [
                name for name, number in zip(self._classes, usable, strict=True) if not number
            ],
        }


def _quantiles(values: np.ndarray) -> dict[str, int]:
    """Each the value of an image; of none nothing."""
    if not len(values):
        return {}
    picked = np.quantile(values, [*_QUANTILES.values()], method="nearest")
    return {name: int(value) for name, value in zip(_QUANTILES, picked, strict=True)}
