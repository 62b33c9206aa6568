"""How fast images become batches, and how far the fast transform is from the reference.

    python bench/data.py [--data FOLDER] [--rounds 5] [--threads 0 1 2 4] [--only masks jitter]

Prints masks per second, images per second of both transforms and of crops with labels of pixels,
what the fast one leaves to the device, their distance in pixels, and the loader's throughput, and
writes each of these to bench/results/data.csv as it is measured (records.py has the rule). Masks
and jitter decode nothing; the rest needs torchcodec, and the loader Grain. Rates are per second of
CPU time of one thread, so other work on the machine matters less; candidates take turns every few
images, and the median over rounds is printed with its range. Without --data it takes the
photographs of the package.

The rate of `fast` is that of a loader thread: its jitter happens later, on the device that trains.
Where that is a CPU too, its milliseconds, printed apart, come on top.
"""

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from records import Records
from timing import RESULTS, conditions, conditions_line, format_table

import beit_fast.data
from beit_fast.data.config import MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.masking import draw_mask
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.decode import decode_fast, decode_pillow
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.masks import Translation, decode_pair
from beit_fast.data.sources.segmentation import MaskedImage
from beit_fast.data.views.color_jitter import apply_jitter, jitter_views
from beit_fast.data.views.config import SegmentationViewConfig, ViewConfig
from beit_fast.data.views.segmentation import SegmentationSample
from beit_fast.data.views.two_views import make_views, normalize, two_views

GRID = (14, 14)
PARTS = ("masks", "jitter", "transforms", "segmentation", "distance", "loader")
MAX_FILES = 256  # of a folder: enough to be even, few enough to sit in memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=RESULTS / "data.csv", help="CSV")
    args = parser.parse_args()

    torch.set_num_threads(1)
    source = InMemory(args.data)
    values = conditions(
        torch.device("cpu"),
        ("torchcodec", "pillow", "numpy", "grain"),
        rounds=args.rounds,
        images=f"{len(source)} of {source.kilobytes:.0f} kB from {source.origin}",
    )
    print(conditions_line(values))
    measures: dict[str, tuple[str, Callable[[], list[dict]]]] = {
        "masks": (
            "masks of 14x14, seeding included, per core second",
            lambda: bench_masks(args.rounds),
        ),
        "transforms": (
            "images to two views, per core second",
            lambda: bench_transforms(source, args.rounds),
        ),
        "segmentation": (
            "images of 512 pixels and their masks to crops of 512, per core second",
            lambda: bench_segmentation(source, args.rounds),
        ),
        "jitter": (
            "jitter of fast on the device, here a CPU, batches of 64",
            lambda: bench_jitter(args.rounds),
        ),
        "distance": (
            "fast against reference, levels of 255 and dB",
            lambda: bench_distance(source),
        ),
        "loader": (
            "loader, two views and masks, batches of 64",
            lambda: bench_loader(source, args.threads),
        ),
    }
    records = Records(args.output, values, ("bench", "case", "figure"))
    for part in (part for part in PARTS if part in args.only):
        title, measure = measures[part]
        measured = measure()
        print(f"\n{title}\n{format_table(measured)}", flush=True)
        records.add(
            [
                {"bench": title, "case": row["case"], "figure": figure, "value": value}
                for row in measured
                for figure, value in row.items()
                if figure != "case"
            ]
        )
    print(f"written to {records.path}")


def bench_masks(rounds: int) -> list[dict]:
    def draw(strategy: str) -> Callable[[int], object]:
        config = MaskingConfig(strategy=strategy)
        return lambda i: draw_mask(GRID, config, SampleSeed(0, 0, i).rng("mask"))

    strategies = ("block", "block_exact", "block_paper", "random")
    return rates({strategy: draw(strategy) for strategy in strategies}, 4000, rounds, turn=500)


def bench_transforms(source: "InMemory", rounds: int) -> list[dict]:
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
        "fast, with a token cache": first_view,
        "fast, no jitter": views(replace(fast, color_jitter=0.0)),
        "decode, Pillow": lambda i: decode_pillow(source.read(i)),
        "decode, fast": lambda i: decode_fast(source.read(i)),
    }
    rows = rates(candidates, max(64, len(source)), rounds, turn=4)
    return [{**row, "x reference": row["median"] / rows[0]["median"]} for row in rows]


def bench_segmentation(source: "InMemory", rounds: int) -> list[dict]:
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


def bench_distance(source: "InMemory", draws: int = 4) -> list[dict]:
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


def bench_loader(source: "InMemory", threads: list[int], batch_size: int = 64) -> list[dict]:
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


def rates(
    candidates: dict[str, Callable[[int], object]], items: int, rounds: int, turn: int
) -> list[dict]:
    """Calls per second of each candidate on the numbers below `items`, `turn` of them at a time."""
    for candidate in candidates.values():
        candidate(0)
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        seconds = dict.fromkeys(candidates, 0.0)
        for first in range(0, items, turn):
            for name, candidate in candidates.items():
                start = time.thread_time()
                for i in range(first, min(first + turn, items)):
                    candidate(i)
                seconds[name] += time.thread_time() - start
        for name in candidates:
            measured[name].append(items / seconds[name])
    return [
        {"case": name, "median": statistics.median(rate), "low": min(rate), "high": max(rate)}
        for name, rate in measured.items()
    ]


class InMemory:
    """The files of a folder, held in memory: what is timed is work, not the disk."""

    def __init__(self, folder: Path | None):
        photographs = Path(beit_fast.data.__file__).parent / "photographs"
        if folder is None and not photographs.is_dir():
            self.origin, self._files = "random gradients", [_gradient(i) for i in range(16)]
        else:
            files = ImageFolder(folder or photographs)
            self.origin = folder or "the photographs of the package"
            order = random.Random(0).sample(range(len(files)), min(MAX_FILES, len(files)))
            self._files = [files.read(i) for i in order]
        self.kilobytes = sum(map(len, self._files)) / len(self._files) / 1000

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return self._files[index % len(self._files)]

    def name(self, index: int) -> str:
        return f"file {index}"


class ManyTimes:
    """As many files as ImageNet has, the same few again and again: Grain's shuffle takes 4 us per
    image of a data set of that size, and more than a millisecond per image of one of twenty."""

    def __init__(self, source: InMemory):
        self.read, self.name = source.read, source.name

    def __len__(self) -> int:
        return 1_281_167


def _gradient(number: int) -> bytes:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), np.int32)
    noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=95)
    return file.getvalue()


if __name__ == "__main__":
    main()
