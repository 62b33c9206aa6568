"""Runs of all tasks on the ranks that torchrun starts, one after another, to be replayed:
`replayed_ranks.py RUNS`, a pickled list of (configuration, sample to spoil or None, folder of what
fired). Their folders have their configurations."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.pipeline import settings_of
from beit_fast.tasks.sources import task_settings
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.train.loop import train
from beit_fast.train.world import open_world
from beit_fast_main import _end_rank
from faults import Injector
from parallel_ranks import TASKS


def spoiling(prepare: Callable, fired: Path, sample: int, name: str) -> Callable:
    """A task's `prepare` that makes one image's pixels, the tensor `name`, too large for fp32."""
    injector = Injector(fired, [f"0:{sample}:huge"], again=1000)

    def spoiled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prepared = prepare(batch)
        pixels = [
            injector.meet("sample", index, image)
            for index, image in zip(batch["sample_index"].tolist(), prepared[name], strict=True)
        ]
        return prepared | {name: torch.stack(pixels)}

    return spoiled


def run(config: Any, sample: int | None, fired: Path, world) -> None:
    task = TASKS[type(config)](config, world)
    if sample is not None:
        task.prepare = spoiling(task.prepare, fired, sample, "patches")
    settings = task_settings(task.config)
    if isinstance(config, PretrainConfig):
        settings = settings_of(task, load_tokenizer(config.tokenizer))
    task.picture = lambda model, path: path.touch()
    train(task, config.optim, config.run, settings=settings, world=world, config=config)


def main(runs: Path) -> None:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        for config, sample, fired in pickle.loads(runs.read_bytes()):
            run(config, sample, fired, world)
            world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    _end_rank(0)
