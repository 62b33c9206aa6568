"""Every image once, in order, as one batch of views after another: how anything is counted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.sources.decode import BadImageError, decode_fast
from beit_fast.data.sources.folder import ImageSource, Source, damage_of
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.reading import Reads
from beit_fast.data.sources.subset import Subset

Files = TypeVar("Files")  # of one image: bytes, or those of its mask too

_AT_ONCE = 1024  # images handed to the threads
_NAMED = 5  # images in an error


def lost(source: Source) -> dict[str, str]:
    """Name -> reason of what is missing of images that all count: a damaged shard. Of those that
    were held out of others nothing is."""
    return {} if isinstance(source, Subset) else dict(damage_of(source))


def unusable_images(
    source: Source[Files],
    indices: Sequence[int] | None = None,
    *,
    num_threads: int,
    look: Callable[[Files], object] = decode_fast,
    each: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    seen: Callable[[int, Any], None] = lambda index, looked: None,
    reads: ReadConfig = READS,
) -> dict[str, str]:
    """Name -> reason of the images of `source` (of those with `indices`) that cannot be read and
    decoded, and of what is `lost` where all are looked at; `look` does that, and raises
    BadImageError. A read that exceeds the limits of `reads` is a reason too. `seen` gets the index
    of each other image, and what `look` gave. What becomes of the images goes through `each`, one
    after another: it may raise to leave."""

    def reason(index: int) -> str | None:
        try:
            looked = limited.run(lambda read: look(read(index)))
        except (BadImageError, OSError) as error:
            return " ".join(str(error).split())
        seen(index, looked)
        return None

    found = lost(source) if indices is None else {}
    indices = range(len(source)) if indices is None else indices
    with Reads(source, reads) as limited, ThreadPoolExecutor(num_threads) as pool:
        try:
            for first in range(0, len(indices), _AT_ONCE):
                part = indices[first : first + _AT_ONCE]
                for index, why in each(zip(part, pool.map(reason, part), strict=True)):
                    if why is not None:
                        found[source.name(index)] = why
        finally:
            limited.stop()
            pool.shutdown(wait=False, cancel_futures=True)
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
            return [pool.submit(read, index) for index in indices[first : first + batch_size]]

        ahead = submit(0)
        try:
            for first in range(0, len(indices), batch_size):
                now, ahead = ahead, submit(first + batch_size)
                images = torch.from_numpy(np.stack([future.result() for future in now]))
                yield slice(first, first + len(now)), images
        finally:
            limited.stop()
            pool.shutdown(wait=False, cancel_futures=True)
