"""Where a loader's thread spends its time: microseconds of an image in each stage of kind fast.

The functions of the package are timed where they are called, so the sum is the whole: `rest` is
what none of them is, the copy of the crop and the seeds above all. A clock in a stage costs a
microsecond or less. `loader` is what a batch takes beyond its samples: order, threads, tensors.

Decoding, resizing and copies run beside one another in as many threads as there are cores; Python
does not. `bench_lock` finds what it allows with any number of cores: whatever runs without the
interpreter's lock sleeps as long as it would take.
"""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from data_images import InMemory, ManyTimes, mosaics
from timing import rates

from beit_fast.data import samples as samples_module
from beit_fast.data.config import MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.decode import decode_fast
from beit_fast.data.views import two_views as views_module
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import fast_views, make_views

GRID = (14, 14)
STAGES = {
    "decode": (views_module, "decode_fast"),
    "draws": (views_module, "draw_view"),
    "resize": (views_module, "_resize"),
    "flip": (views_module, "flip_view"),
    "jitter's numbers": (views_module, "jitter_coefficients"),
    "mask": (samples_module, "draw_mask"),
}


def bench_stages(source: InMemory, rounds: int, batch_size: int = 64) -> list[dict]:
    sample = PretrainSample(ViewConfig(), MaskingConfig(), GRID)
    loader = Loader(
        ManyTimes(source), sample, batch_size=batch_size, num_threads=0, max_bad_share=1.0
    )
    batches = loader.batches()
    next(batches)
    measured: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        with _timed_stages() as seconds:
            start = time.thread_time()
            made = [sample(source.read(i), SampleSeed(0, 0, i)) for i in range(batch_size)]
            whole = time.thread_time() - start
        start = time.thread_time()
        sample.collate(made)
        stacked = time.thread_time() - start
        start = time.process_time()  # its samples are made in a thread of its own
        next(batches)
        loaded = time.process_time() - start
        stages = {
            **seconds,
            "rest": whole - sum(seconds.values()),
            "batch": stacked,
            "loader": loaded - whole - stacked,
            "all": loaded,
        }
        for name, value in stages.items():
            measured[name].append(1e6 * value / batch_size)
    batches.close()
    everything = statistics.median(measured["all"])
    return [
        {
            "case": name,
            "us an image": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "share": statistics.median(values) / everything,
        }
        for name, values in measured.items()
    ]


@contextmanager
def _timed_stages() -> Iterator[dict[str, float]]:
    """Seconds of this thread in each stage, while it lasts."""
    seconds = dict.fromkeys(STAGES, 0.0)

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.thread_time() - start

        return call

    with _replaced({name: timed(name, getattr(*place)) for name, place in STAGES.items()}):
        yield seconds


@contextmanager
def _replaced(stages: dict[str, Callable]) -> Iterator[None]:
    """Other functions for some stages, while it lasts."""
    before = {name: getattr(*STAGES[name]) for name in stages}
    try:
        for name, function in stages.items():
            setattr(*STAGES[name], function)
        yield
    finally:
        for name, function in before.items():
            setattr(*STAGES[name], function)


def bench_lock(
    source: InMemory, threads: tuple[int, ...] = (8, 16, 32), batch_size: int = 64
) -> list[dict]:
    """Images a second of one process where each of its threads had a core of its own.

    Decode and resize are replaced by sleep. What is left takes a core or two: the machine must be
    quiet for this.
    """
    decoded = {id(source.read(i)): decode_fast(source.read(i)) for i in range(len(source))}
    taken = {row["case"]: 1e-6 * row["us an image"] for row in bench_stages(source, 5, batch_size)}
    views = {size: np.zeros((*size, 3), np.uint8) for size in ((224, 224), (112, 112))}

    def decode(data: bytes, _: int) -> np.ndarray:
        time.sleep(taken["decode"])
        return decoded[id(data)]

    def resize(_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        time.sleep(taken["resize"] / len(views))
        return views[size]

    rows = []
    with _replaced({"decode": decode, "resize": resize}):
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


def bench_scaled(
    source: InMemory,
    rounds: int,
    distance: Callable[[np.ndarray, np.ndarray], tuple],
    sides: tuple[int, ...] = (1, 2, 4),
) -> list[dict]:
    """Views of large photographs by both settings of views.decode, and how far those of `scaled`
    are from those of the same box at full size, where the image was shrunk at all."""
    full, scaled = (ViewConfig(decode=decode, color_jitter=0.0) for decode in ("full", "scaled"))
    rows = []
    for side in sides:
        files = mosaics(source, side, count=6)

        def views(config: ViewConfig, files: list[bytes] = files) -> Callable[[int], object]:
            return lambda i: make_views(files[i % 6], config, SampleSeed(0, 0, i).rng("view"))

        measured = rates({"full": views(full), "scaled": views(scaled)}, 24, rounds, turn=2)
        psnr: dict[str, list[float]] = {"images": [], "token_images": []}
        for number in range(24):
            data, seed = files[number % 6], SampleSeed(0, 0, number)
            made, draw = make_views(data, scaled, seed.rng("view"))
            whole = fast_views(decode_fast(data), draw, replace(scaled, decode="full"))
            if not np.array_equal(made["images"], whole["images"]):
                for name, values in psnr.items():
                    values.append(distance(made[name], whole[name])[2])
        for row in measured:
            case = f"{500 * side}x{333 * side}, {row['case']}"
            rows.append(
                {
                    **row,
                    "case": case,
                    "x full": row["median"] / measured[0]["median"],
                    "shrunk": len(psnr["images"]) / 24 if row["case"] == "scaled" else 0.0,
                    "PSNR 224": _median(psnr["images"]) if row["case"] == "scaled" else "",
                    "PSNR 112": _median(psnr["token_images"]) if row["case"] == "scaled" else "",
                }
            )
    return rows


def _median(values: list[float]) -> float | str:
    return statistics.median(values) if values else ""
