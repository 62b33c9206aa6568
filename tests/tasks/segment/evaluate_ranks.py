"""An evaluation on the ranks that torchrun starts: `evaluate_ranks.py OUTPUT`."""

import sys
from pathlib import Path

import torch

from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.tasks.segment.evaluation import evaluate_segmenter
from beit_fast.train.world import open_world
from beit_fast_main import _end_rank
from labelled_pixels import Pairs, PatchModel  # PYTHONPATH has tests/support

HALF = ((0.5,) * 3, (0.5,) * 3)


def main(output: Path) -> None:
    torch.set_num_threads(1)
    sources = {"seven": Pairs(7), "one": Pairs(1), "error": Pairs(7)}
    sources["error"].spoil(6, mask=b"no image")
    results = {"read": {}}
    with open_world("cpu") as world:
        for name, source in sources.items():
            try:
                found = evaluate_segmenter(
                    PatchModel(),
                    source,
                    slide=SlideConfig(),
                    statistics=HALF,
                    precision="fp32",
                    num_threads=2,
                    world=world,
                )
                results[name] = {"confusion": found.confusion, "num_images": found.num_images}
            except ValueError as error:
                results[name] = str(error)
            results["read"][name] = sorted(source.reads)
        torch.save(results, output / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    _end_rank(0)
