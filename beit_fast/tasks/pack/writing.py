"""The work of `pack`: threads make the images, one writes shards, one reads them again."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
from rich.console import Console

from beit_fast.data.bad_samples import BadSamples
from beit_fast.data.in_order import each_in_order
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import ImageSource
from beit_fast.data.sources.tar_shards import TarShards
from beit_fast.files import describe
from beit_fast.tasks.long_work import progress_bar, threads
from beit_fast.tasks.pack.config import PackConfig
from beit_fast.tasks.pack.members import Packer
from beit_fast.tasks.pack.shards import INFO, Folder, PackError, Record, ShardFile
from beit_fast.tasks.sources import indexing
from beit_fast.train.stop import heeded

PLACE = "while packing"
# Images that are read and not yet written: for each thread, and at least, for a store's sake.
_AT_ONCE, _FEWEST_AT_ONCE = 8, 64
_SIZES, _MEMBER_BYTES = 256, 3 * 512 + 1024  # of files that are asked for; of their headers
logger = logging.getLogger("beit_fast.data")


class Writer:
    """Makes the shards that are missing, one after another."""

    def __init__(
        self,
        config: PackConfig,
        folder: Folder,
        source: ImageSource,
        labels: np.ndarray | None,
        console: Console,
    ) -> None:
        self.folder = folder
        self._config, self._source, self._console = config, source, console
        self._threads = threads(config.num_threads)
        self._labels, self._packer = labels, Packer(config, labels)
        self._bad = BadSamples(source, config.max_bad_share, "it is left out", "max_bad_share")
        self._rate: float | None = None  # images a second, where some were packed
        order = np.arange(len(source))
        if config.shuffle:
            # The old generator's stream is promised never to change, that of the new ones is not.
            np.random.RandomState(config.seed).shuffle(order)
        self._order, self._place_of = order, np.argsort(order)

    def begin(self, settings: dict[str, Any]) -> dict[str, Record]:
        """Records of the shards that are there. Reads them all; raises PackError for those that are
        not as they were written."""
        found = self.folder.begin(settings)
        if not found:
            return {}
        with (
            ThreadPoolExecutor(self._threads) as pool,
            progress_bar(self._console, "pack", "finished shards", len(found)) as tick,
        ):
            looks = zip(found, pool.map(self.folder.is_whole, found, found.values()), strict=True)
            damaged = []
            try:
                for name, is_whole in heeded(looks, PLACE):
                    tick(1)
                    if not is_whole:
                        damaged.append(name)
                    for place, why in found[name].left_out.items():
                        self._bad.add(self.index_at(place), BadImageError(why))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if damaged:
            raise PackError(
                f"{', '.join(damaged)} in {self.folder.path} are not as they were written, damaged "
                "or others: remove them, and the same command makes them anew"
            )
        self._console.print(f"shards: {len(found)} finished ones are whole and kept", style="green")
        return found

    def finish(self, records: dict[str, Record]) -> dict[str, Record]:
        """All records in order, those of the shards made now among them."""
        plan, source, names = self.folder.plan, self._source, self.folder.plan.names
        missing = [number for number, name in enumerate(names) if name not in records]
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
                at_once=max(_FEWEST_AT_ONCE, _AT_ONCE * self._threads),
            ),
            PLACE,
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
                shard = ShardFile(self.folder, names[number])
                with ExitStack() as unless_handed_over:
                    unless_handed_over.callback(shard.close)
                    counts = self._write(shard, plan.places(number), images, tick)
                    made |= {name: future.result() for name, future in finishing.items()}
                    unless_handed_over.pop_all()
                finishing = {names[number]: finisher.submit(_finish, shard, *counts)}
            made |= {name: future.result() for name, future in finishing.items()}
        self._rate = len(places) / (time.perf_counter() - start)
        return {name: made[name] for name in names}

    def index_at(self, place: int | str) -> int:
        """Of the image at a place of the order."""
        return int(self._order[int(place)])

    def read_back(self, records: dict[str, Record], classes: list[str] | None) -> None:
        """See that the reader of training finds what was packed, and have it make its indices.

        That an image's bytes are right each shard's SHA-256 has said. Raises PackError.
        """
        shards = TarShards(str(self.folder.path), reads=self._config, progress=indexing())
        sizes = [record.num_images for record in records.values() if record.num_images]
        is_right = [*shards.shard_sizes] == sizes and not shards.damage
        if is_right and self._labels is not None:
            left_out = [int(place) for record in records.values() for place in record.left_out]
            labels, names = shards.labelled(1)
            wanted = self._labels[np.delete(self._order, left_out)]
            is_right = np.array_equal(labels.numpy(), wanted) and names == classes
        if not is_right:
            raise PackError(
                f"the shards in {self.folder.path} read otherwise than they were written: is "
                "another process at work there? Remove the folder and give the same command again"
            )

    def tell(self, records: dict[str, Record]) -> None:
        """What there is now, in a line."""
        made = records.values()
        num_images, num_shards = (
            sum(record.num_images for record in made),
            sum(record.num_images > 0 for record in made),
        )
        num_left_out, num_resized = (
            sum(len(record.left_out) for record in made),
            sum(record.num_resized for record in made),
        )
        said = [
            f"{num_images} image{'s' * (num_images != 1)} in "
            f"{num_shards} shard{'s' * (num_shards != 1)} in {self.folder.path}",
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
        shard: ShardFile,
        places: range,
        images: Iterator[tuple[int, Any]],
        tick: Callable[[int], None],
    ) -> tuple[int, int, dict[str, str]]:
        """Its images into its file; gives their number, how many were made smaller, and which were
        left out."""
        left_out, num_resized = {}, 0
        for place in places:
            index, packed = next(images)
            if isinstance(packed, BadImageError):
                self._bad.add(index, packed)
                left_out[str(place)] = " ".join(str(packed).split())
            elif isinstance(packed, OSError):
                raise PackError(
                    f"{self._source.name(index)} cannot be read ({describe(packed)}): see that it "
                    "can, or remove it from the images, and give the same command again"
                ) from packed
            else:
                blocks, is_resized = packed
                shard.add(blocks)
                num_resized += is_resized
            tick(1)
        return len(places) - len(left_out), num_resized, left_out

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
    shard: ShardFile, num_images: int, num_resized: int, left_out: dict[str, str]
) -> Record:
    """In a thread."""
    try:
        return shard.finish(num_images, num_resized, left_out)
    finally:
        shard.close()
