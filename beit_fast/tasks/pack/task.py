"""Images as tar shards: `beit-fast pack IMAGES SHARDS`.

What is written depends on the images and settings alone: not on threads, and not on how often the
command was killed. An image that training could not use is left out, named and counted. One that
cannot be read ends the command: another day it might be there, and the shards would be others.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from beit_fast.data.sources.folder import ImageSource, damage_of
from beit_fast.data.sources.masks import MAX_CLASSES
from beit_fast.data.sources.opening import labelled_images
from beit_fast.data.sources.places import is_url, split_place
from beit_fast.tasks.long_work import alone
from beit_fast.tasks.pack.config import QUALITY, PackConfig
from beit_fast.tasks.pack.shards import Folder, PackError, Plan, refuse_used
from beit_fast.tasks.pack.writing import PLACE, Writer
from beit_fast.tasks.sources import describe_source, indexing, open_source
from beit_fast.train.lock import sole_user
from beit_fast.train.log import plain_console
from beit_fast.train.preflight import check_writable
from beit_fast.train.stop import Interrupted, stop_signals

_NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def run_pack(config: PackConfig) -> Path:
    """Write the shards of `config`, or the rest of them. Returns their folder.

    Raises PackError for a folder that holds anything else, for images that cannot be read and for
    classes whose names cannot be written; BadDataError for too many broken images; ValueError for
    images that are not there; OSError where nothing can be written; Interrupted.
    """
    alone("pack")
    folder, name = _target(config)
    with stop_signals():
        source, labels, classes = _open(config)
        console = plain_console()
        console.print(f"images: {describe_source(source, classes)}")
        if folder.is_dir():
            refuse_used(folder)
        check_writable(folder, "SHARDS")
        plan = Plan(name, len(source), config.images_per_shard)
        settings = _made_from(config, source, labels, classes)
        with sole_user(folder, "SHARDS"):
            writer = Writer(config, Folder(folder, plan), source, labels, console)
            try:
                records = writer.finish(writer.begin(settings))
            except Interrupted as stop:
                raise Interrupted(stop.signum, PLACE) from None
            left_out = [
                {"image": source.key(writer.index_at(place)), "why": why}
                for record in records.values()
                for place, why in record.left_out.items()
            ]
            info = {"made_from": settings, "damage": dict(damage_of(source)), "left_out": left_out}
            writer.folder.finish(records, classes, info)
            writer.read_back(records, classes)
    writer.tell(records)
    return folder


def _target(config: PackConfig) -> tuple[Path, str]:
    """The folder to write, and the name of its shards. Raises PackError."""
    if is_url(config.shards):
        raise PackError(
            f"SHARDS is {config.shards}: give a folder on a disk, and copy what comes of it"
        )
    folder = Path(config.shards)
    name = config.name or folder.resolve().name
    if not set(name) <= _NAME or name.startswith(".") or len(name) > 100 or not name:
        raise PackError(
            f"shards would be called {name}-0000.tar, which not every reader takes: pass --name "
            "with letters, digits, dots, hyphens and underscores, --name train for example"
        )
    if not is_url(config.images):
        place = split_place(config.images)  # files of a pattern lie in no folder below
        images = os.path.realpath(place.root)
        lies_in = os.path.commonpath([images, folder.resolve()]) == images
        if lies_in and not place.pattern and os.path.exists(images):
            raise PackError(
                f"{config.shards} lies in {config.images}, where the shards would be taken for "
                "what is to be packed: give a SHARDS outside it"
            )
    return folder, name


def _open(config: PackConfig) -> tuple[ImageSource, np.ndarray | None, list[str] | None]:
    """Images, their labels, and the classes; None for both without."""
    options: dict[str, Any] = {"follow_links": config.follow_links, "reads": config}
    if not config.labels:
        return open_source(config.images, **options), None, None
    try:
        source, labels, classes = labelled_images(
            config.images, fewest=1, progress=indexing(), **options
        )
    except ValueError as error:
        open_source(config.images, **options)  # where there are no images, it says so
        raise PackError(f"{error}; or pass --labels false, where there are no classes") from error
    for name in classes:
        if not name.strip() or not name.isprintable():
            raise PackError(
                f"the class {name!r} has a name that is no text that can be shown, and cannot be "
                "written beside the shards: rename its folder"
            )
    if len(classes) > MAX_CLASSES:
        raise PackError(
            f"{config.images} has {len(classes)} classes, and the file of their names is read to "
            f"{MAX_CLASSES}: pass --labels false, or fewer"
        )
    return source, labels.numpy(), classes


def _made_from(
    config: PackConfig,
    source: ImageSource,
    labels: np.ndarray | None,
    classes: list[str] | None,
) -> dict[str, Any]:
    """All that the bytes of the shards follow from."""
    resized = config.short_side is not None
    return {
        "images": source.digest(),
        "num_images": len(source),
        "classes": classes,
        "labels": None if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
        "images_per_shard": config.images_per_shard,
        "shuffle": config.shuffle,
        "seed": config.seed if config.shuffle else None,
        "short_side": config.short_side,
        "quality": (config.quality or QUALITY) if resized else None,
        "encoder": f"Pillow {PIL.__version__}" if resized else None,
        "max_pixels": config.max_pixels,
    }
