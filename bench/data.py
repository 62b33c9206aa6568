"""How fast images become batches, and how far the fast transform is from the reference.

    python bench/data.py [--data FOLDER] [--rounds 5] [--threads 0 1 2 4] [--only masks jitter]
                         [--gpu-rate 3000 5000] [--dali PYTHON] [--device cuda]

Prints masks per second, images per second of both transforms and of crops with labels of pixels,
what the fast one leaves to the device, their distance in pixels, where the time of a sample goes
(data_stages.py), how much of it one process does one image after another whatever its cores
(data_lock.py), the loader's throughput, and that of other libraries beside it, with the cores that
a GPU of --gpu-rate images a second wants of each (data_peers.py; DALI too where --dali names a
Python that has it). Each is written to bench/results/data.csv as it is measured (records.py has the
rule). Masks and jitter decode nothing; the rest needs torchcodec, and the loader Grain. Rates are
per second of CPU time of one thread, so other work on the machine matters less; candidates take
turns every few images, and the median over rounds is printed with its range. Without --data it
takes the photographs of the package.

The rate of `fast` is that of a loader thread: its jitter happens later, on the device that trains.
Where that is a CPU too, its milliseconds, printed apart, come on top. With --device cuda it
measures instead what a GPU makes of the files, as kind gpu, and what that costs a step
(data_device.py).
"""

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data_images import InMemory, ManyTimes
from data_lock import asleep, held_by_image
from data_peers import WHAT, bench_loaders
from data_stages import bench_scaled, bench_stages
from PIL import Image
from records import Records
from timing import RESULTS, conditions, conditions_line, format_table, rates

from beit_fast.data.config import MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.masking import draw_mask
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources import decode as decoding
from beit_fast.data.sources.decode import decode_fast, decode_pillow
from beit_fast.data.sources.masks import Translation, decode_pair
from beit_fast.data.sources.segmentation import MaskedImage
from beit_fast.data.views.color_jitter import apply_jitter, jitter_views
from beit_fast.data.views.config import SegmentationViewConfig, ViewConfig
from beit_fast.data.views.segmentation import SegmentationSample
from beit_fast.data.views.two_views import make_views, normalize, two_views

GRID = (14, 14)
PARTS = (
    "masks", "jitter", "transforms", "stages", "lock", "asleep", "scaled", "segmentation",
    "distance", "loader", "peers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument(
        "--gpu-rate", type=int, nargs="+", default=[3000, 5000], help="images/s that one GPU takes"
    )
    parser.add_argument("--dali", help="Python that has nvidia-dali: a peer, in its own process")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, help="CSV; default results/data.csv")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: kind gpu, by data_device.py"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    source = InMemory(args.data)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU: leave --device out")
        from data_device import Place, measure_all

        measure_all(Place(torch.device("cuda"), source, 128, args.rounds), output=args.output)
        return
    values = conditions(
        torch.device("cpu"),
        ("torchcodec", "simplejpeg", "pillow", "numpy", "grain"),
        rounds=args.rounds,
        images=f"{len(source)} of {source.kilobytes:.0f} kB from {source.origin}",
    )
    print(conditions_line(values))
    rounds = args.rounds
    measures: dict[str, dict[str, Callable[[], list[dict]]]] = {
        "masks": {"masks of 14x14, seeding included, per core second": lambda: bench_masks(rounds)},
        "transforms": {
            "images to two views, per core second": lambda: bench_transforms(source, rounds)
        },
        "segmentation": {
            "images of 512 pixels and their masks to crops of 512, per core second": lambda: (
                bench_segmentation(source, rounds)
            )
        },
        "jitter": {
            "jitter of fast on the device, here a CPU, batches of 64": lambda: bench_jitter(rounds)
        },
        "distance": {
            "fast against reference, levels of 255 and dB": lambda: bench_distance(source)
        },
        "stages": {
            "stages of fast with masks and batches, us an image": lambda: bench_stages(
                source, 4 * rounds
            )
        },
        "lock": {
            "stages of fast with masks and batches, one thread at a time": lambda: held_by_image(
                source, 4 * rounds
            )
        },
        "asleep": {
            "loader if each thread had a core, decode and resize asleep": lambda: asleep(source)
        },
        "scaled": {
            "large photographs to two views, not jittered, per core second": lambda: bench_scaled(
                source, rounds, distance
            )
        },
        "loader": {
            "loader, two views and masks, batches of 64": lambda: bench_loader(source, args.threads)
        },
        "peers": {
            f"loaders, {what}, per core second": lambda what=what: bench_loaders(
                source, what, 2 * rounds, args.gpu_rate, args.dali
            )
            for what in WHAT
        },
    }
    records = Records(args.output or RESULTS / "data.csv", values, ("bench", "case", "figure"))
    for part in (part for part in PARTS if part in args.only):
        for title, measure in measures[part].items():
            report(title, measure, records)
    print(f"written to {records.path}")


