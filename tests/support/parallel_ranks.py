"""Runs of all tasks on the ranks that torchrun starts, one after another: `parallel_ranks.py RUNS`.

RUNS is a pickled list of (configuration, backend of torch.compile, folder or None). A run with a
folder goes on from a copy of it. Each rank leaves in its run's folder what it holds: the
finished models, and the bytes of its share of weights and moments.
"""

import functools
import pickle
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from beit_fast.tasks.finetune.config import FinetuneConfig
from beit_fast.tasks.finetune.task import FinetuneTask
from beit_fast.tasks.pretrain.config import DvaeTrainingConfig, PretrainConfig
from beit_fast.tasks.pretrain.dvae import DvaeTask
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tasks.segment.config import SegmentConfig
from beit_fast.tasks.segment.training import SegmentTask
from beit_fast.tasks.sources import task_settings
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.train import loop
from beit_fast.train.world import World, open_world
from beit_fast_main import _end_rank

TASKS = {
    PretrainConfig: lambda c, world: PretrainTask(c, load_tokenizer(c.tokenizer), world),
    FinetuneConfig: FinetuneTask,
    SegmentConfig: SegmentTask,
    DvaeTrainingConfig: DvaeTask,
}


def run_here(config: Any, world: World, backend: str = "eager") -> dict[str, Any]:
    """Train; what is left of it on this rank."""
    optimizers, compiled = [], torch.compile
    build = loop.build_optimizer

    def noted(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizers.append(build(*arguments, **options))
        return optimizers[-1]

    task = TASKS[type(config)](config, world)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        torch.compile = functools.partial(compiled, backend=backend)
        loop.build_optimizer = noted
        outcome = loop.train(
            task, config.optim, config.run, settings=task_settings(config), world=world
        )
    finally:
        torch.compile, loop.build_optimizer = compiled, build
    moments = [v for state in optimizers[0].state.values() for v in state.values() if v.ndim]
    return {
        "trained": outcome.trained.state_dict(),
        "model": outcome.model.state_dict(),
        "kind": type(outcome.model).__name__,
        "weights_bytes": _own_bytes(task.model.parameters()),
        "moments_bytes": _own_bytes(moments),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def _own_bytes(tensors: Iterable[Tensor]) -> int:
    """In this rank's memory."""
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)


def main(runs: Path) -> None:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        for config, backend, begun in pickle.loads(runs.read_bytes()):
            output = Path(config.run.output)
            if begun is not None and world.is_main:
                shutil.copytree(begun, output)
            world.barrier()
            left = run_here(config, world, backend)
            torch.save(left, output / f"rank_{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    _end_rank(0)
