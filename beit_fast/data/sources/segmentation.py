"""Images with masks of class ids, in two layouts of folders.

ADE20K's, as its scene parsing benchmark is unpacked (ADEChallengeData2016): 150 classes, whose ids
in the masks are 1 to 150; 0 is of no class and is ignored.

    ADE/images/training/ADE_train_00000001.jpg      ADE/images/validation/...
    ADE/annotations/training/ADE_train_00000001.png ADE/annotations/validation/...

And the plain one, two folders with the same names in them, sub-folders or not:

    photos/a.jpg  photos/indoor/b.png               masks/a.png  masks/indoor/b.png

Images are of every format that decode.py reads, masks are PNG files as masks.py takes them. Classes
are those of a file (class_names.py), or a number of classes without names, or as many as the masks
have. EXIF orientation is not applied to images, so a mask is of the image as it is stored.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from beit_fast.data.sources import ade20k
from beit_fast.data.sources.class_names import Classes, Colour, numbered_classes, read_classes
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.digit_scenes import is_digit_scenes, labelled_scenes
from beit_fast.data.sources.folder import (
    ImageFiles,
    ImageFolder,
    Source,
    digest_of_files,
    read_image_file,
)
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.masks import MAX_CLASSES, MAX_ID, Translation, mask_ids
from beit_fast.data.sources.pairs import pair_masks
from beit_fast.data.sources.reading import Reads
from beit_fast.flags import flag

Part = Literal["training", "validation"]
_VOID = {255, MAX_ID}  # ids that masks of 8 and of 16 bits have by custom for what does not count
_ADE = Classes(ade20k.CLASSES, ade20k.PALETTE, tuple(range(1, len(ade20k.CLASSES) + 1)))
_THREADS = 8  # that look for classes in masks


class MaskedImage(NamedTuple):
    """Encoded files."""

    image: bytes
    mask: bytes


class SegmentationSource(Source[MaskedImage], Protocol):
    """Images with masks; the labels of their pixels are 0 ... C - 1, in the order of `classes`."""

    classes: tuple[str, ...]
    palette: tuple[Colour, ...] | None  # a colour of each class

    def labels(self, mask: bytes) -> np.ndarray:
        """int16 (height, width) of a mask file, IGNORE where nothing counts. Raises BadImageError
        for a file that is no mask, and for ids outside the classes."""
        ...


class MaskedFolder:
    """A `SegmentationSource` of a folder of images and one of masks.

    classes: None for as many as the ids in the masks, which are read for it under the limits of
    `reads`. ignore: ids whose pixels do not count.
    `without_image` are masks that are not read because no image has their name.

    Raises ValueError as `ImageFolder` and `pair_masks` do, and for classes that the masks do not
    tell.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        classes: Classes | None,
        ignore: Iterable[int],
        *,
        follow_links: bool = True,
        reads: ReadConfig = READS,
    ):
        self.images, self.masks = ImageFolder(images, follow_links=follow_links), Path(masks)
        self._masks, self.without_image = pair_masks(self.images, self.masks, follow_links)
        ignore = set(ignore)
        classes = classes or self._classes_of_masks(ignore, reads)
        self.classes, self.palette = classes.names, classes.palette
        ids = range(len(classes.names)) if classes.ids is None else classes.ids
        if both := sorted(ignore.intersection(ids)):
            name = classes.names[list(ids).index(both[0])]
            raise ValueError(
                f"the id {both[0]} is ignored and is that of the class {name!r} too: give another "
                f"{flag('data.ignore')}, or leave the class out"
            )
        self._translation = Translation(ids, ignore, _how_to_have_more(ignore))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> MaskedImage:
        return MaskedImage(self.images.read(index), read_image_file(self.mask_name(index)))

    def name(self, index: int) -> str:
        return self.images.name(index)

    def key(self, index: int) -> str:
        return self.images.key(index)

    def size(self, index: int) -> int:
        """Of image and mask."""
        return self.images.size(index) + os.stat(self.mask_name(index)).st_size

    def mask_name(self, index: int) -> str:
        return str(self.masks / self._masks[index])

    def labels(self, mask: bytes) -> np.ndarray:
        return self._translation.labels(mask)

    def digest(self) -> str:
        """Of images, masks, and which ids are which classes."""
        digest = hashlib.sha256(self._translation.table.tobytes())
        for part in (self.images.digest(), digest_of_files(self.masks, self._masks)):
            digest.update(part.encode())
        return digest.hexdigest()

    def _classes_of_masks(self, ignore: set[int], reads: ReadConfig) -> Classes:
        seen = ids_of_masks([*map(self.mask_name, range(len(self)))], reads) - ignore
        if not seen:
            raise ValueError(
                f"the masks in {self.masks} have no id but those that are ignored: check "
                f"{flag('data.ignore')}, or name the classes with {flag('data.classes_file')}"
            )
        if void := max(seen) if max(seen) in _VOID and max(seen) - 1 not in seen else 0:
            raise ValueError(
                f"the masks in {self.masks} have ids to {max(seen - {void}, default=0)}, and "
                f"{void}: pass {flag('data.ignore')} {void} if that stands for no class, or the "
                f"number of classes with {flag('data.num_classes')}"
            )
        return numbered_classes(_checked_count(max(seen) + 1))


