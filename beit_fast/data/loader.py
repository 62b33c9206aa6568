"""Batches in a fixed order, read ahead by threads, resumed exactly from a number.

The data is one endless stream of samples: pass 0 over the data set in a shuffled order, pass 1 in
another, and so on. Batch k of rank r holds the samples

    (k * world_size + r) * batch_size  ...  + batch_size

of that stream. So the state of the loader is k; nothing is dropped at the end of a pass (a batch
may hold the last samples of one and the first of the next, and a data set may be smaller than a
batch); ranks never share a sample; and a step over the same number of samples holds the same ones
however they are split over ranks and accumulation. Which image is which sample is said by
passes.py, also for a run whose folder changed on the way.

Split, threads and, where all images are shuffled, the order are Grain's, one element being one
batch; the order of a window of shards is window.py's. A sample's crop and mask come from (seed,
pass, place in the data set) alone.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.bad_samples import BadDataError, BadSamples
from beit_fast.data.device_decode import DecodeCounts
from beit_fast.data.device_views import DeviceViews, late_views, taken
from beit_fast.data.finishing import Finishing
from beit_fast.data.grain import import_grain
from beit_fast.data.passes import SampleOf
from beit_fast.data.run_images import RunImages
from beit_fast.data.samples import Sample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import (
    Source,
    read_ahead,
    read_windowed,
    shard_sizes_of,
)
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.reading import HungReadError, Read, Reads, ReadsClosedError
from beit_fast.data.views.two_views import LATE, LateViews
from beit_fast.errors import RunError
from beit_fast.flags import flag

Files = TypeVar("Files")  # of one image: bytes, or those of its mask too
Made = dict[str, Any]  # a sample: its arrays and, of kind gpu, what its views are made from

# Up to here the lengths that Grain computes in floats are whole numbers; a run at 10,000 images
# per second gets there in fourteen thousand years.
_STREAM_LENGTH = 2**52
_CPU = torch.device("cpu")


class SampleError(RunError):
    """A sample cannot be made, for another reason than a bad file."""


class Loader:
    """Endless batches of samples from a source.

    batch_size is per rank. An image that cannot be used, itself or the mask file that a source has
    for it, is replaced by the next one of the data set that can, with the crop and hidden patches
    of the one it replaces; it is named once in the log "beit_fast.data" and counted. With more bad
    files than `max_bad_share` of the data set the run stops with BadDataError, but ten of them are
    borne in a data set of a hundred or more (a tenth of a smaller one) so that one broken file does
    not stop a short run. `max_bad_share=0` is strict: the first stops it. Each rank counts what it
    meets. A file that is not read within the limits of `reads` is a bad one. In a source with
    shards the next image is one of the same shard as long as there are any, see `ImageList`.

    device: where views of kind gpu are made, and lie; all else is on the CPU.
    window: shards that a pass reads at a time, which all ranks share; None: all images are.

    Raises ValueError for sizes or ranks that make no sense, and for a window over a source that has
    no shards.
    """

    def __init__(
        self,
        source: Source[Files],
        sample: Sample[Files],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 4,
        max_bad_share: float = 0.001,
        reads: ReadConfig = READS,
        window: int | None = None,
        device: torch.device = _CPU,
    ):
        if len(source) < 1:
            raise ValueError("the data set is empty: there is nothing to load")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least one sample")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks count from 0")
        if num_threads < 0:
            raise ValueError(f"num_threads={num_threads}: take 0 (no threads) or more")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share={max_bad_share} must be within 0 and 1")
        if window is not None:
            if window < 1:
                raise ValueError(f"window={window}: a window needs at least one shard")
            if shard_sizes_of(source) is None:
                raise ValueError(
                    f"{flag('data.shuffle')} is window and {source.name(0)} lies in no shard: pass "
                    f"{flag('data.shuffle')} full, or shards or tables as {flag('data.path')}"
                )
            read_windowed(source, window)
        self.source, self.sample = source, sample
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.num_threads, self.reads, self.device = num_threads, reads, device
        self.images = RunImages(source, window)
        self._bad = BadSamples(source, max_bad_share)
        self.decode_counts = DecodeCounts()  # of views of kind gpu

    @property
    def batches_per_epoch(self) -> int:
        """Batches per rank in one pass over the data, rounded down, at least 1: for schedules.

        Passes themselves are counted in samples, see the top of this file.
        """
        return max(1, len(self.source) // (self.batch_size * self.world_size))

    @property
    def bad_samples(self) -> dict[str, str]:
        """Name -> reason of the files met so far (batches read ahead included) and replaced."""
        return self._bad.by_name()

    def batches(self, start: int = 0, *, ahead: bool = True) -> Iterator[dict[str, Tensor]]:
        """Batches from number `start` on, without end: the arrays of the sample's batch as CPU
        tensors (views of kind gpu: on the device), among them sample_index int64 (B,), the images
        really read.

        ahead: where a window of shards is read at a time, the source is told which are next. Of a
        few batches from elsewhere it is not, for it may copy all of them.

        A generator: close it (or drop it) to stop its threads. That waits for what is decoded at
        the moment and not for what is read. An error in a thread is raised when its batch is due,
        after the batches before it: SampleError for one that names memory or torch, with the image.
        """
        if start < 0:
            raise ValueError(f"start={start}: batches count from 0")
        passes, size = self.images.passes(self.seed, ahead=ahead), self.batch_size
        samples = (
            import_grain()
            .MapDataset.range(_STREAM_LENGTH // size)[self.rank :: self.world_size]
            .map(lambda batch: [passes[i] for i in range(batch * size, (batch + 1) * size)])
        )
        return self._generate(samples, start)

    def batches_in_order(self, epoch: int, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the images first .. last - 1 in the order of the data set, with the crops they
        have in pass `epoch`, whatever the rank. The last may be smaller. Otherwise as `batches`."""
        size, in_order = self.batch_size, self.images.in_order
        samples = (
            import_grain()
            .MapDataset.range(first, last, size)
            .map(lambda i: [in_order(epoch, place) for place in range(i, min(i + size, last))])
        )
        return self._generate(samples, 0)

    def with_sample(self, sample: Sample) -> "Loader":
        """This loader with another sample; what is known of bad files is shared."""
        loader = copy.copy(self)
        loader.sample = sample
        return loader

    def of_rank(self, rank: int, world_size: int) -> "Loader":
        """This loader with the batches of another rank; what is known of bad files is shared."""
        loader = copy.copy(self)
        loader.rank, loader.world_size = rank, world_size
        return loader

    def _generate(self, samples: Any, start: int) -> Iterator[dict[str, Tensor]]:
        """samples: Grain's map data set of lists of samples, as `Passes` says what each is."""
        grain = import_grain()
        late = late_views(self.sample, self.device, self.decode_counts)
        reader = _Reader(self)
        batches = samples.map(reader.read_batch if late is None else reader.read_samples)
        options = grain.ReadOptions(
            num_threads=self.num_threads,
            # Each thread has a batch in the making, and one or two wait for the consumer.
            prefetch_buffer_size=self.num_threads + 2 if self.num_threads else 0,
        )
        iterator = iter(batches.to_iter_dataset(options))
        iterator.set_state({"next_index": start})
        finishing = None if late is None else Finishing(lambda read: reader.finish(*read, late))
        try:
            if finishing is None:
                yield from map(_tensors, iterator)
            else:
                for batch in finishing(iterator):
                    taken(batch)
                    yield batch
        finally:
            iterator.close()  # cancels what has not begun, but waits for nothing
            reader.stop()
            if finishing is not None:
                finishing.close()


