"""Images as tar shards: `beit-fast pack IMAGES SHARDS`.

What is written depends on the images and settings alone: not on threads, and not on how often the
command was killed. An image that training could not use is left out, named and counted. One that
cannot be read ends the command: another day it might be there, and the shards would be others.
"""

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from rich.console import Console

from beit_fast.data.in_order import each_in_order
from beit_fast.data.loader import BadSamples
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import ImageSource, damage_of
from beit_fast.data.sources.opening import labelled_images
from beit_fast.data.sources.places import is_url, split_place
from beit_fast.files import describe
from beit_fast.tasks.long_work import alone, progress_bar, threads
from beit_fast.tasks.pack.config import QUALITY, PackConfig
from beit_fast.tasks.pack.members import Packer
from beit_fast.tasks.pack.shards import (
    INFO,
    Folder,
    PackError,
    Plan,
    Record,
    ShardFile,
    refuse_used,
)
from beit_fast.tasks.sources import describe_source, open_source
from beit_fast.train.lock import sole_user
from beit_fast.train.log import plain_console
from beit_fast.train.preflight import check_writable
from beit_fast.train.stop import Interrupted, heeded, stop_signals

_AT_ONCE = 8  # images for each thread that are read and not yet written
_NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_PLACE = "while packing"
_SIZES, _MEMBER_BYTES = 256, 3 * 512 + 1024  # of files that are asked for; of their headers
logger = logging.getLogger("beit_fast.data")


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
            work = _Work(config, Folder(folder, plan), source, labels, console)
            try:
                records = work.finish(work.begin(settings))
            except Interrupted as stop:
                raise Interrupted(stop.signum, _PLACE) from None
            left_out = [
                {"image": source.key(work.index_at(place)), "why": why}
                for record in records.values()
                for place, why in record.left_out.items()
            ]
            info = {"made_from": settings, "damage": dict(damage_of(source)), "left_out": left_out}
            work.folder.finish(records, classes, info)
    work.tell(records)
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
            f"shards would be called {name}-0000.tar: pass --name with letters, digits, dots, "
            "hyphens and underscores, --name train for example"
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


def _open(config: PackConfig) -> tuple[ImageSource, Sequence[int] | None, list[str] | None]:
    """Images, their labels, and the classes; None for both without."""
    options: dict[str, Any] = {"follow_links": config.follow_links, "reads": config}
    if not config.labels:
        return open_source(config.images, **options), None, None
    try:
        source, labels, classes = labelled_images(config.images, fewest=1, **options)
    except ValueError as error:
        raise PackError(f"{error}; or pass --labels false, where there are no classes") from error
    for name in classes:
        if not name.strip() or not name.isprintable():
            raise PackError(
                f"the class {name!r} has a name that is no text that can be shown, and cannot be "
                "written beside the shards: rename its folder"
            )
    return source, labels.numpy(), classes


def _made_from(
    config: PackConfig,
    source: ImageSource,
    labels: Sequence[int] | None,
    classes: list[str] | None,
) -> dict[str, Any]:
    """All that the bytes of the shards follow from."""
    resized = config.short_side is not None
    return {
        "images": source.digest(),
        "num_images": len(source),
        "classes": classes,
        "labels": labels is not None,
        "images_per_shard": config.images_per_shard,
        "shuffle": config.shuffle,
        "seed": config.seed if config.shuffle else None,
        "short_side": config.short_side,
        "quality": (config.quality or QUALITY) if resized else None,
        "encoder": f"Pillow {PIL.__version__}" if resized else None,
        "max_pixels": config.max_pixels,
    }


