"""How fast images come from a store, by how they are asked for.

    python bench/stores.py [--latency 0 50] [--images 512] [--rounds 3]

A server on loopback, in a process of its own, has JPEGs of 100 kB, loose and in tar shards, and
answers after the latency. Four threads read them in batches of 128, without decoding: one after the
other, or with all of a batch asked for when it begins, as the loader does; from shards also through
copies on disk. Printed and written to bench/results/stores.csv are images a second and the time of
the CPU that an image costs this process, medians over rounds. Beside them stand a folder on disk
and obstore's coroutines, 256 at a time. The server takes one core: without latency it is what
limits.
"""

import argparse
import asyncio
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import obstore
import torch
from obstore.store import HTTPStore
from PIL import Image
from records import Records
from timing import RESULTS, conditions, conditions_line, format_table

from beit_fast.data.sources.folder import ImageFolder, ImageSource, read_ahead
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.sources.object_folder import ObjectFolder
from beit_fast.data.sources.tar_shards import TarShards

SERVER = Path(__file__).parents[1] / "tests" / "support" / "object_server.py"
THREADS, BATCH, SHARDS = 4, 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 50], help="milliseconds")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "stores.csv", help="CSV")
    args = parser.parse_args()
    values = conditions(
        torch.device("cpu"), ("obstore",), rounds=args.rounds, images=args.images, readers=THREADS
    )
    print(conditions_line(values))
    records = Records(args.output, values, ("latency_ms", "candidate"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "set")
        write_images(folder, args.images)
        for latency in args.latency:
            with served(folder, latency / 1000) as url:
                rows = measure(url, folder, latency, args.rounds, Path(name, "cache"))
            print(f"\n{format_table(rows)}", flush=True)
            records.add(rows)
    print(f"written to {records.path}")


def measure(url: str, folder: Path, latency: float, rounds: int, cache: Path) -> list[dict]:
    reads = ReadConfig(cache=str(cache))
    loose = ObjectFolder(f"{url}/list.txt")
    shards = TarShards(f"{url}/{{0..{SHARDS - 1}}}.tar", reads=reads)
    copied = TarShards(f"{url}/{{0..{SHARDS - 1}}}.tar", reads=reads)
    copied.windowed(SHARDS)
    copied.shards_ahead(range(SHARDS))
    while not all(copied._storage._has(part_of(copied, shard)) for shard in range(SHARDS)):
        time.sleep(0.1)
    images = len(loose)
    candidates: dict[str, Callable[[], object]] = {
        "folder on disk": lambda: read_batches(ImageFolder(folder), ahead=False),
        "loose, one after the other": lambda: read_batches(loose, ahead=False),
        "loose, a batch at once": lambda: read_batches(loose, ahead=True),
        "obstore's coroutines": lambda: asyncio.run(read_in_coroutines(url, loose)),
        "shards, one after the other": lambda: read_batches(shards, ahead=False),
        "shards, a batch at once": lambda: read_batches(shards, ahead=True),
        "shards, from copies": lambda: read_batches(copied, ahead=True),
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if number:  # the first opens connections
                took[name].append(spent)
    return [
        {
            "latency_ms": latency,
            "candidate": name,
            "images_per_second": images / statistics.median(wall for wall, _ in spent),
            "cpu_us_per_image": 1e6 * statistics.median(cpu for _, cpu in spent) / images,
        }
        for name, spent in took.items()
    ]


def read_batches(source: ImageSource, ahead: bool) -> None:
    """All images, in batches that `THREADS` threads read."""

    def read(first: int) -> None:
        batch = range(first, min(first + BATCH, len(source)))
        if ahead:
            read_ahead(source, batch)
        for index in batch:
            source.read(index)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(0, len(source), BATCH)))


async def read_in_coroutines(url: str, source: ObjectFolder) -> None:
    store = HTTPStore(url, client_options={"allow_http": True})
    limit = asyncio.Semaphore(256)

    async def read(index: int) -> bytes:
        async with limit:
            whole = await obstore.get_async(store, source.key(index))
            return (await whole.bytes_async()).to_bytes()

    await asyncio.gather(*(read(index) for index in range(len(source))))


def part_of(source: TarShards, shard: int):
    """All of a shard."""
    from beit_fast.data.sources.storage import FilePart

    index = source._indices[shard]
    return FilePart(index.shard, 0, index.state.size)


def write_images(folder: Path, count: int) -> None:
    """JPEGs with a comment that makes 100 kB of each, loose, in shards, and their names."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), []
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, count, SHARDS):
                file = io.BytesIO()
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
                image.resize((64, 64)).save(file, "JPEG", comment=rng.bytes(49_000))
                data = file.getvalue() + rng.bytes(100_000 - len(file.getvalue()))
                names.append(f"{number:05}.jpg")
                (folder / names[-1]).write_bytes(data)
                member = tarfile.TarInfo(names[-1])
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "list.txt").write_text("\n".join(names))


@contextlib.contextmanager
def served(folder: Path, latency: float) -> Iterator[str]:
    command = [sys.executable, SERVER, folder, str(latency)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=os.environ, **pipes) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()


if __name__ == "__main__":
    main()
