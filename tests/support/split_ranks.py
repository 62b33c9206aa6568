"""Pre-trainings on the ranks that torchrun starts, one after another: `split_ranks.py RUNS OUTPUT`.

RUNS is a pickled list of (name, configuration, options of `run_split`). Of each run every rank
leaves in OUTPUT what it saw: samples and draws of drop path of each micro-batch.
"""

import contextlib
import pickle
import sys
from pathlib import Path

import torch

from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tasks.sources import task_settings
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.train.loop import train
from beit_fast.train.world import World, open_world
from beit_fast_main import _end_rank
from task_runs import stopped_in_step  # this file's folder leads sys.path

Seen = dict[str, list[torch.Tensor]]


def run_split(
    config: PretrainConfig, world: World, *, stop: int | None = None, bare: tuple[int, ...] = ()
) -> Seen:
    """Train, and give what was seen: a tensor a micro-batch of this rank.

    stop: step in which a signal comes. bare: which micro-batches of a step, counted over ranks as
    the loader does, hide nothing.
    """
    seen: Seen = {"sample_index": [], "keep": []}
    tokenizer = None if config.token_cache else load_tokenizer(config.tokenizer)
    task = PretrainTask(config, tokenizer, world)
    prepare = task.prepare

    def note(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, values in seen.items():
            values.append(batch[name])
        micro = (len(seen["keep"]) - 1) % config.run.accumulate
        if micro * world.size + world.rank in bare:
            batch["mask"].zero_()
            batch["masked_index"].fill_(-1)
        return prepare(batch)

    task.prepare = note
    task.picture = lambda model, path: path.touch()
    with stopped_in_step(PretrainTask, stop) if stop else contextlib.nullcontext():
        train(task, config.optim, config.run, settings=task_settings(config), world=world)
    return seen


def main(runs: Path, output: Path) -> None:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        for name, config, options in pickle.loads(runs.read_bytes()):
            torch.save(run_split(config, world, **options), output / f"{name}_{world.rank}.pt")
            world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    _end_rank(0)