def report(title: str, measure: Callable[[], list[dict]], records: Records) -> None:
    """Measure, print and write; a figure that a case does not have is left out."""
    measured = measure()
    print(f"\n{title}\n{format_table(measured)}", flush=True)
    records.add(
        [
            {"bench": title, "case": row["case"], "figure": figure, "value": value}
            for row in measured
            for figure, value in row.items()
            if figure != "case" and value != ""
        ]
    )


def bench_masks(rounds: int) -> list[dict]:
    def draw(strategy: str) -> Callable[[int], object]:
        config = MaskingConfig(strategy=strategy)
        return lambda i: draw_mask(GRID, config, SampleSeed(0, 0, i).rng("mask"))

    strategies = ("block", "block_exact", "block_paper", "random")
    return rates({strategy: draw(strategy) for strategy in strategies}, 4000, rounds, turn=500)


def bench_transforms(source: InMemory, rounds: int) -> list[dict]:
    fast, reference = ViewConfig(kind="fast"), ViewConfig(kind="reference")

    def views(config: ViewConfig) -> Callable[[int], object]:
        return lambda i: two_views(source.read(i), config, SampleSeed(0, 0, i).rng("view"))

    def official(i: int) -> None:
        """The reference and what the official pipeline adds on the CPU: floats, normalised."""
        made = two_views(source.read(i), reference, SampleSeed(0, 0, i).rng("view"))
        for view in made.values():
            normalize(torch.from_numpy(view)[None]).contiguous()

    def first_view(i: int) -> None:
        """Alone: the second one's tokens are read from the cache."""
        make_views(source.read(i), fast, SampleSeed(0, 0, i).rng("view"), ("images",))

    candidates = {
        "reference": views(reference),
        "reference, floats out": official,
        "fast": views(fast),
        "fast, torchcodec": _without_simplejpeg(views(fast)),
        "fast, with a token cache": first_view,
        "fast, no jitter": views(replace(fast, color_jitter=0.0)),
        "decode, Pillow": lambda i: decode_pillow(source.read(i)),
        "decode, fast": lambda i: decode_fast(source.read(i)),
        "decode, torchcodec": _without_simplejpeg(lambda i: decode_fast(source.read(i))),
    }
    rows = rates(candidates, max(64, len(source)), rounds, turn=4)
    return [{**row, "x reference": row["median"] / rows[0]["median"]} for row in rows]


def _without_simplejpeg(candidate: Callable[[int], object]) -> Callable[[int], object]:
    """As where the extra `jpeg` is not installed."""

    def run(i: int) -> None:
        known = decoding.import_simplejpeg
        decoding.import_simplejpeg = lambda: None
        try:
            candidate(i)
        finally:
            decoding.import_simplejpeg = known

    return run


def bench_segmentation(source: InMemory, rounds: int) -> list[dict]:
    """Of JPEGs as large as ADE20K's, with masks of a dozen classes in blobs."""
    labels = Translation(range(1, 151), [0], "repair it").labels
    pairs = [_masked(source.read(i), i) for i in range(min(16, len(source)))]

    def crops(view: SegmentationViewConfig) -> Callable[[int], object]:
        sample = SegmentationSample((512, 512), view, labels)
        return lambda i: sample(pairs[i % len(pairs)], SampleSeed(0, 0, i))

    view = SegmentationViewConfig()
    candidates = {
        "crops": crops(view),
        "crops, not distorted": crops(replace(view, distort=False)),
        "decode both": lambda i: decode_pair(*pairs[i % len(pairs)], labels),
        "decode the image": lambda i: decode_fast(pairs[i % len(pairs)].image),
    }
    return rates(candidates, 128, rounds, turn=4)


