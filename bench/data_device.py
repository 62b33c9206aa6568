"""How fast a device makes the views of kind gpu, and what that costs the step it runs beside.

    python bench/data_device.py [--device cuda] [--data FOLDER] [--batch 128] [--only PART ...]
    python bench/data.py --device cuda [--data FOLDER]                      # the same, all parts

Parts, in this order:

    threads   images a second of a core of the loader's, which read headers and draw, beside kind
              fast, which does all there
    decode    images a second of the device's decoder, by the images of a batch
    views     milliseconds of the kernel that makes both views, images a second of decoder and
              kernel together
    distance  from kind reference, in levels of 255 and dB: what the decoder's pixels do
    loader    pairs of views a second of the whole loader, by threads
    beside    milliseconds of a step of BEiT-B that takes its batches from there, and of one whose
              batch lies on the device
    peers     pairs a second of DALI, where it is installed

Each is written to bench/results/data-device-<device>.csv as it is measured (records.py has the
rule). With `--device cpu` everything runs small, the CPU in the device's place, to show that it
runs.
"""

import argparse
import contextlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from data import GRID, distance
from data_images import InMemory, ManyTimes
from pretrain_candidates import GivenTokens, Ours, Setting, synthetic_batch, to_device
from records import Records
from timing import (
    RESULTS,
    conditions,
    conditions_line,
    format_table,
    rates,
    synchronize,
    time_interleaved,
)

from beit_fast.data.config import MaskingConfig
from beit_fast.data.device_decode import DecodeCounts, device_decoder
from beit_fast.data.device_views import DeviceViews
from beit_fast.data.loader import Loader
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.jpeg import Jpeg, plain_jpeg
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import LATE, VIEWS, LateViews, make_views
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.train.prefetch import InFlight, device_batches

VIEW = ViewConfig(kind="gpu")


@dataclass(frozen=True)
class Place:
    """Where it is measured, and how long."""

    device: torch.device
    source: InMemory
    batch: int
    rounds: int

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        return 3.0 if self.is_cuda else 0.3

    def late(self, count: int) -> list[LateViews]:
        """Images and draws, as the loader's threads give them."""
        return [
            make_views(self.source.read(i), VIEW, SampleSeed(0, 0, i).rng("view"))[0][LATE]
            for i in range(count)
        ]

    def views(self, config: ViewConfig = VIEW) -> DeviceViews:
        return DeviceViews(config, VIEWS, self.device, DecodeCounts())

    def rate(self, work: Callable[[], object], images: int) -> float:
        """Images a second of calls that come after one another; the first two do not count."""
        for _ in range(2):
            work()
        synchronize()
        begun, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - begun) < self.seconds:
            work()
            synchronize()
            count += images
        return count / spent


def threads(place: Place) -> list[dict]:
    def sample(kind: str) -> Callable[[int], object]:
        make = PretrainSample(replace(VIEW, kind=kind), MaskingConfig(), GRID)
        return lambda i: make(place.source.read(i), SampleSeed(0, 0, i))

    candidates = {kind: sample(kind) for kind in ("fast", "gpu")}
    rows = rates(candidates, max(64, len(place.source)), place.rounds, turn=4)
    return [{"case": row["case"], "images per core second": row["median"]} for row in rows]


def decode(place: Place) -> list[dict]:
    rows = []
    for batch in (64, 256, 1024) if place.is_cuda else (4,):
        decoder = device_decoder(place.device)
        images = _plain(place.source, batch)
        rate = place.rate(lambda d=decoder, i=images: d(i), batch)
        rows.append({"case": f"batches of {batch}", "images per second": rate})
    return rows


def views(place: Place) -> list[dict]:
    late = place.late(place.batch)
    made = place.views()
    late = [views for views in late if views.jpeg is not None]
    decoded = [p for p, _ in device_decoder(place.device)([views.jpeg for views in late])]
    draws = [views.draw for views in late]
    (timing,) = time_interleaved(
        {"kernel": lambda: made.made(decoded, draws)}, device=place.device, rounds=place.rounds
    ).values()
    rate = place.rate(lambda: made(late, _refuse), len(late))
    return [
        {
            "case": f"batches of {place.batch}",
            "kernel ms": timing.median_ms,
            "pairs per second, decoded": rate,
        }
    ]


def distance_of(place: Place) -> list[dict]:
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in VIEWS}
    late = place.late(len(place.source))
    made = {name: view.cpu().numpy() for name, view in place.views()(late, _refuse).items()}
    for i in range(len(place.source)):
        rng = SampleSeed(0, 0, i).rng("view")
        theirs, _ = make_views(place.source.read(i), replace(VIEW, kind="reference"), rng)
        for name in VIEWS:
            results[name].append(distance(made[name][i], theirs[name]))
    rows = []
    for name, found in results.items():
        mean, largest, psnr = (np.array(column) for column in zip(*found, strict=True))
        rows.append(
            {
                "case": name,
                "mean": float(mean.mean()),
                "max": int(largest.max()),
                "PSNR median": float(np.median(psnr)),
                "PSNR worst": float(psnr.min()),
            }
        )
    return rows


def loader(place: Place) -> list[dict]:
    rows = []
    for num_threads in (1, 2, 4, 8, 16) if place.is_cuda else (1,):
        with contextlib.closing(_batches(place, num_threads)) as batches:
            for _ in range(num_threads + 4):  # those read ahead while nobody waited
                next(batches)
            begun, cpu, count = time.perf_counter(), time.process_time(), 0
            while (spent := time.perf_counter() - begun) < place.seconds:
                next(batches)
                count += place.batch
        rows.append(
            {
                "case": f"gpu, {num_threads} threads",
                "pairs per second": count / spent,
                "busy cores": (time.process_time() - cpu) / spent,
            }
        )
    return rows


