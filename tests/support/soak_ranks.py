"""A pre-training of many steps on the ranks that torchrun starts: `soak_ranks.py CONFIG OUTPUT`.

CONFIG is a pickled PretrainConfig. Rank 0 leaves in OUTPUT/grown.json what the process held, a row
every twentieth step.
"""

import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import torch

from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tasks.sources import task_settings
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.train.loop import train
from beit_fast.train.world import World, open_world
from beit_fast_main import _end_rank

EVERY = 20  # steps between rows


def held() -> dict[str, float]:
    """What this process has now: memory in MiB, open files, threads, children; and the time."""
    status = Path("/proc/self/status").read_text().split("\n")
    resident = next(line.split()[1] for line in status if line.startswith("VmRSS:"))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "memory": int(resident) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(children),
        "time": time.perf_counter(),
    }


def soak(config: PretrainConfig, world: World) -> list[dict[str, float]]:
    task = PretrainTask(config, load_tokenizer(config.tokenizer), world)
    begin_step, rows = task.begin_step, []

    def look(step: int) -> None:
        # Not where a checkpoint is being written, every hundredth step: in the middle between.
        if step % EVERY == EVERY // 2:
            rows.append({"step": step} | held())
        begin_step(step)

    task.begin_step = look
    task.picture = lambda model, path: path.touch()
    train(task, config.optim, config.run, settings=task_settings(config), world=world)
    return rows


def main(config: Path, output: Path) -> None:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        rows = soak(pickle.loads(config.read_bytes()), world)
        if world.is_main:
            (output / "grown.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    _end_rank(0)
