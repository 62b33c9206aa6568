"""The toy on the ranks that torchrun starts: `two_ranks.py OUTPUT FAULT`."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from beit_fast.train import saving
from beit_fast.train.state import checkpoint_paths
from beit_fast.train.stop import Interrupted
from beit_fast.train.world import World, open_world
from beit_fast_main import _end_rank
from faults import Injector
from toy import ToyTask, train_toy


def play_a_disk(output: Path, task: ToyTask, world: World) -> None:
    """The third step's checkpoint is not written before rank 1 is in its sixth; those of the sixth
    and the ninth never are."""
    injector = Injector(output, ["0:6:full_disk", "0:9:full_disk"])
    sign, write = output / "rank_1_goes_on", saving.save_checkpoint

    def save(folder: Path, step: int, *args: object, **more: object) -> Path:
        end = time.monotonic() + 30
        while step == 3 and not sign.exists() and time.monotonic() < end:
            time.sleep(0.01)
        injector.meet("save", step)
        return write(folder, step, *args, **more)

    if world.is_main:
        saving.save_checkpoint = save
    else:
        task.on_step = lambda step: (
            sign.touch() if step == 5 and not checkpoint_paths(output) else None
        )


def main(output: Path, fault: str) -> int:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        hit = world.rank == 1
        task = ToyTask(world=world, dropout=0.0)
        if hit and fault == "term":
            task.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
        changes = {}
        if fault in ("evaluation", "strict"):
            changes = {"evaluate_every": 2.0, "strict": fault == "strict"}
            task.evaluate = (lambda model: 1 / 0) if hit else (lambda model: {"one": 1.0})
        if fault == "disk":
            changes = {"save_every": 3, "failed_saves": 1}
            play_a_disk(output, task, world)
        if fault == "back":
            changes = {"resume_from": 3}
        try:
            train_toy(output, task, world, accumulate=1, **changes)
        except (Interrupted, ValueError, ArithmeticError, OSError, RuntimeError) as error:
            (output / f"error_{world.rank}.txt").write_text(str(error))
        torch.save(task.model.state_dict(), output / f"model_{world.rank}.pt")
    return 0


if __name__ == "__main__":
    _end_rank(main(Path(sys.argv[1]), sys.argv[2]))