class _Reader:
    """Reads batches in Grain's threads, and can be stopped within one sample."""

    # A generator that nobody closed is finalised with the interpreter, when modules are gone.
    _this_thread = staticmethod(threading.current_thread)

    def __init__(self, loader: Loader):
        self._source, self._sample, self._seed = loader.source, loader.sample, loader.seed
        self._reads = Reads(loader.source, loader.reads)
        self._flag = flag("data.num_threads")  # threads run out of memory
        self._bad, self._threaded = loader._bad, loader.num_threads > 0
        self._threads: set[threading.Thread] = set()  # of Grain's
        self._makers: set[threading.Thread] = set()  # which those wait for

    def read_batch(self, numbers: Sequence[SampleOf]) -> dict[str, np.ndarray]:
        return self._sample.collate(self.read_samples(numbers)[1])

    def read_samples(self, numbers: Sequence[SampleOf]) -> tuple[Sequence[SampleOf], list[Made]]:
        if self._threaded:
            self._threads.add(threading.current_thread())
        wanted = (images[place] for _, place, images in numbers)
        read_ahead(self._source, [n for n in wanted if n >= 0 and not self._bad.knows(n)])
        samples: list[Made] = []
        self._add_samples(samples, numbers)
        return numbers, samples

    def finish(
        self, numbers: Sequence[SampleOf], samples: list[Made], late: DeviceViews
    ) -> dict[str, Tensor]:
        """The batch of what `read_samples` gave, in another thread than that.

        An image that turns out to be bad is so from here on, and the sample is made anew: from the
        image that it would have been made from had that been known, under the same crop and mask.
        """

        def replace(row: int, error: BadImageError) -> LateViews:
            self._bad.add(int(samples[row]["sample_index"]), error)
            made: list[Made] = []
            self._add_samples(made, numbers[row : row + 1])
            (samples[row],) = made
            return samples[row][LATE]

        views = late([sample[LATE] for sample in samples], replace)
        for sample in samples:
            del sample[LATE]
        return views | _tensors(self._sample.collate(samples))

    def stop(self) -> None:
        """Returns when no thread makes a sample any more; a read that hangs is left to itself."""
        self._reads.stop()
        # A generator that is dropped may be finalised anywhere, in one of its own threads too.
        if self._this_thread() not in self._threads | self._makers:
            for thread in list(self._threads):
                thread.join()
        self._reads.close()

    def _add_samples(self, samples: list[Made], numbers: Sequence[SampleOf]) -> None:
        """Make those samples of a batch that are not there yet."""
        while len(samples) < len(numbers):
            try:
                self._reads.run(lambda read: self._add_rest(samples, numbers, read))
            except HungReadError as error:
                self._bad.add(error.index, error)

    def _add_rest(self, samples: list[Made], numbers: Sequence[SampleOf], read: Read) -> None:
        self._makers.add(threading.current_thread())
        for number in numbers[len(samples) :]:
            sample, used = self._make(number, read)
            samples.append(sample | {"sample_index": np.int64(used)})

    def _make(self, number: SampleOf, read: Read) -> tuple[Made, int]:
        """The sample and the number of the image in it: the one at its place of the list, or the
        first of those that may take it that can be used."""
        epoch, place, images = number
        seed = SampleSeed(self._seed, epoch, place)
        for candidate in images.from_place(place):
            if self._bad.knows(candidate):
                continue
            try:
                return self._sample(read(candidate), seed), candidate
            except (BadImageError, OSError) as error:
                self._bad.add(candidate, error)
            except (RunError, ReadsClosedError):
                raise
            except Exception as error:
                where = f"{self._source.name(candidate)} (sample {place}, pass {epoch})"
                if isinstance(error, MemoryError | RuntimeError):
                    raise self._sample_error(where, error) from error
                error.add_note(f"in {where}")  # a fault of ours
                raise
        raise BadDataError(f"none of the {len(images)} images can be used; see the log for each")

    def _sample_error(self, where: str, error: MemoryError | RuntimeError) -> SampleError:
        said = next(iter(str(error).splitlines()), "")
        return SampleError(
            f"cannot make a sample of {where}: {type(error).__name__}{': ' * bool(said)}"
            f"{said[:200]}. Where memory ran out take fewer {self._flag}; else repair or remove "
            "the file"
        )


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}
