"""What it costs to read an image from each kind of source on a local disk, decoding apart.

    python bench/reads.py [--images 8000] [--rounds 5]

Writes the photographs of the package again and again into a folder, into tar shards, an Arrow file
and a Parquet file of row groups of 100, and reads them by the loader's orders: all shuffled, and a
window of eight shards of 100 images. CPU time of one thread, and all is in the page cache: what a
disk or a network takes comes on top. Written to bench/results/reads.csv.
"""

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from records import Records
from timing import RESULTS, conditions, conditions_line, format_table

import beit_fast.data
from beit_fast.data.image_list import ImageList
from beit_fast.data.passes import Part, Passes
from beit_fast.data.sources.folder import ImageSource, read_windowed, shard_sizes_of
from beit_fast.data.sources.opening import open_images

PER_SHARD, WINDOW = 100, 8
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "reads.csv", help="CSV")
    args = parser.parse_args()
    values = conditions(torch.device("cpu"), ("pyarrow",), images=args.images, rounds=args.rounds)
    print(conditions_line(values))
    records = Records(args.output, values, ("source", "order"))
    with tempfile.TemporaryDirectory() as folder:
        sources = write_all(Path(folder), args.images)
        cases = [(name, order) for name in sources for order in ("full", "window")]
        us: dict[tuple[str, str], list[float]] = {
            case: [] for case in cases if case != ("folder", "window")
        }
        for round_number in range(args.rounds):
            for (name, order), found in us.items():
                found.append(read_pass(open_images(sources[name]), order, round_number))
    rows = [
        {"source": name, "order": order}
        | {"us": statistics.median(found), "low": min(found), "high": max(found)}
        for (name, order), found in us.items()
    ]
    records.add(rows)
    print(format_table(rows))


def read_pass(source: ImageSource, order: str, epoch: int) -> float:
    """Microseconds of CPU an image of one pass."""
    window = WINDOW if order == "window" else None
    if window is not None:
        read_windowed(source, window)
    images = ImageList(range(len(source)), shard_sizes_of(source))
    passes = Passes(0, [Part(0, epoch, len(source), "")], [images], window)
    numbers = [passes[sample][1] for sample in range(len(source))]
    source.read(0)
    begin = time.process_time()
    for number in numbers:
        source.read(number)
    return (time.process_time() - begin) / len(source) * 1e6


def write_all(folder: Path, count: int) -> dict[str, Path]:
    """The same images as every kind of source: name -> path."""
    photographs = sorted((Path(beit_fast.data.__file__).parent / "photographs").glob("*.jpg"))
    contents = [path.read_bytes() for path in photographs]
    images = [contents[number % len(contents)] for number in range(count)]
    (folder / "folder").mkdir()
    (folder / "tar").mkdir()
    for number, image in enumerate(images):
        (folder / "folder" / f"{number:06}.jpg").write_bytes(image)
    for first in range(0, count, PER_SHARD):
        with tarfile.open(folder / "tar" / f"{first:06}.tar", "w") as tar:
            for number, image in enumerate(images[first : first + PER_SHARD], first):
                member = tarfile.TarInfo(f"{number:06}.jpg")
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
    rows = [{"bytes": image, "path": None} for image in images]
    table = pa.table({"image": pa.array(rows, STRUCT)})
    parquet, arrow = folder / "t.parquet", folder / "t.arrow"
    pa.parquet.write_table(table, parquet, row_group_size=PER_SHARD)
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=PER_SHARD)
    return {"folder": folder / "folder", "tar": folder / "tar", "arrow": arrow, "parquet": parquet}


if __name__ == "__main__":
    main()