def open_segmentation(
    path: str | Path,
    *,
    masks: str | Path = "",
    part: Part = "training",
    classes_file: str | Path = "",
    ignore: int | None = None,
    num_classes: int | None = None,
    follow_links: bool = True,
    reads: ReadConfig = READS,
) -> SegmentationSource:
    """The images at `path` and their masks, in one of the layouts on top of this file.

    masks: the folder of the plain layout, of which `path` is the folder of images then; "" for
    ADE20K's, of which `part` is read. classes_file, num_classes: see on top. ignore: the id whose
    pixels do not count; None: ADE20K's 0, and none in the plain layout.

    Raises ValueError for folders, files and settings that do not fit, in one line that says what
    to do.
    """
    if not str(path):
        raise ValueError(f"no images were named: pass {flag('data.path')} with their folder")
    if is_digit_scenes(path):
        if str(masks) or str(classes_file) or ignore is not None:
            raise ValueError(
                f"{path} brings its own masks and classes: leave out {flag('data.masks')}, "
                f"{flag('data.classes_file')} and {flag('data.ignore')}"
            )
        return labelled_scenes(str(path))
    classes = read_classes(classes_file) if classes_file else None
    if classes is None and num_classes is not None:
        classes = numbered_classes(_checked_count(num_classes))
    elif num_classes is not None and num_classes != len(classes.names):
        raise ValueError(
            f"{classes_file} names {len(classes.names)} classes and {flag('data.num_classes')} is "
            f"{num_classes}: leave out one of the two"
        )
    ignored = () if ignore is None else (ignore,)
    if not all(0 <= number <= MAX_ID for number in ignored):
        raise ValueError(f"{flag('data.ignore')} is {ignore}: give an id of a mask, 0 to {MAX_ID}")
    if str(masks):
        return MaskedFolder(path, masks, classes, ignored, follow_links=follow_links, reads=reads)
    root = _ade_root(Path(path), part)
    if classes is None:
        classes = _ADE
    elif classes.ids is None:
        classes = classes._replace(ids=tuple(range(1, len(classes.names) + 1)))
    return MaskedFolder(
        root / "images" / part,
        root / "annotations" / part,
        classes,
        ignored or (0,),
        follow_links=follow_links,
    )


def ids_of_masks(paths: Sequence[str], reads: ReadConfig = READS) -> set[int]:
    """Every id that one of the files has. Raises ValueError that names a file that is no mask, or
    is not read within the limits of `reads`."""

    def look(index: int) -> np.ndarray:
        try:
            ids = limited.run(lambda read: mask_ids(read(index)))
        except (BadImageError, OSError) as error:
            raise ValueError(f"cannot use {paths[index]} ({error}): repair or remove it") from error
        return np.flatnonzero(np.bincount(ids.ravel()))

    with Reads(ImageFiles(paths), reads) as limited, ThreadPoolExecutor(_THREADS) as pool:
        try:
            found = pool.map(look, range(len(paths)))
            return {int(number) for numbers in found for number in numbers}
        finally:
            limited.stop()
            pool.shutdown(wait=False, cancel_futures=True)


def _ade_root(path: Path, part: Part) -> Path:
    """The folder that has images/ and annotations/."""
    if not path.is_dir():
        lies = "is no folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {lies}: give ADE20K's folder, or one of images")
    layout = ("images", "annotations")
    if not all((path / name / part).is_dir() for name in layout):
        with os.scandir(path) as entries:
            below = sorted(path / entry.name for entry in entries if entry.is_dir())
        for found in (*path.parents[:2], *below):
            if all((found / name / part).is_dir() for name in layout):
                raise ValueError(
                    f"{path} does not hold images/{part} and annotations/{part}: pass {found}"
                )
        raise ValueError(
            f"{path} does not hold images/{part} and annotations/{part}, as ADE20K "
            f"(ADEChallengeData2016) does: pass its folder, or that of the masks of {path} with "
            f"{flag('data.masks')}"
        )
    return path


def _checked_count(count: int) -> int:
    if not 1 <= count <= MAX_CLASSES:
        raise ValueError(f"{count} classes are not possible: give 1 to {MAX_CLASSES}")
    return count


def _how_to_have_more(ignore: set[int]) -> str:
    told = (
        f"pass {flag('data.ignore')} for an id that stands for no class, or " if not ignore else ""
    )
    return f"{told}name every class with {flag('data.classes_file')} or repair the mask"
