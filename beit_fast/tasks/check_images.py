"""Images are looked at before training starts: at its end it is late to find one broken."""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from beit_fast.data.in_order import lost, name_unusable, unusable_images
from beit_fast.data.sources.decode import decode_fast, exif_orientation
from beit_fast.data.sources.folder import ImageSource, Source
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.masks import decode_pair
from beit_fast.data.sources.segmentation import MaskedImage, SegmentationSource
from beit_fast.files import replace_text
from beit_fast.flags import flag
from beit_fast.train.stop import Interrupted, heeded
from beit_fast.train.world import World

Kind = Literal["training", "test"]  # of images
Files = TypeVar("Files")

logger = logging.getLogger("beit_fast.data")

_NAMED = 5  # images in a warning


def remembered_in(folder: Path, kind: Kind) -> Path:
    """The file that remembers which images were whole."""
    return folder / f"{kind}_images.json"


def check_test_images(
    source: ImageSource,
    *,
    num_threads: int,
    world: World,
    folder: Path,
    reads: ReadConfig = READS,
) -> None:
    """Decode every image once, each rank its part; called on every rank.

    `folder` remembers which images were whole, so that a resume does not look again. Raises
    ValueError that names those that cannot be used, and Interrupted.
    """
    _look_once(source, _look_at_image, "test", 0, num_threads, world, folder, reads)


def check_segmentation(
    source: SegmentationSource,
    kind: Kind,
    *,
    num_threads: int,
    world: World,
    folder: Path,
    max_bad_share: float = 0.0,
    reads: ReadConfig = READS,
) -> None:
    """Decode every image and its mask once, and compare their sizes and the ids with the classes.

    As `check_test_images`; but up to `max_bad_share` of the images may be unusable and are named in
    the log "beit_fast.data": those that a `Loader` would replace. So are those that EXIF turns.
    """
    look = functools.partial(_look_at_pair, source)
    allowed = int(max_bad_share * len(source))
    _look_once(source, look, kind, allowed, num_threads, world, folder, reads)


def warn_of_turned(names: Sequence[str], num_images: int, kind: str) -> None:
    """Say which images viewers turn and this code does not, where there are any.

    An orientation that swaps no sides, or a square image, gives a mask that was drawn on what is
    shown the stored image's size, so nothing else finds it.
    """
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        logger.warning(
            "%d of %d %s have an EXIF orientation, which is not applied (%s%s): their masks must "
            "be of the image as it is stored; where they are of what a viewer shows, save the "
            "image upright, in Pillow ImageOps.exif_transpose(image).save(path)",
            *(len(names), num_images, kind, ", ".join(names[:_NAMED]), more),
        )


def _look_at_image(data: bytes) -> bool:
    decode_fast(data)
    return False  # an image is of its class whichever way it is turned


def _look_at_pair(source: SegmentationSource, pair: MaskedImage) -> bool:
    """Whether EXIF turns the image. Raises BadImageError."""
    decode_pair(pair.image, pair.mask, source.labels)
    return exif_orientation(pair.image) > 1


def _look_once(
    source: Source[Files],
    look: Callable[[Files], bool],
    kind: Kind,
    allowed: int,
    num_threads: int,
    world: World,
    folder: Path,
    reads: ReadConfig,
) -> None:
    remembered, digest = remembered_in(folder, kind), source.digest()
    if any(world.gather(_remembers(remembered, digest))):
        return
    place = f"while looking at the {kind} images"
    first, last = (len(source) * rank // world.size for rank in (world.rank, world.rank + 1))
    found: dict[str, str] | int
    turned: list[int] = []
    try:
        found = unusable_images(
            source,
            range(first, last),
            num_threads=num_threads,
            look=look,
            each=functools.partial(heeded, place=place),
            seen=lambda index, is_turned: turned.append(index) if is_turned else None,
            reads=reads,
        )
    except Interrupted as stop:
        found = stop.signum
    parts, turned_parts = zip(*world.gather((found, sorted(turned))), strict=True)
    if signum := max((part for part in parts if isinstance(part, int)), default=0):
        raise Interrupted(signum, place)
    bad = lost(source) | {name: why for part in parts for name, why in part.items()}
    if len(bad) > allowed:
        remedies = {
            "test": "Repair or remove them: every one counts, so none is left out",
            "training": f"Repair or remove them: {flag('data.max_bad_share')} allows {allowed}",
        }
        raise ValueError(name_unusable(bad, len(source), f"{kind} images", remedies[kind]))
    if world.is_main:
        for name, why in bad.items():
            logger.warning("cannot use %s (%s): the next image takes its place", name, why)
        names = [source.name(index) for part in turned_parts for index in part]
        warn_of_turned(names, len(source), f"{kind} images")
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(remembered, json.dumps({"images": digest}))


def _remembers(path: Path, digest: str) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == {"images": digest}
    except (OSError, ValueError, RecursionError):
        return False
