"""Where a loader's thread spends its time: microseconds of an image in each stage of kind fast.

The functions of the package are timed where they are called, so the sum is the whole: `rest` is
what none of them is, the copy of the crop and the seeds above all. A clock in a stage costs a
microsecond or less. `loader` is what a batch takes beyond its samples: order, threads, tensors.
Which of it runs in one thread at a time is found by data_lock.py.
"""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
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
            middle, in_samples = time.thread_time(), sum(seconds.values())
            sample.collate(made)
            end, in_all = time.thread_time(), sum(seconds.values())
        before = time.process_time()  # its samples are made in a thread of its own
        next(batches)
        loaded = time.process_time() - before
        stages = {
            **seconds,
            "rest": middle - start - in_samples,
            "batch": end - middle - (in_all - in_samples),
            "loader": loaded - (end - start),
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

    with replaced(STAGES, {name: timed(name, getattr(*at)) for name, at in STAGES.items()}):
        yield seconds


@contextmanager
def replaced(places: Mapping[str, tuple], functions: dict[str, Callable]) -> Iterator[None]:
    """Other functions at some of the places, which are (owner, name) each, while it lasts."""
    before = {name: getattr(*places[name]) for name in functions}
    try:
        for name, function in functions.items():
            setattr(*places[name], function)
        yield
    finally:
        for name, function in before.items():
            setattr(*places[name], function)


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