def beside(place: Place) -> list[dict]:
    """Both ways in turns, tokens given: the shortest step, that waits soonest."""
    setting = Setting(
        model=beit_config("beit_base_patch16_224") if place.is_cuda else _small(),
        batch=place.batch,
        device=place.device.type,
        dtype="bf16" if place.is_cuda else "fp32",
        tokenizer=None,
        input="synthetic",
    )
    ours = Ours(setting.pretrain, GivenTokens(setting.model, setting.batch), place.device)
    still = to_device(synthetic_batch(setting), place.device)
    steps = 30 if place.is_cuda else 2
    ms: dict[str, list[float]] = {"batch on the device": [], "batches of kind gpu": []}
    for _ in range(place.rounds):
        for case, found in ms.items():
            with contextlib.ExitStack() as stack:
                if case == "batch on the device":
                    batches: Iterator = map(ours.ready, itertools.repeat(still))
                else:
                    config = setting.pretrain.views
                    made = _batches(place, 8 if place.is_cuda else 1, config, setting.model.grid)
                    batches = device_batches(made, place.device, ours.ready)
                    stack.callback(batches.close)
                in_flight = InFlight(place.device)
                for step in range(2 * steps):
                    if step == steps:
                        synchronize()
                        begun = time.perf_counter()
                    ours.step(next(batches))
                    in_flight.add()
                synchronize()
                found.append(1e3 * (time.perf_counter() - begun) / steps)
    medians = {case: float(np.median(found)) for case, found in ms.items()}
    alone = medians["batch on the device"]
    return [
        {"case": case, "step ms": median, "longer by": median / alone - 1}
        for case, median in medians.items()
    ]


def peers(place: Place) -> list[dict]:
    if not place.is_cuda or importlib.util.find_spec("nvidia.dali") is None:
        print("DALI: not measured, it needs a GPU and the package nvidia-dali-cuda130")
        return []
    from peer_dali_device import dali_views

    pipeline = dali_views(place.source.read, VIEW, place.batch, place.device)
    return [
        {
            "case": "DALI",
            "pairs per second": place.rate(lambda: pipeline.run(), place.batch),
        }
    ]


PARTS: dict[str, tuple[str, Callable[[Place], list[dict]]]] = {
    "threads": ("what the loader's threads do, with masks", threads),
    "decode": ("the device's decoder", decode),
    "views": ("both views on the device", views),
    "distance": ("kind gpu against reference, levels of 255 and dB", distance_of),
    "loader": ("the loader, two views and masks", loader),
    "beside": ("a step of BEiT-B beside it, tokens given", beside),
    "peers": ("both views by others", peers),
}


def _batches(
    place: Place,
    num_threads: int,
    config: ViewConfig = VIEW,
    grid: tuple[int, int] = GRID,
) -> Iterator[dict[str, torch.Tensor]]:
    masked = MaskingConfig(num_masked=grid[0] * grid[1] * 75 // 196, min_block=2)
    return Loader(
        ManyTimes(place.source),
        PretrainSample(replace(config, kind="gpu"), masked, grid),
        batch_size=place.batch,
        num_threads=num_threads,
        max_bad_share=0,
        device=place.device,
    ).batches()


def _plain(source: InMemory, count: int) -> list[Jpeg]:
    """JPEGs that a device decodes; raises ValueError where there is none."""
    found = [plain_jpeg(source.read(i)) for i in range(len(source))]
    found = [jpeg for jpeg in found if isinstance(jpeg, Jpeg)]
    if not found:
        raise ValueError(f"{source.origin} has no baseline JPEG: give --data a folder with some")
    return [found[i % len(found)] for i in range(count)]


def _small() -> BeitConfig:
    return BeitConfig(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, vocab_size=32)


def _refuse(row: int, error: Exception) -> None:
    raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    is_there = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if is_there else "cpu")
    parser.add_argument("--data", type=Path, help="folder of images; default the photographs")
    parser.add_argument("--batch", type=int, help="images; default 128, on a CPU 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="default results/data-device-<device>.csv")
    args = parser.parse_args()
    if args.device == "cuda" and not is_there:
        parser.error("torch finds no GPU: pass --device cpu")
    source, device = InMemory(args.data), torch.device(args.device)
    batch = args.batch or (128 if args.device == "cuda" else 4)
    measure_all(Place(device, source, batch, args.rounds), args.only, args.output)


def measure_all(
    place: Place, parts: Collection[str] = tuple(PARTS), output: Path | None = None
) -> None:
    """Print the parts and write them to `output`, or results/data-device-<device>.csv."""
    torch.set_num_threads(1)
    source = place.source
    values = conditions(
        place.device,
        ("torchcodec", "triton", "pillow", "numpy", "grain"),
        rounds=place.rounds,
        batch=place.batch,
        images=f"{len(source)} of {source.kilobytes:.0f} kB from {source.origin}",
    )
    print(conditions_line(values))
    output = output or RESULTS / f"data-device-{place.device.type}.csv"
    records = Records(output, values, ("bench", "case", "figure"))
    for title, measure in (PARTS[part] for part in PARTS if part in parts):
        if not (measured := measure(place)):
            continue
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


if __name__ == "__main__":
    main()
