"""How well a window of shards shuffles, and what the order of a sample costs.

    python bench/order.py [--shards 1024] [--images 1251] [--windows 1 4 16 64 256] [--batch 2048]

The shards are ImageNet-1k's as timm publishes it, unless others are asked for: only their sizes
count. Written to bench/results/order.csv, of each window and of the full shuffle:

    rank correlation   of an image's position in a pass with its place in the data set, and with its
                       position in the pass before; the larger of the two, and of all passes
    repeat distance    samples between two occurrences of an image, in passes: 1 % are nearer
    shards a batch     from how many shards the images of a step come, in the mean
    same shard         share of the pairs of images of a step that are of one shard
    us a sample        CPU time of asking which image a sample is, one after another
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from records import Records
from timing import RESULTS, conditions, conditions_line, format_table

from beit_fast.data.image_list import ImageList
from beit_fast.data.passes import Part, Passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--images", type=int, default=1251, help="in each shard")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--batch", type=int, default=2048, help="images of a step")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "order.csv", help="CSV")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("shards", "images", "batch", "passes")}
    values = conditions(torch.device("cpu"), ("numpy", "grain"), **settings)
    print(conditions_line(values))
    records = Records(args.output, values, ("order",))
    rows = []
    for window in [*args.windows, None]:
        rows.append(measure(window, args.shards, args.images, args.batch, args.passes))
        records.add(rows[-1:])
    print(format_table(rows))


def measure(
    window: int | None, num_shards: int, per_shard: int, batch: int, num_passes: int
) -> dict[str, object]:
    """One row, see the top."""
    count = num_shards * per_shard
    images = ImageList(range(count), [per_shard] * num_shards)
    passes = Passes(0, [Part(0, 0, count, "")], [images], window)
    begin = time.process_time()
    asked = (passes[sample][1] for sample in range(num_passes * count))
    places = np.fromiter(asked, np.int64, num_passes * count)
    us = (time.process_time() - begin) / len(places) * 1e6
    by_pass = places.reshape(num_passes, count)
    positions = by_pass.argsort(axis=1)
    pairs = [(np.arange(count), one) for one in positions] + [*itertools.pairwise(positions)]
    distances = np.concatenate([count + b - a for a, b in itertools.pairwise(positions)]) / count
    steps = by_pass[0, : count // batch * batch].reshape(-1, batch) // per_shard
    of_shards = np.array([np.bincount(step, minlength=num_shards) for step in steps])
    same = (of_shards * (of_shards - 1)).sum(axis=1) / (batch * (batch - 1))
    return {
        "order": f"window {window}" if window else "full",
        "rank correlation": max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs),
        "repeat distance": np.quantile(distances, 0.01),
        "shards a batch": (of_shards > 0).sum(axis=1).mean(),
        "same shard": same.mean(),
        "us a sample": us,
    }


if __name__ == "__main__":
    main()
