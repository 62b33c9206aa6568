"""The toy with a step that cannot be captured, on a GPU: `failed_capture.py OUTPUT FAULT`."""

import sys
from pathlib import Path

import torch

from beit_fast.train.world import World
from toy import ToyTask, train_toy


def main(output: Path, fault: str) -> None:
    task = ToyTask()

    def fail(step: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            if fault == "wait":
                torch.cuda.synchronize()
            else:
                torch.empty(2**50, dtype=torch.uint8, device="cuda")

    task.on_step = fail
    options = {"accumulate": 1, "save_every": 2, "compile": "off", "device": "cuda"}
    train_toy(output, task, World(0, 1, torch.device("cuda", 0)), cuda_graph=True, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
