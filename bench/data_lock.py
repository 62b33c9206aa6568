"""How many images a second one process can make, whatever its cores: Python runs one thread.

`held_by_image` counts the microseconds of a thread in which it holds the interpreter's lock for an
image of kind fast: all CPU time but that of the calls in `_releasing`, which decode, resize and
copy without it. What these hold themselves is what they take of the least there is; small arrays
count as held. It is time of one thread, so it may be measured on a busy machine, and its inverse is
what no number of cores exceeds. A hook on the lock itself, in C, found 231 us where this found 247.

`asleep` runs the loader with as many threads as many cores would have: what runs without the lock
sleeps as long as it takes. That shows what threads lose by waiting for one another, but only on a
machine with cores to spare, for the rest wants two: where "cores busy" stays below one, it is the
machine that holds it down.
"""

import functools
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from data_images import InMemory, ManyTimes
from data_stages import GRID, STAGES, bench_stages, replaced
from PIL import Image

from beit_fast.data.config import MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources import decode as decoding
from beit_fast.data.sources.decode import decode_fast
from beit_fast.data.views import two_views as views_module
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import flip_view

PIECES = {**STAGES, "seeds": (SampleSeed, "rng")}


class _Nothing:
    """A sample that takes no time: what the loader takes itself is left."""

    def __call__(self, data: bytes, seed: SampleSeed) -> dict[str, np.ndarray]:
        return {}

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {}


class _Held:
    """Seconds of this thread with the lock since `begin`: in all, and in each of `PIECES`."""

    def begin(self) -> None:
        self._free, self._start = 0.0, time.thread_time()
        self.pieces = dict.fromkeys(PIECES, 0.0)

    @property
    def seconds(self) -> float:
        return time.thread_time() - self._start - self._free

    def releasing(self, function: Callable, holds: float) -> Callable:
        """The function, whose time is not counted but for `holds` seconds of each call."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._free += max(0.0, time.thread_time() - start - holds)

        return call

    def piece(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = self.seconds
            try:
                return function(*args, **kwargs)
            finally:
                self.pieces[name] += self.seconds - start

        return call


def held_by_image(source: InMemory, rounds: int, batch_size: int = 64) -> list[dict]:
    """Microseconds with the lock for an image, by piece, and images a second at most."""
    sample = PretrainSample(ViewConfig(), MaskingConfig(), GRID)
    loader = Loader(ManyTimes(source), _Nothing(), batch_size=batch_size, num_threads=0)
    batches = loader.batches()
    next(batches)
    held = _Held()
    calls, wrapped = _releasing(batch_size), {}
    for name, (*place, least) in calls.items():
        wrapped[name] = held.releasing(getattr(*place), _seconds_of(least))
    measured: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        with replaced({name: place[:2] for name, place in calls.items()}, wrapped):
            pieces = {name: held.piece(name, getattr(*place)) for name, place in PIECES.items()}
            with replaced(PIECES, pieces):
                held.begin()
                made = [sample(source.read(i), SampleSeed(0, 0, i)) for i in range(batch_size)]
                middle, in_samples = held.seconds, sum(held.pieces.values())
                sample.collate(made)
                del made
                end, in_all = held.seconds, sum(held.pieces.values())
        start = time.process_time()  # its samples are made in a thread of its own
        next(batches)
        loading = time.process_time() - start
        seconds = {
            **held.pieces,
            "rest": middle - in_samples,
            "batch": end - middle - (in_all - in_samples),
            "loader": loading,
        }
        for name, value in {**seconds, "all": sum(seconds.values())}.items():
            measured[name].append(1e6 * value / batch_size)
    batches.close()
    return [
        {
            "case": name,
            "us with the lock": (median := statistics.median(values)),
            "low": min(values),
            "high": max(values),
            "images per second at most": 1e6 / median if name == "all" else "",
        }
        for name, values in measured.items()
    ]


def _releasing(batch_size: int) -> dict[str, tuple[Any, str, Callable[[], object]]]:
    """Calls that leave the lock to others: where they are looked up, and a call of each with the
    least there is to do."""
    pixel, file = np.zeros((1, 2, 3), np.uint8), io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "JPEG")
    decoder = "_torchcodec_jpeg" if decoding.import_simplejpeg() is None else "_simplejpeg"
    decode = getattr(decoding, decoder)
    planes = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    resize = functools.partial(
        torch.nn.functional.interpolate, planes, (1, 1), mode="bicubic", antialias=True
    )
    return {
        "decode": (decoding, decoder, lambda: decode(file.getvalue())),
        "resize": (torch.nn.functional, "interpolate", resize),
        "crop": (np, "ascontiguousarray", lambda: np.ascontiguousarray(pixel[:, :1])),
        "flip": (views_module, "flip_view", lambda: flip_view(pixel)),
        "stack": (np, "stack", lambda: np.stack([pixel] * batch_size)),
    }


def _seconds_of(call: Callable[[], object], calls: int = 200) -> float:
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls


def asleep(
    source: InMemory, threads: tuple[int, ...] = (8, 16, 32), batch_size: int = 64
) -> list[dict]:
    """Images a second of one process where each of its threads had a core of its own."""
    decoded = {id(source.read(i)): decode_fast(source.read(i)) for i in range(len(source))}
    taken = {row["case"]: 1e-6 * row["us an image"] for row in bench_stages(source, 5, batch_size)}
    views = {size: np.zeros((*size, 3), np.uint8) for size in ((224, 224), (112, 112))}

    def decode(data: bytes, _: int) -> np.ndarray:
        time.sleep(taken["decode"])
        return decoded[id(data)]

    def resize(_: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        time.sleep(taken["resize"] / len(views))
        return views[size]

    rows = []
    with replaced(STAGES, {"decode": decode, "resize": resize}):
        for num_threads in threads:
            loader = Loader(
                ManyTimes(source),
                PretrainSample(ViewConfig(), MaskingConfig(), GRID),
                batch_size=batch_size,
                num_threads=num_threads,
                max_bad_share=1.0,
            )
            batches = loader.batches()
            for _ in range(num_threads + 2):  # those read ahead while nobody waited
                next(batches)
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(4 * num_threads):
                next(batches)
            images = 4 * num_threads * batch_size
            rows.append(
                {
                    "case": f"{num_threads} threads",
                    "images per second": images / (time.perf_counter() - start),
                    "as many cores would give": num_threads / taken["all"],
                    "cores busy": (time.process_time() - cpu) / (time.perf_counter() - start),
                }
            )
            batches.close()
    return rows
