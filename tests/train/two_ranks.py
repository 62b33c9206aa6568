"""The toy on the ranks that torchrun starts: `two_ranks.py OUTPUT FAULT`."""

import os
import signal
import sys
from pathlib import Path

import torch
from conftest import ToyTask, train_toy  # this file's folder leads sys.path

from beit_fast.train.step import NonFiniteLoss
from beit_fast.train.stop import Interrupted
from beit_fast.train.world import open_world
from beit_fast_main import _end_rank


def main(output: Path, fault: str) -> int:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        hit = world.rank == 1
        task = ToyTask(bad_step=6 if hit and fault == "nan" else None, world=world, dropout=0.0)
        if hit and fault == "term":
            task.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
        changes = {}
        if fault in ("evaluation", "strict"):
            changes = {"evaluate_every": 2.0, "strict": fault == "strict"}
            task.evaluate = (lambda model: 1 / 0) if hit else (lambda model: {"one": 1.0})
        if fault == "back":
            changes = {"resume_from": 3}
        try:
            train_toy(output, task, world, accumulate=1, **changes)
        except (NonFiniteLoss, Interrupted, ValueError, ArithmeticError, RuntimeError) as error:
            (output / f"error_{world.rank}.txt").write_text(str(error))
        torch.save(task.model.state_dict(), output / f"model_{world.rank}.pt")
    return 0


if __name__ == "__main__":
    _end_rank(main(Path(sys.argv[1]), sys.argv[2]))
