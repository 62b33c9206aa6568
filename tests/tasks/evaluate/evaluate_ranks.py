"""An evaluation on the ranks that torchrun starts: `evaluate_ranks.py FOLDER OUTPUT`."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.sources.decode import BadImageError
from beit_fast.tasks.evaluate.evaluation import evaluate_classifier
from beit_fast.train.world import open_world
from beit_fast_main import _end_rank
from tiny_classifier import tiny_classifier  # PYTHONPATH has tests/support


class Part:
    """The first images of a source, which keeps who was read; `bad` cannot be."""

    def __init__(self, source, count, bad=None):
        self.source, self.count, self.bad, self.reads = source, count, bad, []

    def __len__(self):
        return self.count

    def read(self, index):
        self.reads.append(index)
        if index == self.bad:
            raise BadImageError(f"{index} is broken")
        return self.source.read(index)

    def name(self, index):
        return self.source.name(index)


def main(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    source, labels, _ = class_folders(folder)
    parts = {"all": Part(source, 15), "one": Part(source, 1), "error": Part(source, 15, bad=14)}
    results = {"read": {}}
    with open_world("cpu") as world:
        for name, part in parts.items():
            try:
                results[name] = asdict(
                    evaluate_classifier(
                        tiny_classifier(),
                        part,
                        labels[: len(part)] * 2,
                        num_classes=7,
                        statistics=((0.5,) * 3, (0.5,) * 3),
                        crop_pct=0.8,
                        precision="fp32",
                        batch_size=4,
                        num_threads=2,
                        world=world,
                    )
                )
            except ValueError as error:
                results[name] = str(error)
            results["read"][name] = sorted(part.reads)
        torch.save(results, output / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    _end_rank(0)
