"""What it costs to pack and to check images, and which damage a check finds.

    python bench/pack.py [--images 1200] [--rounds 5]

The images are crops of the package's photographs, 500 x 375 pixels, JPEG at 97. All is in the page
cache: what a disk or a network takes comes on top. Written to bench/results/pack.csv, by CPU time:

    images a second and core                of pack, pack --short_side 256 and check
    the same without decoding               of pack and check: what is left for one process, where
                                            most of it is done by one thread at a time

and to bench/results/damage.csv: of 200 of these JPEGs, damaged in one way, how many are refused,
how many decode with a warning that check gives, and how many nothing is said of.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from records import Records
from timing import RESULTS, conditions, conditions_line, format_table

import beit_fast.data
from beit_fast.data.sources.decode import decode_fast
from beit_fast.tasks.check import findings
from beit_fast.tasks.check.config import CheckConfig
from beit_fast.tasks.check.task import run_check
from beit_fast.tasks.pack import members
from beit_fast.tasks.pack.config import PackConfig
from beit_fast.tasks.pack.task import run_pack

SIZE, QUALITY, SHORT = (500, 375), 97, 256
SECTOR, SOME = 4096, 500  # bytes
HEADER = 700  # bytes of a JPEG before its pixels, tables among them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--damaged", type=int, default=200, help="images of each damage")
    parser.add_argument("--output", type=Path, default=RESULTS / "pack.csv", help="CSV")
    parser.add_argument("--damage_output", type=Path, default=RESULTS / "damage.csv", help="CSV")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = write_images(Path(place) / "images", args.images)
        size = statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))
        values = conditions(
            torch.device("cpu"),
            ("torchcodec", "pillow"),
            images=args.images,
            kB=round(size / 1000),
            rounds=args.rounds,
        )
        print(conditions_line(values))
        rows = rates(folder, Path(place), args.images, args.rounds)
        Records(args.output, values, ("work",)).add(rows)
        print(format_table(rows))
        rows = list(damage(folder, Path(place), args.damaged))
        Records(args.damage_output, values | {"damaged": args.damaged}, ("damage",)).add(rows)
        print(format_table(rows))


def write_images(folder: Path, count: int) -> Path:
    """In ten class folders."""
    photographs = sorted((Path(beit_fast.data.__file__).parent / "photographs").glob("*.jpg"))
    images = [Image.open(path).convert("RGB") for path in photographs]
    rng = np.random.default_rng(0)
    for number in range(count):
        image = images[number % len(images)]
        width, height = (int(side * rng.uniform(0.6, 1)) for side in image.size)
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        part = image.crop((left, top, left + width, top + height))
        path = folder / f"class {number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = SIZE if number % 2 else SIZE[::-1]
        part.resize(size, Image.Resampling.BICUBIC).save(path, quality=QUALITY)
    return folder


def rates(folder: Path, place: Path, count: int, rounds: int) -> list[dict[str, object]]:
    """A row for each work; candidates take turns in every round."""
    number = 0

    def pack(**settings: object) -> None:
        nonlocal number
        number += 1
        shards = str(place / f"shards_{number}")
        run_pack(PackConfig(images=str(folder), shards=shards, **settings))

    def check() -> None:
        run_check(CheckConfig(images=str(folder), output=str(place / "check.json")))

    works: dict[str, Callable[[], None]] = {
        "pack": pack,
        f"pack --short_side {SHORT}": lambda: pack(short_side=SHORT),
        "check": check,
        "pack without decoding": lambda: undecoded(pack),
        "check without decoding": lambda: undecoded(check),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    decode_fast(next(folder.rglob("*.jpg")).read_bytes())  # imports torchcodec
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.process_time()
            quietly(work)
            found[name].append(count / (time.process_time() - begin))
    return [
        {"work": name, "images_per_second": statistics.median(all_)}
        | {"low": min(all_), "high": max(all_)}
        for name, all_ in found.items()
    ]


def undecoded(work: Callable[[], None]) -> None:
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[0, 0] = 1  # not of one colour
    with (
        mock.patch.object(members, "decode_fast", return_value=pixels),
        mock.patch.object(findings, "decode_fast", return_value=pixels),
    ):
        work()


def damage(folder: Path, place: Path, count: int) -> Iterator[dict[str, object]]:
    """A row for each way."""
    rng = random.Random(0)

    def at(data: bytearray, num_bytes: int) -> slice:
        first = rng.randrange(HEADER, len(data) - num_bytes)
        return slice(first, first + num_bytes)

    def sector(data: bytearray) -> None:
        first = rng.randrange(1, len(data) // SECTOR) * SECTOR
        data[first : first + SECTOR] = bytes(SECTOR)

    def hole(data: bytearray) -> None:
        del data[at(data, SOME)]

    def chance(data: bytearray) -> None:
        data[at(data, SOME)] = rng.randbytes(SOME)

    def flip(data: bytearray) -> None:
        data[at(data, 1).start] ^= 1 << rng.randrange(8)

    def cut(data: bytearray) -> None:
        del data[-rng.randrange(1, len(data)) :]

    ways = {
        "4 KiB of zeros": sector,
        "500 bytes missing": hole,
        "500 bytes of chance": chance,
        "one flipped bit": flip,
        "its end missing": cut,
    }
    paths = sorted(folder.rglob("*.jpg"))[:count]
    for name, way in ways.items():
        damaged, output = place / name, place / "damage.json"
        damaged.mkdir()
        for number, path in enumerate(paths):
            data = bytearray(path.read_bytes())
            way(data)
            (damaged / f"{number}.jpg").write_bytes(data)
        config = CheckConfig(images=str(damaged), output=str(output))
        with contextlib.suppress(ValueError):  # some cannot be used
            quietly(lambda config=config: run_check(config))
        report = json.loads(output.read_text())
        refused, warned = (
            len(report[entry]) for entry in ("cannot_be_used", "decoded_with_a_warning")
        )
        yield {
            "damage": name,
            "refused": refused,
            "with a warning": warned,
            "not found": len(paths) - refused - warned,
        }


def quietly(work: Callable[[], None]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        work()


if __name__ == "__main__":
    logging.getLogger("beit_fast.data").setLevel(logging.ERROR)
    main()