class _Work:
    """Makes the shards that are missing, one after another."""

    def __init__(
        self,
        config: PackConfig,
        folder: Folder,
        source: ImageSource,
        labels: Sequence[int] | None,
        console: Console,
    ) -> None:
        self.folder = folder
        self._config, self._source, self._console = config, source, console
        self._threads = threads(config.num_threads)
        self._packer = Packer(config, labels)
        self._bad = BadSamples(source, config.max_bad_share, "it is left out", "max_bad_share")
        self._rate: float | None = None  # images a second, where some were packed
        order = np.arange(len(source))
        if config.shuffle:
            # The old generator's stream is promised never to change, that of the new ones is not.
            np.random.RandomState(config.seed).shuffle(order)
        self._order, self._place_of = order, np.argsort(order)

    def begin(self, settings: dict[str, Any]) -> dict[str, Record]:
        """Records of the shards that are there and whole; read, if there are any."""
        found = self.folder.begin(settings)
        if not found:
            return {}
        whole = {}
        with ThreadPoolExecutor(self._threads) as pool:
            looks = zip(found, pool.map(self.folder.is_whole, found, found.values()), strict=True)
            try:
                for name, is_whole in heeded(looks, _PLACE):
                    if not is_whole:
                        path = self.folder.path / name
                        logger.warning("%s is not as it was written: it is made anew", path)
                        continue
                    whole[name] = found[name]
                    for place, why in found[name].left_out.items():
                        self._bad.add(self.index_at(place), BadImageError(why))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        self._console.print(f"shards: {len(whole)} finished ones are whole and kept", style="green")
        return whole

    def finish(self, records: dict[str, Record]) -> dict[str, Record]:
        """All records, those of the shards made now among them."""
        plan, source = self.folder.plan, self._source
        missing = [number for number, name in enumerate(plan.names) if name not in records]
        if not missing:
            return records
        places = np.concatenate([plan.places(number) for number in missing])
        self._check_space(len(places))
        images = heeded(
            each_in_order(
                source,
                self._order[places],
                self._look,
                num_threads=self._threads,
                reads=self._config,
                at_once=_AT_ONCE * self._threads,
            ),
            _PLACE,
        )
        start, done = time.perf_counter(), len(source) - len(places)
        made = dict(records)
        with (
            closing(images),
            progress_bar(self._console, "pack", "images", len(source), done=done) as tick,
            ThreadPoolExecutor(1) as finisher,  # reads a shard again while the next one is made
        ):
            finishing: dict[str, Future[Record]] = {}
            for number in missing:
                name = plan.names[number]
                finish = self._write(name, plan.places(number), images, tick)
                made |= {name: future.result() for name, future in finishing.items()}
                finishing = {name: finisher.submit(finish)}
            made |= {name: future.result() for name, future in finishing.items()}
        self._rate = len(places) / (time.perf_counter() - start)
        return made

    def index_at(self, place: int | str) -> int:
        """Of the image at a place of the order."""
        return int(self._order[int(place)])

    def tell(self, records: dict[str, Record]) -> None:
        """What there is now, in a line."""
        made = records.values()
        num_left_out, num_resized = (
            sum(len(record.left_out) for record in made),
            sum(record.num_resized for record in made),
        )
        said = [
            f"{sum(record.num_images for record in made)} images in "
            f"{sum(record.num_images > 0 for record in made)} shards in {self.folder.path}",
            f"{sum(record.num_bytes for record in made) / 1e9:.2f} GB",
        ]
        if self._config.short_side is not None:
            said.append(f"{num_resized} made smaller")
        if num_left_out:
            said.append(f"{num_left_out} left out, named in {INFO}")
        if self._rate is not None:
            said.append(f"{self._rate:.0f} images/s")
        self._console.print(f"shards: {', '.join(said)}")

    def _look(self, index: int, data: bytes) -> tuple[bytes, bool]:
        """In a thread."""
        place, key = int(self._place_of[index]), self._source.key(index)
        return self._packer.members(place, index, key, data)

    def _write(
        self,
        name: str,
        places: range,
        images: Iterator[tuple[int, Any]],
        tick: Callable[[int], None],
    ) -> Callable[[], Record]:
        """The images of one shard into its file; what it gives makes the file whole."""
        shard = ShardFile(self.folder, name)
        try:
            left_out, num_resized = {}, 0
            for place in places:
                index, packed = next(images)
                if isinstance(packed, BadImageError):
                    self._bad.add(index, packed)
                    left_out[str(place)] = " ".join(str(packed).split())
                elif isinstance(packed, OSError):
                    raise PackError(
                        f"{self._source.name(index)} cannot be read ({describe(packed)}): see that "
                        "it can, or remove it from the images, and give the same command again"
                    ) from packed
                else:
                    blocks, is_resized = packed
                    shard.add(blocks)
                    num_resized += is_resized
                tick(1)
        except BaseException:
            shard.close()
            raise
        return functools.partial(_finish, shard, len(places), num_resized, left_out)

    def _check_space(self, num_images: int) -> None:
        """Warn where the disk seems too small. Of files that are copied: by some of their sizes."""
        if self._config.short_side is not None:
            return
        some = self._order[:: max(1, len(self._order) // _SIZES)]
        try:
            sizes = [size for n in some if (size := self._source.size(int(n))) is not None]
        except OSError:
            return  # it is met again, by whoever reads it
        if not sizes:
            return
        wanted = num_images * (sum(sizes) / len(sizes) + _MEMBER_BYTES)
        free = shutil.disk_usage(self.folder.path).free
        if wanted > free:
            logger.warning(
                "%s has %.1f GiB free and the shards want about %.1f: where the disk is full the "
                "command ends, and the same one goes on when there is room",
                *(self.folder.path, free / 2**30, wanted / 2**30),
            )


def _finish(
    shard: ShardFile, num_places: int, num_resized: int, left_out: dict[str, str]
) -> Record:
    try:
        return shard.finish(num_places - len(left_out), num_resized, left_out)
    finally:
        shard.close()
