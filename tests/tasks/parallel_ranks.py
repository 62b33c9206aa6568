"""Runs on the ranks that torchrun starts, one after another: `parallel_ranks.py RUNS OUTPUT`.

RUNS is a pickled list of (name, task's class, configuration, patches of torch.compile). Each run is
in OUTPUT / name; each rank leaves there what it holds: finished models, and its share of weights
and moments in bytes, or what ended the run.
"""

import functools
import pickle
import sys
import traceback
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from beit_fast.train import loop
from beit_fast.train.world import World, open_world

optimizers = []
compile_function = torch.compile


def note(build):
    @functools.wraps(build)
    def call(*arguments, **options):
        optimizers.append(build(*arguments, **options))
        return optimizers[-1]

    return call


def bytes_of(tensors) -> int:
    """Of this rank's memory."""
    locals_ = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in locals_)


def run(kind, config, backend: str, world: World) -> dict:
    torch._dynamo.reset()
    torch.compile = functools.partial(compile_function, backend=backend)
    try:
        task = kind(config, world)
        settings = {"of": kind.name}
        outcome = loop.train(task, config.optim, config.run, settings=settings, world=world)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    optimizer = optimizers.pop()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    return {
        "trained": outcome.trained.state_dict(),
        "model": outcome.model.state_dict(),
        "parameters": bytes_of(task.model.parameters()),
        "moments": bytes_of(moments),
    }


def main(runs: Path, output: Path) -> None:
    torch.set_num_threads(1)
    loop.build_optimizer = note(loop.build_optimizer)
    with open_world("cpu") as world:
        for name, kind, config, backend in pickle.loads(runs.read_bytes()):
            left = run(kind, config, backend, world)
            torch.save(left, output / f"{name}_{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
