"""Every image once, in order, as one batch of views after another: how anything is counted."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.sources.decode import BadImageError, decode_fast
from beit_fast.data.sources.folder import ImageSource, Source, damage_of, read_ahead
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.reading import HungReadError, Read, Reads
from beit_fast.data.sources.subset import Subset

Files = TypeVar("Files")  # of one image: bytes, or those of its mask too
Looked = TypeVar("Looked")  # what is made of them

_AT_ONCE = 1024  # images handed to the threads
_PART = 4  # of them in one piece, as handing over takes time too
_NAMED = 5  # images in an error


def each_in_order(
    source: Source[Files],
    indices: Sequence[int],
    look: Callable[[int, Files], Looked],
    *,
    num_threads: int,
    reads: ReadConfig = READS,
    at_once: int = _AT_ONCE,
) -> Iterator[tuple[int, Looked | BadImageError | OSError]]:
    """Each index with what `look(index, files)` gave, in order, read and looked at by threads.

    Where the image cannot be read, within the limits of `reads`, or `look` raises BadImageError or
    OSError, the error comes in its place; any other error is raised when its image is due.

    at_once: images read ahead of the one that is due, or a few more. Closing it waits for no read.
    """

    def look_at(part: Sequence[int]) -> list[Looked | BadImageError | OSError]:
        found: list[Looked | BadImageError | OSError] = []

        def look_at_rest(read: Read[Files]) -> None:
            for index in part[len(found) :]:
                try:
                    found.append(look(index, read(index)))
                except (BadImageError, OSError) as error:
                    found.append(error)

        while len(found) < len(part):
            try:
                limited.run(look_at_rest)
            except HungReadError as error:
                found.append(error)
        return found

    starts = range(0, len(indices), _PART)
    parts = (list(map(int, indices[first : first + _PART])) for first in starts)
    with Reads(source, reads) as limited, ThreadPoolExecutor(num_threads) as pool:

        def submit(part: Sequence[int]) -> tuple[Sequence[int], Future]:
            read_ahead(source, part)
            return part, pool.submit(look_at, part)

        waiting = deque(map(submit, itertools.islice(parts, -(-at_once // _PART))))
        try:
            while waiting:
                part, future = waiting.popleft()
                yield from zip(part, future.result(), strict=True)
                waiting.extend(map(submit, itertools.islice(parts, 1)))
        finally:
            limited.stop()
            pool.shutdown(wait=False, cancel_futures=True)


def lost(source: Source) -> dict[str, str]:
    """Name -> reason of what is missing of images that all count: a damaged shard. Of those that
    were held out of others nothing is."""
    return {} if isinstance(source, Subset) else dict(damage_of(source))


def unusable_images(
    source: Source[Files],
    indices: Sequence[int] | None = None,
    *,
    num_threads: int,
    look: Callable[[Files], Looked] = decode_fast,
    each: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    seen: Callable[[int, Looked], None] = lambda index, looked: None,
    reads: ReadConfig = READS,
) -> dict[str, str]:
    """Name -> reason of the images of `source` (of those with `indices`) that cannot be read and
    decoded, and of what is `lost` where all are looked at; `look` does that, and raises
    BadImageError. A read that exceeds the limits of `reads` is a reason too. `seen` gets the index
    of each other image, and what `look` gave, in a thread. What becomes of the images goes through
    `each`, one after another: it may raise to leave."""
    found = lost(source) if indices is None else {}
    indices = range(len(source)) if indices is None else indices

    def look_at(index: int, files: Files) -> None:
        seen(index, look(files))  # which is large, if pixels

    looked_at = each_in_order(source, indices, look_at, num_threads=num_threads, reads=reads)
    for index, looked in each(looked_at):
        if looked is not None:
            found[source.name(index)] = " ".join(str(looked).split())
    return found


def name_unusable(
    unusable: Mapping[str, str],
    num_images: int,
    kind: str = "images",
    remedy: str = "Repair or remove them: every one counts, so none is left out",
) -> str:
    """The error of images that cannot be done without, the first by name, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for name, why in [*unusable.items()][:_NAMED]:
        by_reason.setdefault(why, []).append(name)
    named = "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items())
    more = f" and {len(unusable) - _NAMED} more" if len(unusable) > _NAMED else ""
    return f"{len(unusable)} of {num_images} {kind} cannot be used: {named}{more}. {remedy}"


def batches_in_order(
    source: ImageSource,
    indices: Sequence[int],
    view: Callable[[bytes], np.ndarray],
    *,
    batch_size: int,
    num_threads: int,
    replace_bad: Callable[[int, Exception], np.ndarray] | None = None,
    reads: ReadConfig = READS,
) -> Iterator[tuple[slice, Tensor]]:
    """(which of `indices`, uint8 (B, height, width, 3)), the next batch being read meanwhile.

    `view` makes pixels of one size from an image's bytes. An image that cannot be used or, by the
    limits of `reads`, not be read is a ValueError that names it, for each counts, and so is what is
    `lost`; `replace_bad` is told its index and the reason, in a thread, and gives pixels in its
    place.
    """
    if replace_bad is None and (bad := lost(source)):
        raise ValueError(name_unusable(bad, len(source)))

    def read(index: int) -> np.ndarray:
        try:
            return limited.run(lambda read: view(read(index)))
        except (BadImageError, OSError) as error:
            if replace_bad is not None:
                return replace_bad(index, error)
            raise ValueError(
                f"cannot use {source.name(index)} ({error}): repair or remove it; every image "
                "counts, so none is left out"
            ) from error

    with Reads(source, reads) as limited, ThreadPoolExecutor(num_threads) as pool:

        def submit(first: int) -> list[Future[np.ndarray]]:
            part = indices[first : first + batch_size]
            read_ahead(source, part)
            return [pool.submit(read, index) for index in part]

        ahead = submit(0)
        try:
            for first in range(0, len(indices), batch_size):
                now, ahead = ahead, submit(first + batch_size)
                images = torch.from_numpy(np.stack([future.result() for future in now]))
                yield slice(first, first + len(now)), images
        finally:
            limited.stop()
            pool.shutdown(wait=False, cancel_futures=True)