def _masked(data: bytes, number: int) -> MaskedImage:
    """An image of 683x512 pixels or 512x683, and a mask with twelve of 150 classes."""
    image = decode_pillow(data)
    size = (683, 512) if image.width >= image.height else (512, 683)
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16), np.uint8))
    blobs = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int32)
    mask = Image.fromarray((blobs * 12 // 256 * 13).astype(np.uint8))
    files = io.BytesIO(), io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(files[0], "JPEG", quality=90)
    mask.save(files[1], "PNG")
    return MaskedImage(*(file.getvalue() for file in files))


def bench_jitter(rounds: int, batch_size: int = 64) -> list[dict]:
    """Milliseconds per image of one thread, the training one where it trains on a CPU."""
    rng = np.random.default_rng(0)

    def jitter(size: tuple[int, int]) -> Callable[[int], object]:
        images = torch.from_numpy(rng.integers(0, 256, (batch_size, *size, 3), np.uint8))
        coefficients = torch.from_numpy(rng.random((batch_size, 3, 3), np.float32))
        return lambda i: apply_jitter(images, coefficients)

    config = ViewConfig()
    candidates = {str(size[0]): jitter(size) for size in (config.size, config.token_size)}
    rows = []
    for row in rates(candidates, 8, rounds, turn=2):
        median, low, high = (1000 / batch_size / row[name] for name in ("median", "high", "low"))
        rows.append({"case": row["case"], "ms per image": median, "low": low, "high": high})
    return rows


def bench_distance(source: InMemory, draws: int = 4) -> list[dict]:
    """Over images and draws: mean and largest difference, PSNR in the median and at worst."""
    rows = []
    for title, color_jitter in (("", 0.4), (", no jitter", 0.0)):
        fast = ViewConfig(kind="fast", color_jitter=color_jitter)
        reference = replace(fast, kind="reference")
        measured: list[list[tuple[float, float, float]]] = [[], []]
        for i in range(len(source)):
            for epoch in range(draws):
                seed = SampleSeed(0, epoch, i)
                ours = finished(source.read(i), fast, seed)
                theirs = finished(source.read(i), reference, seed)
                for results, a, b in zip(measured, ours, theirs, strict=True):
                    results.append(distance(a, b))
        for name, results in zip(("224", "112"), measured, strict=True):
            mean, largest, psnr = (np.array(column) for column in zip(*results, strict=True))
            rows.append(
                {
                    "case": name + title,
                    "mean": float(mean.mean()),
                    "max": int(largest.max()),
                    "PSNR median": float(np.median(psnr)),
                    "PSNR worst": float(psnr.min()),
                }
            )
    return rows


def finished(data: bytes, config: ViewConfig, seed: SampleSeed) -> tuple[np.ndarray, np.ndarray]:
    """Both views as the model and the tokenizer get them."""
    made = two_views(data, config, seed.rng("view"))
    views = jitter_views({name: torch.from_numpy(array)[None] for name, array in made.items()})
    return views["images"][0].numpy(), views["token_images"][0].numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """(mean, max, PSNR in dB) of the difference of two uint8 images."""
    difference = ours.astype(np.int32) - theirs
    square = max((difference**2).mean(), 1e-9)
    return np.abs(difference).mean(), np.abs(difference).max(), 10 * np.log10(255**2 / square)


def bench_loader(source: InMemory, threads: list[int], batch_size: int = 64) -> list[dict]:
    rows = []
    for kind, num_threads in [("fast", n) for n in threads] + [("reference", 0)]:
        loader = Loader(
            ManyTimes(source),
            PretrainSample(ViewConfig(kind=kind), MaskingConfig(), GRID),
            batch_size=batch_size,
            num_threads=num_threads,
            max_bad_share=1.0,
        )
        batches = loader.batches()
        for _ in range(num_threads + 2):  # those read ahead while nobody waited
            next(batches)
        wall, cpu, num_batches = time.perf_counter(), time.process_time(), 4 + 4 * num_threads
        for _ in range(num_batches):
            next(batches)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        batches.close()
        images = num_batches * batch_size
        rows.append(
            {
                "case": f"{kind}, {num_threads} threads",
                "images per second": images / wall,
                "images per core second": images / cpu,
            }
        )
    return rows


if __name__ == "__main__":
    main()
